"""How to choose the states of a selective layer: all methods on the same trained Mamba, right after the cut and later.

    COMPRESSM_DATA=DIRECTORY python benchmarks/selective_methods.py [--seeds 2] [--steps 800] [--after 30] [--out FILE]

A Mamba of two layers (d_model 32, n = 64) learns MNIST as sequences of 196 pixels (2 x 2 pixels averaged); then every
method cuts a copy of it, which goes on training with the carried optimizer. The loss is that on 500 sequences of
validation data; every seed is a process.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import scipy.linalg
import torch
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import ParameterChange, SelectiveAdapter, find_layers
from compressm.adapters.changes import LayerChange, layer_values
from compressm.adapters.mamba import projection_change
from compressm.cutting import Plan, plan_reduction
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import SequenceData, Split, load_data
from compressm.layers import Mamba, SequenceClassifier, parameter_groups
from compressm.layers.activations import causal_conv
from compressm.observing.over_data import gather
from compressm.theory.rank_rule import RankRule
from compressm.theory.recurrence import ErrorEstimate, Moments, SelectiveReduction, Signals, root
from compressm.theory.selection import compensation

RANKS = (32, 16, 12, 8)
PLAIN = ("hankel", "least_squares", "gramians", "magnitude", "random", "means")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--after", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/selective-methods.json"))
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.seeds, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compare, seed, arguments.steps, arguments.after) for seed in range(arguments.seeds)]
        rows = [one for job in jobs for one in job.result()]
    store(arguments.out, data="MNIST, 196 pixels", steps=arguments.steps, after=arguments.after, rows=rows)
    print(table(rows))


def compare(seed: int, steps: int, after: int) -> list[dict]:
    """All methods and ranks on the model of one seed."""
    torch.set_num_threads(1)
    data = load_data(DataConfig(name="smnist", validation=0.1))
    train, validation = pooled(data, data.train), pooled(data, data.validation)
    torch.manual_seed(seed)
    model = SequenceClassifier(1, 10, d_model=32, d_state=64, n_layers=2, dropout=0.0, layer="mamba")
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-3, 0.01))
    learn(model, optimizer, train, steps, seed)
    before = evaluate(model, validation)
    trained = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    learn(model, optimizer, train, after, 100 + seed)
    rows = [row(seed, "uncut", 64, before, evaluate(model, validation))]
    inputs = train[0][:32]
    moments = gather(trained[0], inputs.split(8), 8)
    second = second_moments(trained[0], inputs[:16])
    for states in RANKS:
        for name, method in methods(moments, second).items():
            torch.manual_seed(seed)
            model = copy.deepcopy(trained[0])
            optimizer = torch.optim.AdamW(parameter_groups(model, 3e-3, 0.01))
            optimizer.load_state_dict(trained[1])
            report = method(model, states).apply(model, optimizer)
            cut = evaluate(model, validation)
            learn(model, optimizer, train, after, 100 + seed)
            errors = [getattr(layer.certificate, "relative_error", None) for layer in report.layers]
            estimates = errors if name in PLAIN else None  # the others' reports are of the default's cut
            rows.append(row(seed, name, states, cut, evaluate(model, validation), estimates))
            print(rows[-1], flush=True)
        surrogate = PaperSurrogate.of(trained[0], moments, states)
        rows.append(row(seed, "per_channel_means", states, evaluate(surrogate, validation)))
        print(rows[-1], flush=True)
    return rows


def row(
    seed: int, method: str, states: int, cut: tuple, later: tuple | None = None, errors: list | None = None
) -> dict:
    return {
        "seed": seed, "method": method, "states": states, "loss": cut[0], "accuracy": cut[1],
        "loss_after": later and later[0], "accuracy_after": later and later[1], "estimates": errors,
    }  # fmt: skip


def pooled(data: SequenceData, split: Split) -> tuple[Tensor, Tensor]:
    x = F.avg_pool2d(split.x.view(-1, 1, 28, 28).float(), 2).view(-1, 196, 1)
    return (x - data.mean) / data.std, split.y


def learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(data[1]), (32,), generator=generator)
        loss = F.cross_entropy(model(data[0][index]), data[1][index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: tuple[Tensor, Tensor], count: int = 500) -> tuple[float, float]:
    logits = torch.cat([model(x) for x in data[0][:count].split(250)])
    labels = data[1][:count]
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).float().mean())


def methods(
    moments: dict[str, Moments], second: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Callable[[nn.Module, int], Plan]]:
    """Every method as a function of model and states that plans the cut."""

    def plain(selection: str) -> Callable[[nn.Module, int], Plan]:
        return lambda model, states: plan_reduction(
            model,
            RankRule(states=states),
            moments=moments,
            selection=selection,  # type: ignore[arg-type]
        )

    def by_layer(change: Callable[..., LayerChange]) -> Callable[[nn.Module, int], Plan]:
        def plan(model: nn.Module, states: int) -> Plan:
            report = plan_reduction(model, RankRule(states=states), moments=moments).report
            layers = {name: layer for name, (layer, _) in find_layers(model).items()}
            return Plan(report, {name: change(layer, *second[name], states) for name, layer in layers.items()})

        return plan

    return {
        **{name: plain(name) for name in PLAIN},
        "pivoted_qr": by_layer(pivoted_qr),
        "rediagonalised": by_layer(rediagonalised),
    }


def second_moments(model: nn.Module, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Gramians P and Q in operational time, for inputs that are white in it: ``(S_B)_ij / (a_i + a_j)`` summed over
    channels, likewise ``S_C`` (METHOD 3.1)."""
    captured: dict[str, Signals] = {}

    def hook(name: str, adapter: SelectiveAdapter):
        return lambda layer, args: captured.__setitem__(name, adapter.signals(layer, args[0]))

    handles = [
        layer.register_forward_pre_hook(hook(name, adapter))  # type: ignore[arg-type]
        for name, (layer, adapter) in find_layers(model).items()
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    found = {}
    for name, s in captured.items():
        x, step, a, B, C, gain = (v.double() for v in (s.x, s.step, s.rates, s.B[:, :, 0], s.C[:, :, 0], s.gain))
        weight = (gain**2).mean((0, 1))
        S_B = torch.einsum("btd,btn,btm->dnm", x**2, B, B) / step.sum((0, 1))[:, None, None]
        S_C = torch.einsum("btn,btm->nm", C, C) / (C.shape[0] * C.shape[1])
        pairs = a[:, :, None] + a[:, None, :]
        P = (weight[:, None, None] * S_B / pairs).sum(0)
        found[name] = P, (weight[:, None, None] * S_C / pairs).sum(0)
    return found


def balanced(P: Tensor, Q: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """``T_l`` (r, n) and ``T_r`` (n, r) of balanced truncation."""
    L_P, L_Q = root(P), root(Q)
    U, hsv, Vh = torch.linalg.svd(L_Q.mT @ L_P)
    hsv = hsv[:states]
    half = torch.where(hsv > hsv[0] * 1e-13, hsv.rsqrt(), 0.0)  # what is below is not resolved
    return half[:, None] * (U[:, :states].mT @ L_Q.mT), L_P @ Vh[:states].mT * half


def pivoted_qr(layer: Mamba, P: Tensor, Q: Tensor, states: int) -> LayerChange:
    """METHOD 3.1 (b): the states that best span the dominant balanced subspace, with compensation folded into C."""
    _, T_r = balanced(P, Q, states)
    order = scipy.linalg.qr((Q.diagonal().sqrt()[:, None] * T_r).mT.numpy(), pivoting=True)[2]
    kept = torch.from_numpy(order[:states].copy()).long().sort().values
    into, out = torch.eye(64, dtype=torch.float64)[kept], compensation(P, kept)
    return written(layer, into, out, layer.A_log.detach().double().exp()[:, kept])


def rediagonalised(layer: Mamba, P: Tensor, Q: Tensor, states: int) -> LayerChange:
    """METHOD 3.1 (a): balanced truncation with the rates averaged over channels, diagonalised; a complex pair of
    eigenvalues, which the layer cannot have, becomes twice its real part."""
    T_l, T_r = balanced(P, Q, states)
    a = layer.A_log.detach().double().exp()
    values, vectors = torch.linalg.eig(T_l @ (a.mean(0)[:, None] * T_r))
    upper, real = values.imag > 0, values.imag == 0
    basis = torch.cat([vectors[:, real].real, vectors[:, upper].real, vectors[:, upper].imag], 1)
    rates = torch.cat([values[real].real, values[upper].real, values[upper].real]).clamp_min(1e-3)
    into, out = torch.linalg.solve(basis, T_l), (T_r @ basis).mT
    scale = (into.norm(dim=1) / out.norm(dim=1)).sqrt()[:, None]
    return written(layer, into / scale, out * scale, rates.expand(a.shape[0], -1))


def written(layer: Mamba, into: Tensor, out: Tensor, rates: Tensor) -> LayerChange:
    """What makes the layer compute with ``into B``, ``out C`` and these rates."""
    reduction = SelectiveReduction(into[None], out[None], None, ErrorEstimate(64, len(into), 0.0, 0.0))
    values = layer_values(layer)
    share = into.square() / into.square().sum(1, keepdim=True)
    change = projection_change("x_proj.weight", values["x_proj.weight"], reduction)
    return LayerChange(
        (change, ParameterChange(("A_log",), (rates.log().to(values["A_log"]),), 1, share, share)),
        {"x_proj.out_features": change.values[0].shape[0]},
    )


class PaperSurrogate(nn.Module):
    """The CompreSSM paper's way with Mamba: every channel balanced on its own with the means of B and C, its transforms
    applied to fresh B and C at run time. No stock kernel computes that; this one is slow, and only for evaluation."""

    def __init__(self, layer: Mamba, B: Tensor, C: Tensor, states: int) -> None:
        super().__init__()
        self.layer = layer
        maps = []
        for a in layer.A_log.detach().double().exp():
            pairs = a[:, None] + a
            T_l, T_r = balanced(torch.outer(B, B) / pairs, torch.outer(C, C) / pairs, states)
            values, vectors = torch.linalg.eig(T_l @ (a[:, None] * T_r))
            maps.append((values, torch.linalg.solve(vectors, T_l.to(vectors)), (T_r.to(vectors) @ vectors).mT))
        self.rates, self.into, self.out = (torch.stack(part).to(torch.complex64) for part in zip(*maps, strict=True))

    @classmethod
    def of(cls, model: SequenceClassifier, moments: dict[str, Moments], states: int) -> nn.Module:
        copied = copy.deepcopy(model)
        for index, (m, block) in enumerate(zip(moments.values(), copied.blocks, strict=True)):
            copied.blocks[index].ssm = cls(block.ssm, m.B[0] / m.tokens, m.C[0] / m.tokens, states)  # type: ignore
        return copied

    def forward(self, v: Tensor) -> Tensor:
        layer = self.layer
        adapter = next(iter(find_layers(layer).values()))[1]
        assert isinstance(adapter, SelectiveAdapter)
        signals, (u, z) = adapter.signals(layer, v), layer.in_proj(v).chunk(2, -1)
        u = causal_conv(layer.conv1d, u)
        h, y = torch.zeros(v.shape[0], *self.rates.shape, dtype=torch.complex64), []
        for t in range(v.shape[1]):
            B = torch.einsum("drn,bn->bdr", self.into, signals.B[:, t, 0].to(torch.complex64))
            C = torch.einsum("drn,bn->bdr", self.out, signals.C[:, t, 0].to(torch.complex64))
            h = torch.exp(-signals.step[:, t, :, None] * self.rates) * h + signals.x[:, t, :, None] * B
            y.append((C * h).sum(-1).real)
        return layer.out_proj((torch.stack(y, 1) + layer.D * u) * F.silu(z))


def table(rows: list[dict]) -> str:
    """Mean validation loss over seeds, right after the cut and after further training."""
    names = list(dict.fromkeys(r["method"] for r in rows))
    lines = [f"{'method':20}" + "".join(f"{f'n={states}':>18}" for states in RANKS)]
    for name in names:
        cells = []
        for states in RANKS if name != "uncut" else (64,):
            chosen = [r for r in rows if r["method"] == name and r["states"] == states]
            means = [
                f"{sum(r[key] for r in chosen) / len(chosen):.3f}" if chosen[0][key] is not None else "-"
                for key in ("loss", "loss_after")
            ]
            cells.append(f"{' → '.join(means):>18}")
        lines.append(f"{name:20}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
