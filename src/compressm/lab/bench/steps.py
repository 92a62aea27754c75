"""Steps of one token: what generation and control run. Each function returns `TOKENS` of them, so ms are µs per token.

The state goes from token to token, one thread computes, and no gradient is kept. The compiled form is what a user gets
from `torch.export` and PyTorch's own compiler for such graphs, on the same graph that the ONNX file is made of.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.lab.bench.roofline import Work, token
from compressm.lab.bench.worker import Step
from compressm.layers.families import FAMILIES
from compressm.saving.tracing import flatten_state, trace

TOKENS = 1000
WIDTH = 256
# Without those that cannot go step by step, or are another one with a simpler decay.
STEPPED = tuple(name for name in FAMILIES if name not in ("s5-both", "linear-attention", "gated"))


def layer_of(family: str, n: int) -> Any:
    """A layer of a family with ``n`` states and width `WIDTH`, the same in every process, in evaluation mode."""
    torch.manual_seed(0)
    return FAMILIES[family](WIDTH, n).eval().requires_grad_(False)


def first_token(layer: Any, batch: int) -> tuple[Tensor, Any]:
    """The input that is fed again and again, shape ``(batch, WIDTH)``, and the state before it."""
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(1)), layer.initial_state(batch)


def stepped(family: str, n: int, batch: int, compiled: bool = False) -> Step:
    """`TOKENS` steps of a layer, in PyTorch; ``compiled`` ahead of time, by a C++ compiler."""
    torch.set_num_threads(1)
    layer = layer_of(family, n)
    return compiled_tokens(layer, batch) if compiled else eager_tokens(layer, batch)


def eager_tokens(layer: Any, batch: int) -> Step:
    """`TOKENS` calls of the layer's own `step`; the step returns the last output."""
    now, start = first_token(layer, batch)

    @torch.inference_mode()
    def step() -> Tensor:
        state, output = start, now
        for _ in range(TOKENS):
            output, state = layer.step(now, state)
        return output

    return step


def compiled_tokens(layer: Any, batch: int) -> Step:
    """The same after `torch.export` and ahead-of-time compilation."""
    run = compiled_step(layer)
    now, initial = first_token(layer, batch)
    start = list(flatten_state(initial).values())
    return flat_tokens(run, now, start)


def flat_tokens(run: Callable[..., Sequence[Any]], now: Any, start: list[Any]) -> Step:
    """`TOKENS` calls of a function from an input and flat state tensors to an output and the next state tensors."""

    @torch.inference_mode()
    def step() -> Any:
        state, output = start, now
        for _ in range(TOKENS):
            output, *state = run(now, *state)
        return output

    return step


def compiled_step(layer: nn.Module) -> Callable[..., Sequence[Tensor]]:
    """A layer's step as machine code, from the input and the flat tensors of the state to the output and the next ones.

    Values that depend on parameters only are computed while compiling.
    """
    import torch._inductor.config as inductor
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    traced = trace(layer, torch.randn(2, 4, WIDTH), step=True, padded=False)
    with tempfile.TemporaryDirectory(prefix="compressm-bench-") as folder, torch.no_grad():
        with inductor.patch(freezing=True):
            package = aoti_compile_and_package(traced.program, package_path=str(Path(folder) / "step.pt2"))
        return aoti_load_package(package)


@functools.cache
def work(family: str, n: int, batch: int) -> Work:
    """What `TOKENS` steps need at the least."""
    layer = layer_of(family, n)
    state = sum(leaf.numel() for leaf in flatten_state(layer.initial_state(1)).values())
    return TOKENS * token(sum(p.numel() for p in layer.parameters()), state, WIDTH, batch)
