"""Peers from the package flash-linear-attention: its plain implementations, which run without a GPU.

The package imports Triton, which has to be installed, though nothing here is compiled with it. All its functions divide
queries by ``sqrt(n)``; ours do not, so the queries are multiplied by it first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compressm.lab.bench.ours import delta_tensors, forward_backward, gla_tensors
from compressm.lab.bench.worker import Step

try:
    from fla.ops.delta_rule import naive as delta_rule  # pyright: ignore
    from fla.ops.gated_delta_rule import naive as gated_delta_rule  # pyright: ignore
    from fla.ops.gla import naive as gated_linear_attention  # pyright: ignore
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed: pip install flash-linear-attention triton") from error


def gla(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> Step:
    """Their loop over time."""
    run: Any = gated_linear_attention.naive_recurrent_gla

    def theirs(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return run(C * n**0.5, B, x, log_decay)[0]

    return forward_backward(theirs, gla_tensors(n, heads, p, batch, length, device))


def delta(n: int, heads: int, p: int, batch: int, length: int, gated: bool, device: str = "cpu") -> Step:
    """Their plain chunked forms: chunks of 32 without a decay, of 64 with one."""
    plain: Any = delta_rule.delta_rule_chunkwise
    with_decay: Any = gated_delta_rule.naive_chunk_gated_delta_rule

    def theirs(v: Tensor, beta: Tensor, k: Tensor, q: Tensor, log_decay: Tensor | None = None) -> Tensor:
        q = q * n**0.5
        if log_decay is not None:
            return with_decay(q, k, v, log_decay, beta)[0]
        return plain(*(tensor.transpose(1, 2) for tensor in (q, k, v, beta)))[0].transpose(1, 2)

    return forward_backward(theirs, delta_tensors(n, heads, p, batch, length, gated, device))
