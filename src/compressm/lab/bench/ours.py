"""Our sides: each function builds something and returns one step of it. `worker` calls them by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# PyTorch loads this module, 150 MB, with the first custom operator. Loaded here, it does not count as a step's memory.
import torch._dynamo  # pyright: ignore[reportUnusedImport]
from torch import Tensor, nn
from torch.nn import functional as F

from compressm import compress
from compressm.cutting import plan_reduction
from compressm.lab.bench.worker import Step
from compressm.layers import LRU, S4D, Convolution, LanguageModel, SequenceClassifier
from compressm.scans import delta_scan, gla_scan, lti_scan, selective_scan, siso_scan, ssd_scan
from compressm.scans.delta import Engine as DeltaEngine
from compressm.theory.rank_rule import RankRule


def classifier(
    n: int, width: int, layers: int = 1, classes: int = 10, radius: Sequence[float] = (0.9, 0.999)
) -> SequenceClassifier:
    """The model of the training rows, the same in every process; without dropout, so that losses can be compared."""
    torch.manual_seed(0)
    return SequenceClassifier(
        1, classes, width, n, n_layers=layers, dropout=0.0, norm="batch", r_min=radius[0], r_max=radius[1]
    )


def sequences(batch: int, length: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """A batch of inputs ``(batch, length, 1)`` and labels, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batch, length, 1, generator=generator)
    return inputs, torch.randint(0, classes, (batch,), generator=generator)


def lru_training_step(
    n: int,
    width: int,
    layers: int,
    batch: int,
    length: int,
    radius: Sequence[float] = (0.9, 0.999),
    cut_to: int | None = None,
    device: str = "cpu",
) -> Step:
    """Forward, backward and Adam; with ``cut_to`` on a model that `compressm.compress` has cut to so many states."""
    model = classifier(n, width, layers, radius=radius)
    if cut_to is not None:
        compress(model, states=cut_to)
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    inputs, labels = (tensor.to(device) for tensor in sequences(batch, length))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        _finish(device)

    return step


VOCABULARY = 256


def mamba2_model(n: int, width: int, layers: int, batch: int, length: int, head_dim: int) -> Step:
    """Forward and backward of our Mamba-2 language model on random tokens."""
    torch.manual_seed(0)
    model = LanguageModel(VOCABULARY, width, n, n_layers=layers, layer="mamba2", head_dim=head_dim)
    tokens = torch.randint(0, VOCABULARY, (batch, length))

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    return step


def forward_backward(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Step:
    """One forward and one backward pass through a function; the step returns the gradients of all its tensors."""
    tensors = [tensor.requires_grad_() for tensor in tensors]
    device = tensors[0].device.type
    grad = torch.randn(function(*tensors).shape, generator=torch.Generator().manual_seed(2)).to(device)

    def step() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(function(*tensors), tensors, grad)
        _finish(device)
        return gradients

    return step


def lti_tensors(n: int, width: int, batch: int, length: int, device: str = "cpu") -> list[Tensor]:
    """Arguments of `lti_scan`: an LRU's system at initialisation."""
    torch.manual_seed(0)
    layer = LRU(width, n, r_min=0.9, r_max=0.999)
    return [tensor.detach().to(device) for tensor in (torch.randn(batch, length, width), *layer.system())]


def lti(n: int, width: int, batch: int, length: int, device: str = "cpu") -> Step:
    """`lti_scan` alone, with the engine it chooses."""
    return forward_backward(lti_scan, lti_tensors(n, width, batch, length, device))


def siso_tensors(n: int, d: int, batch: int, length: int, device: str = "cpu") -> list[Tensor]:
    """Arguments of `siso_scan`: ``d`` channels of an S4D layer at initialisation."""
    torch.manual_seed(0)
    layer = S4D(d, n)
    return [tensor.detach().to(device) for tensor in (torch.randn(batch, length, d), *layer.sampled())]


def siso(n: int, d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """`siso_scan` alone, with the engine it chooses."""
    return forward_backward(siso_scan, siso_tensors(n, d, batch, length, device))


def convolution_tensors(d: int, batch: int, length: int, device: str = "cpu") -> list[Tensor]:
    """Sequences ``(batch, length, d)`` and a decaying filter as long as they are, ``(length, d)``."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, d, generator=generator)
    taps = torch.randn(length, d, generator=generator) * torch.exp(-torch.arange(length) / 100)[:, None]
    return [u.to(device), taps.to(device)]


class Taps(Convolution):
    """The convolution of S4 and Hyena with a filter that is given, and without a skip."""

    def __init__(self, taps: Tensor) -> None:
        super().__init__(taps.shape[1], taps.shape[0])
        self.taps, self.D = taps, nn.Parameter(torch.zeros(taps.shape[1], device=taps.device))

    def filter(self, length: int) -> Tensor:
        return self.taps[:length]


def convolution(d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """A long convolution alone, as S4 and Hyena run it."""
    return forward_backward(lambda u, taps: Taps(taps)(u), convolution_tensors(d, batch, length, device))


def selective_tensors(n: int, d: int, batch: int, length: int, device: str = "cpu") -> list[Tensor]:
    """Arguments of `selective_scan` as Mamba has them at initialisation: A = -1..-n, steps from 0.001 to 0.1."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, d, generator=generator)
    delta = 10 ** (2 * torch.rand(batch, length, d, generator=generator) - 3)
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    B, C = torch.randn(2, batch, length, n, generator=generator)
    return [tensor.to(device) for tensor in (u, delta, A, B.contiguous(), C.contiguous())]


def selective(n: int, d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """`selective_scan` alone, with the engine it chooses."""
    return forward_backward(selective_scan, selective_tensors(n, d, batch, length, device))


def ssd_tensors(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> list[Tensor]:
    """``x, delta, A, B, C`` as in Mamba-2: one group, A = -1..-heads, steps from 0.001 to 0.1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, heads, p, generator=generator)
    delta = 10 ** (2 * torch.rand(batch, length, heads, generator=generator) - 3)
    A = -torch.arange(1.0, heads + 1)
    B, C = torch.randn(2, batch, length, 1, n, generator=generator)
    return [tensor.to(device) for tensor in (x, delta, A, B.contiguous(), C.contiguous())]


def ssd_of_mamba2(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd_scan` on Mamba-2's terms: decay ``exp(delta A)``, input ``delta x``."""
    return ssd_scan(x, delta * A, B, C, delta=delta)


def ssd(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> Step:
    """`ssd_scan` alone, with the engine it chooses."""
    return forward_backward(ssd_of_mamba2, ssd_tensors(n, heads, p, batch, length, device))


def gla_tensors(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> list[Tensor]:
    """Arguments of `gla_scan` as the layer has them at initialisation: decays ``sigmoid(normal)^(1/16)``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, heads, p, generator=generator)
    gates, B, C = torch.randn(3, batch, length, heads, n, generator=generator)
    return [tensor.to(device) for tensor in (x, F.logsigmoid(gates) / 16, B.contiguous(), C.contiguous())]


def gla(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> Step:
    """`gla_scan` alone, with the engine it chooses."""
    return forward_backward(gla_scan, gla_tensors(n, heads, p, batch, length, device))


def delta_tensors(
    n: int, heads: int, p: int, batch: int, length: int, gated: bool, device: str = "cpu"
) -> list[Tensor]:
    """``v, beta, k, q`` and, if ``gated``, ``log_decay``: keys of norm 1, beta in (0, 1), decays exp(-0.1) to 1."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(batch, length, heads, p, generator=generator)
    beta = torch.randn(batch, length, heads, generator=generator).sigmoid()
    k, q = torch.randn(2, batch, length, heads, n, generator=generator)
    log_decay = -0.1 * torch.rand(batch, length, heads, generator=generator)
    tensors = [v, beta, F.normalize(k, dim=-1), q.contiguous()]
    return [tensor.to(device) for tensor in (*tensors, *([log_decay] if gated else []))]


def delta_rule(
    v: Tensor, beta: Tensor, k: Tensor, q: Tensor, log_decay: Tensor | None = None, engine: DeltaEngine = "auto"
) -> Tensor:
    """`delta_scan` on `delta_tensors`; a decay of 1 where there is none."""
    return delta_scan(v, torch.zeros_like(beta) if log_decay is None else log_decay, beta, k, q, engine=engine)


def delta(n: int, heads: int, p: int, batch: int, length: int, gated: bool, device: str = "cpu") -> Step:
    """`delta_scan` alone, with the engine it chooses."""
    return forward_backward(delta_rule, delta_tensors(n, heads, p, batch, length, gated, device))


def lru_layer(n: int, width: int) -> LRU:
    """The layer of the reduction rows, the same in every process."""
    torch.manual_seed(0)
    return LRU(width, n, r_min=0.9, r_max=0.999)


def reduction(n: int, width: int, states: int) -> Step:
    """`plan_reduction` of one layer: Hankel singular values, truncation, modes, certificate."""
    layer = lru_layer(n, width)

    def step() -> None:
        plan = plan_reduction(layer, RankRule(states=states, min_reduction=0.0))
        assert plan.report.cut, str(plan.report)

    return step


def training_run(n: int, width: int, steps: int, cut_to: int | None = None) -> Step:
    """A whole `compressm train` run on the embedded digits; with ``cut_to`` it is cut in its first tenth."""
    from compressm.lab.config import parse_config
    from compressm.lab.runs.loop import train

    def step() -> None:
        with tempfile.TemporaryDirectory(prefix="compressm-bench-") as folder:
            config = {
                "data": {"name": "digits"},
                "model": {"d_model": width, "d_state": n, "r_min": 0.9},
                "optimizer": {"name": "adamw", "lr": 4e-3, "weight_decay": 0.01},
                "schedule": {"name": "cosine"},
                "compression": {"enabled": False} if cut_to is None else {"states": cut_to},
                "run": {
                    "steps": steps,
                    "eval_every": steps,
                    "checkpoint_every": 0,
                    "threads": torch.get_num_threads(),
                    "tensorboard": False,
                    "device": "cpu",
                    "output": str(Path(folder) / "run"),
                },
            }
            train(parse_config(config), quiet=True)

    return step


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
