"""Our scans inside models of Hugging Face transformers, for machines that cannot use their CUDA kernels.

Without these kernels transformers runs a Python loop over all steps (Mamba), or large products per chunk (the others).
On a CPU that is too slow for training. Change

    trainer.train()

to

    with fast_scan(model):
        trainer.train()

Only the layers of this model are changed: each gets an attribute, which is removed at the end of the block. The short
convolution before the scan and the gated norm after it are ours too. Masks, caches and other norms still run
transformers' code. Weights, state dict and checkpoints do not change.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.rebind import global_names, not_fused, rebound_forward
from compressm.errors import UnsupportedModelError
from compressm.layers.activations import silu_conv
from compressm.layers.gated_norm import gated_rms_norm
from compressm.layers.packing import steps_since
from compressm.layers.parts import shifted_products
from compressm.observing.layer_calls import PACKING, sequence_starts
from compressm.scans import delta_scan, selective_scan, ssd_scan


class FastScan:
    """Handle of `enable_fast_scan`.

    Attributes:
        layers: names of the layers that use our scan.
    """

    def __init__(self, layers: list[str], changed: list[nn.Module]) -> None:
        self.layers = tuple(layers)
        self._modules = changed

    def remove(self) -> None:
        """Restore the layers' own scan. May be called twice."""
        for module in self._modules:
            module.__dict__.pop("forward", None)


def enable_fast_scan(model: nn.Module) -> FastScan:
    """Let the Mamba, Mamba-2 and delta rule layers of a Hugging Face model use our scans, until the handle is removed.

    Outputs, gradients and caches are the same up to rounding.

    Args:
        model: any model that contains them (Mamba, FalconMamba, Jamba, Zamba; Mamba-2, Bamba, FalconH1,
            GraniteMoeHybrid, NemotronH, Zamba2; Qwen3-Next, Qwen3.5, OlmoHybrid).

    Raises:
        UnsupportedModelError: the model contains none, or one whose forward has already been replaced.
    """
    names = _slow_layers(model)
    if not names:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer whose forward calls {' or '.join(_SCANS)}: fast_scan is for "
            "the Mamba family and the delta rule of transformers (tested with 5.23; upgrade one that is much older)"
        )
    for name in names:
        if "forward" in model.get_submodule(name).__dict__:
            raise UnsupportedModelError(
                f"the forward of {name} was exchanged already, by fast_scan or by offloading: remove that first"
            )
    changed = list[nn.Module]()
    for name in names:
        layer = model.get_submodule(name)
        selective = "mamba_selective_scan" in global_names(layer)
        convolution = {"causal_conv1d_fn": _convolution_of_mamba if selective else _convolution}
        layer.forward = rebound_forward(layer, _SCANS | convolution | FUSED)
        changed.append(layer)
        for norm, forward in _gated_norms(layer):
            norm.forward = types.MethodType(forward, norm)
            changed.append(norm)
    return FastScan(names, changed)


def can_be_fast(model: nn.Module) -> bool:
    """Whether a model contains a layer that `fast_scan` supports."""
    return bool(_slow_layers(model))


def _slow_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if not global_names(module).isdisjoint(_SCANS)]


@contextmanager
def fast_scan(model: nn.Module) -> Generator[FastScan]:
    """`enable_fast_scan` for the length of a ``with`` block."""
    handle = enable_fast_scan(model)
    try:
        yield handle
    finally:
        handle.remove()


def _selective(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` with the arguments of transformers' ``mamba_selective_scan``: time is the last axis."""
    _refuse_packing(others)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    u = hidden_states.transpose(1, 2)
    y, state = selective_scan(u, dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), return_state=True)
    y = y.transpose(1, 2)
    if D is not None:
        y = y + hidden_states * D[:, None]
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_last_state else y


def _ssd(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_scan` with the arguments of transformers' ``mamba2_chunk_scan``, and float32 inside like that."""
    starts = _starts(hidden_states, others)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit).float()
    x = hidden_states.float()
    start = None if initial_states is None else initial_states.float()
    skip = None if D is None else D.float()
    y, state = ssd_scan(
        x, dt * A.float(), B.float(), C.float(), start, return_state=True, delta=dt, D=skip, starts=starts
    )
    return (y, state) if return_final_states else y


def _convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> Tensor:
    """`silu_conv` with the arguments of transformers' ``causal_conv1d_fn``: time is the last axis."""
    u = hidden_states.to(weight.dtype).transpose(1, 2)
    starts = _starts(u, others)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    if activation in ("silu", "swish"):
        out = silu_conv(u, weight, bias, starts)
    else:
        from transformers.activations import ACT2FN

        out = shifted_products(u, weight.T, bias, None if starts is None else steps_since(starts))
        out = out if activation is None else ACT2FN[activation](out)
    return out.to(hidden_states.dtype).transpose(1, 2)


def _convolution_of_mamba(hidden_states: Tensor, *args: Any, **others: Any) -> Tensor:
    """`_convolution` in front of ``mamba_selective_scan``, to which transformers does not pass the packing on."""
    _refuse_packing(others)
    return _convolution(hidden_states, *args, **others)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """`delta_scan` with the arguments of transformers' ``torch_chunk_gated_delta_rule``, and float32 inside like that.

    There a state is (n, p), keys by values, and queries are divided by sqrt(n)."""
    starts = _starts(value, others)
    q, k, v, share, log_decay = (tensor.float() for tensor in (query, key, value, beta, g))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    heads = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(heads, dim=2) for x in (q * q.shape[-1] ** -0.5, k))
    start = None if initial_state is None else initial_state.float().mT
    y, state = delta_scan(v, log_decay, share, k, q, start, return_state=True, starts=starts)
    return y.to(query.dtype), state.mT.contiguous() if output_final_state else None


def _gated_norms(layer: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """The gated norms of a layer for which there is a forward of ours, and that forward. A norm with another gate is
    left alone, and so is one whose forward was exchanged already, as by offloading."""
    gated = [module for module in layer.children() if type(module).__name__.endswith("RMSNormGated")]
    norms = [norm for norm in gated if "forward" not in norm.__dict__]
    first = [(norm, _gate_before_norm) for norm in norms if hasattr(norm, "group_size")]
    last = [(norm, _gate_after_norm) for norm in norms if getattr(norm, "activation", None) == "silu"]
    return first + last


def _gate_before_norm(norm: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """`gated_rms_norm` as the forward of transformers' ``MambaRMSNormGated`` and its copies."""
    if gate is None:
        return type(norm).forward(norm, hidden_states)
    groups = hidden_states.shape[-1] // norm.group_size
    out = gated_rms_norm(hidden_states, gate, norm.weight, groups, norm.variance_epsilon, gate_last=False)
    return out.to(torch.promote_types(hidden_states.dtype, norm.weight.dtype))


def _gate_after_norm(norm: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """`gated_rms_norm` as the forward of transformers' ``Qwen3NextRMSNormGated`` and its copies."""
    out = gated_rms_norm(hidden_states, gate, norm.weight, 1, norm.variance_epsilon, gate_last=True)
    return out.to(hidden_states.dtype)


def _refuse_packing(arguments: dict[str, Any]) -> None:
    if any(arguments.get(name) is not None for name in PACKING):
        raise UnsupportedModelError(
            "transformers' Mamba does not keep packed sequences apart, since its scan is not told of them: pad them "
            "instead of packing, or use Mamba-2"
        )


def _starts(u: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """Where packed sequences begin in rows of ``u``, shape ``(batch, length, ...)``; None if there is one a row.

    Raises:
        UnsupportedModelError: the arguments describe packed sequences of other rows.
    """
    starts = sequence_starts(u, arguments)
    told = [name for name in PACKING if arguments.get(name) is not None]
    if told and starts is None:
        raise UnsupportedModelError(
            f"fast_scan cannot tell packed sequences apart by {' and '.join(told)} in rows of shape "
            f"{tuple(u.shape[:2])}: pass seq_idx of that shape, or cu_seqlens with a single row, and no cache"
        )
    return starts


_SCANS: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": _selective,
    "mamba2_chunk_scan": _ssd,
    "torch_chunk_gated_delta_rule": _delta_rule,
}
FUSED: dict[str, Callable[..., Any]] = {
    "mamba_inner_fn": not_fused,
    "mamba2_split_conv1d_scan_combined": not_fused,
}
