"""Peers from Hugging Face transformers: what Mamba, Mamba-2 and Qwen3-Next run without a CUDA kernel.

The scan rows call the very functions of the mixers' slow path (`mamba_selective_scan`, `mamba2_chunk_scan`, and
Qwen3-Next's `torch_chunk_gated_delta_rule`) on the same tensors as ours, in their layout. The mixer rows run a whole
`MambaMixer` or `Mamba2Mixer` (projections, convolution, scan, gate), forward and backward; for our side that one
function is exchanged for our scan, and all else is theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from compressm.adapters.rebind import rebound_forward
from compressm.integrations.hf_scan import FUSED, enable_fast_scan
from compressm.lab.bench.ours import delta_tensors, forward_backward, selective_tensors, ssd_tensors
from compressm.lab.bench.worker import Step


def _slow(function: Any) -> Any:
    """The plain PyTorch body of a function that transformers may have exchanged for a kernel."""
    return getattr(function, "__wrapped__", function)


MAMBA_SCAN = _slow(modeling_mamba.mamba_selective_scan)
MAMBA2_SCAN = _slow(modeling_mamba2.mamba2_chunk_scan)
DELTA_RULE = _slow(modeling_qwen3_next.torch_chunk_gated_delta_rule)


def selective(n: int, d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """MambaMixer's scan: time last, everything of size (batch, d, length, n) held."""
    u, delta, A, B, C = selective_tensors(n, d, batch, length, device)
    transposed = [u.mT.contiguous(), delta.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous()]
    return forward_backward(MAMBA_SCAN, transposed)


def ssd(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> Step:
    """Mamba2Mixer's scan, in chunks of 256 as configured there."""
    return forward_backward(
        lambda *tensors: MAMBA2_SCAN(*tensors, chunk_size=Mamba2Config().chunk_size),
        ssd_tensors(n, heads, p, batch, length, device),
    )


def delta(n: int, heads: int, p: int, batch: int, length: int, gated: bool, device: str = "cpu") -> Step:
    """The scan of Qwen3-Next's mixer, in chunks of 64; with a decay of 1 where there is none."""

    def theirs(v: Tensor, beta: Tensor, k: Tensor, q: Tensor, log_decay: Tensor | None = None) -> Tensor:
        g = torch.zeros_like(beta) if log_decay is None else log_decay
        return DELTA_RULE(q * n**0.5, k, v, g, beta)[0]  # it divides queries by sqrt(n)

    return forward_backward(theirs, delta_tensors(n, heads, p, batch, length, gated, device))


def mamba_mixer(n: int, d: int, batch: int, length: int, scan: str, device: str = "cpu") -> Step:
    """A MambaMixer of inner width ``d``; ``scan`` is ``"theirs"`` or ``"ours"``."""
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=d // 2, expand=2, state_size=n, num_hidden_layers=1, vocab_size=16)
    mixer = with_scan(modeling_mamba.MambaMixer(config, layer_idx=0), scan)
    return _mixer_step(mixer, d // 2, batch, length, device)


def mamba2_mixer(n: int, heads: int, p: int, batch: int, length: int, scan: str, device: str = "cpu") -> Step:
    """A Mamba2Mixer of ``heads`` heads of width ``p``; ``scan`` is ``"theirs"`` or ``"ours"``."""
    width = heads * p // 2
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=width, expand=2, num_heads=heads, head_dim=p, state_size=n, n_groups=1, num_hidden_layers=1,
        vocab_size=16,
    )  # fmt: skip
    mixer = with_scan(modeling_mamba2.Mamba2Mixer(config, layer_idx=0), scan)
    return _mixer_step(mixer, width, batch, length, device)


def with_scan(mixer: torch.nn.Module, scan: str) -> torch.nn.Module:
    """A mixer on its slow path with its own scan, or as `fast_scan` makes it for users."""
    if scan == "ours":
        enable_fast_scan(mixer)
    else:
        plain = {"mamba_selective_scan": MAMBA_SCAN, "mamba2_chunk_scan": MAMBA2_SCAN}
        mixer.forward = rebound_forward(mixer, {**plain, **FUSED})
    return mixer


def _mixer_step(mixer: torch.nn.Module, width: int, batch: int, length: int, device: str) -> Step:
    mixer = mixer.to(device)
    inputs = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0)).to(device)
    parameters = [parameter for parameter in mixer.parameters() if parameter.requires_grad]

    def outputs(hidden: Tensor, *_: Tensor) -> Tensor:
        return mixer(hidden)

    return forward_backward(outputs, [inputs, *parameters])
