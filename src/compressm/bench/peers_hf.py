"""Peers from Hugging Face transformers: the code that Mamba and Mamba-2 run where no CUDA kernel is installed.

The scan rows call the very functions of the mixers' slow path (`mamba_selective_scan`, `mamba2_chunk_scan`) on the same
tensors as ours, in their layout. The mixer rows run a whole `MambaMixer` or `Mamba2Mixer` (projections, convolution,
scan, gate), forward and backward; for our side that one function is exchanged for our scan, and all else is theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from compressm.bench.ours import forward_backward, selective_tensors, ssd_tensors
from compressm.bench.worker import Step
from compressm.scans import selective_scan, ssd_scan


def _slow(function: Any) -> Any:
    """The plain PyTorch body of a function that transformers may have exchanged for a kernel."""
    return getattr(function, "__wrapped__", function)


MAMBA_SCAN = _slow(modeling_mamba.mamba_selective_scan)
MAMBA2_SCAN = _slow(modeling_mamba2.mamba2_chunk_scan)


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


def mamba_mixer(n: int, d: int, batch: int, length: int, scan: str, device: str = "cpu") -> Step:
    """A MambaMixer of inner width ``d``; ``scan`` is ``"theirs"`` or ``"ours"``."""
    module: Any = modeling_mamba
    module.mamba_selective_scan = MAMBA_SCAN if scan == "theirs" else _our_mamba_scan
    module.mamba_inner_fn = _slow(module.mamba_inner_fn)
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=d // 2, expand=2, state_size=n, num_hidden_layers=1, vocab_size=16)
    return _mixer_step(module.MambaMixer(config, layer_idx=0), d // 2, batch, length, device)


def mamba2_mixer(n: int, heads: int, p: int, batch: int, length: int, scan: str, device: str = "cpu") -> Step:
    """A Mamba2Mixer of ``heads`` heads of width ``p``; ``scan`` is ``"theirs"`` or ``"ours"``."""
    module: Any = modeling_mamba2
    module.mamba2_chunk_scan = MAMBA2_SCAN if scan == "theirs" else _our_mamba2_scan
    module.mamba2_split_conv1d_scan_combined = _slow(module.mamba2_split_conv1d_scan_combined)
    width = heads * p // 2
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=width, expand=2, num_heads=heads, head_dim=p, state_size=n, n_groups=1, num_hidden_layers=1,
        vocab_size=16,
    )  # fmt: skip
    return _mixer_step(module.Mamba2Mixer(config, layer_idx=0), width, batch, length, device)


def _mixer_step(mixer: torch.nn.Module, width: int, batch: int, length: int, device: str) -> Step:
    mixer = mixer.to(device)
    inputs = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0)).to(device)
    parameters = [parameter for parameter in mixer.parameters() if parameter.requires_grad]

    def outputs(hidden: Tensor, *_: Tensor) -> Tensor:
        return mixer(hidden)

    return forward_backward(outputs, [inputs, *parameters])


def _our_mamba_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor,
    **_: Any,
) -> Tensor:  # fmt: skip
    delta = F.softplus(dt + delta_bias[:, None])
    y = selective_scan(hidden_states.mT, delta.mT, A, B.mT, C.mT).mT
    return (y + hidden_states * D[:, None]) * F.silu(z)


def _our_mamba2_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    dt_limit: tuple[float, float], **_: Any,
) -> Tensor:  # fmt: skip
    delta = F.softplus(dt + dt_bias).clamp(*dt_limit)
    return ssd_scan(delta[..., None] * hidden_states, delta * A, B, C) + D[:, None] * hidden_states
