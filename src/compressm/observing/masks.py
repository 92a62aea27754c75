"""Gradients of the loss with respect to a map on the states of selective and matrix-valued layers.

Write ``y_t = C_t^T M h_t`` in place of ``C_t^T h_t``, with M the identity. A reduction ``h' = into h, C' = out C``
replaces M by ``out^T into``. Removing states sets entries of its diagonal, the *mask*, to zero.

The layer is run again on its input, with one M for every sequence, and the gradient at its output is pulled back to M.
This costs one extra forward and backward pass of the layer alone. Projections, convolutions, norms and gates are the
layer's own code.

M is inserted where a cut changes a layer: at the output vectors ``C_t`` of S6 and SSD and at the queries of linear
attention; for the delta rule at keys and queries, which are then scaled to norm 1 again. The states of Griffin's block
are the channels that reach its gates and its recurrence; there only the diagonal of M has a meaning. In Mamba-3 one M
acts on the queries of all heads before they are rotated; of its diagonal the sums over pairs of states have a meaning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import LayerAdapter
from compressm.adapters.rebind import called_function, global_names, not_fused, rebound_forward
from compressm.layers import DeltaNet, Mamba, Mamba2, Mamba3, RecurrentBlock
from compressm.layers.linear_attention import MatrixStateLayer
from compressm.layers.packing import starts_of

Forward = Callable[..., Any]

# Scans by their global names in the layers' forwards, with the position of C among their arguments, and whether time
# is the last axis of C.
_SCANS = {
    "selective_scan": (4, False),
    "ssd_scan": (3, False),
    "mamba_selective_scan": (4, True),
    "mamba2_chunk_scan": (4, False),
}
# The delta rule's kernels, by their global names, whose first arguments are queries and keys before their norm.
_DELTA_RULES = frozenset(
    {
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
    }
)
_FUSED = {"mamba_inner_fn": not_fused, "mamba2_split_conv1d_scan_combined": not_fused}


def masked_forward(layer: nn.Module, mask: Tensor) -> Forward | None:
    """The layer's forward with a map on its states.

    Args:
        layer: of ours, or of transformers.
        mask: M, shape ``(batch, groups, n, n)``, or its diagonal, shape ``(batch, groups, n)``; a batch of one is for
            all sequences.

    Returns:
        a function of the forward's arguments; None for layers of an unsupported kind.
    """
    M = mask
    channels = (M if M.ndim == 3 else M.diagonal(dim1=-2, dim2=-1)).flatten(1)[:, None]
    if isinstance(layer, MatrixStateLayer):
        return lambda u, seq_idx=None: _masked_matrix_state(layer, M, u, seq_idx)
    if isinstance(layer, Mamba3):
        return lambda v, seq_idx=None: _masked_rotating(layer, M, v, seq_idx)
    if isinstance(layer, RecurrentBlock):
        return rebound_forward(layer, {"short_conv": _times(called_function(layer, "short_conv"), channels)})
    if hasattr(layer, "rg_lru"):  # RecurrentGemma's
        return lambda *args, **kwargs: _with_masked_input(layer, channels, args, kwargs)
    names = global_names(layer) & (_SCANS.keys() | _DELTA_RULES)
    if not names or not (isinstance(layer, Mamba | Mamba2) or type(layer).__module__.startswith("transformers.")):
        return None
    functions = {name: _masked(called_function(layer, name), M, name) for name in names}
    return rebound_forward(layer, {**functions, **_FUSED})


def groups_of(layer: nn.Module) -> int:
    """Number of groups of states with vectors of their own: heads, groups of heads, or blocks of gates."""
    module: Any = layer
    if hasattr(module, "rg_lru"):
        return int(module.rg_lru.input_gate_weight.shape[0])
    if isinstance(layer, MatrixStateLayer):
        return layer.n_heads
    if isinstance(layer, Mamba3):
        return 1  # all heads keep the same states
    if hasattr(module, "x_proj_weight"):  # Zamba's
        return int(module.n_mamba_heads)
    return int(getattr(module, "num_k_heads", getattr(module, "n_groups", 1)))


def can_be_masked(layer: nn.Module) -> bool:
    """Whether `mask_gradients` supports this kind of layer."""
    return masked_forward(layer, torch.ones(1, 1, 1)) is not None


def mask_gradients(
    layer: nn.Module,
    adapter: LayerAdapter,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grad_output: Tensor,
) -> Tensor:
    """``d loss / d M`` of every sequence, at the identity.

    Args:
        layer, adapter: a layer that `can_be_masked`.
        args, kwargs: arguments of its call, with sequences in the first dimension of every tensor.
        grad_output: gradient of the loss at its output, shape ``(batch, length, d_model)``.

    Returns:
        shape ``(batch, groups, n, n)``, of the dtype of the layer's parameters, at least float32.
    """
    dtype = torch.promote_types(next(layer.parameters()).dtype, torch.float32)
    shape = grad_output.shape[0], groups_of(layer), adapter.state_dim(layer)
    with torch.enable_grad():
        mask = grad_output.new_ones(shape, dtype=dtype).diag_embed().requires_grad_()
        forward = masked_forward(layer, mask)
        assert forward is not None
        output = forward(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        (gradient,) = torch.autograd.grad(output, mask, grad_output.to(output.dtype))
    return gradient


def _masked(function: Forward, M: Tensor, name: str) -> Forward:
    """One of the functions that a layer's forward calls, with M on its states."""
    if name in _DELTA_RULES:
        return _masked_delta_rule(function, M)
    by_group = [_masked_scan(function, part, *_SCANS[name]) for part in M.split(1, 1)]
    if name != "mamba_selective_scan" or len(by_group) == 1:
        return _masked_scan(function, M, *_SCANS[name])
    groups = itertools.cycle(by_group)  # Zamba scans one head after the other
    return lambda *args, **kwargs: next(groups)(*args, **kwargs)


def _masked_delta_rule(rule: Forward, M: Tensor) -> Forward:
    """A delta rule with ``M^T q`` in place of q, and ``M k`` in place of k; it scales both to norm 1 itself."""

    def masked(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        return rule(_mapped(query, M), _mapped(key, _transposed(M)), *args, **kwargs)

    return masked


def _masked_scan(scan: Forward, M: Tensor, place: int, time_last: bool) -> Forward:
    """A scan with ``M^T C`` in place of C."""

    def masked(*args: Any, **kwargs: Any) -> Any:
        C: Tensor = args[place] if len(args) > place else kwargs["C"]
        if C.ndim == 4:
            C = _mapped(C, M)
        else:
            C = _mapped((C.mT if time_last else C)[:, :, None], M)[:, :, 0]
            C = C.mT if time_last else C
        if len(args) > place:
            return scan(*args[:place], C, *args[place + 1 :], **kwargs)
        return scan(*args, **{**kwargs, "C": C})

    return masked


def _mapped(C: Tensor, M: Tensor) -> Tensor:
    """``M^T C_t``, for vectors of shape ``(batch, length, groups, n)``; M or its diagonal."""
    if M.ndim == 3:
        return C * M[:, None].to(C.dtype)
    return torch.einsum("blgi,bgij->blgj", C, M.to(C.dtype))


def _transposed(M: Tensor) -> Tensor:
    return M if M.ndim == 3 else M.mT


def _masked_matrix_state(layer: MatrixStateLayer, M: Tensor, u: Tensor, seq_idx: Tensor | None) -> Tensor:
    starts = starts_of(seq_idx)
    *terms, k, q = layer.recurrence(u, starts)
    q = _mapped(q, M)
    if isinstance(layer, DeltaNet):
        k, q = F.normalize(_mapped(k, _transposed(M)), dim=-1), F.normalize(q, dim=-1)
    return layer.read_out(layer.scan(*terms, k, q, starts=starts), u)


def _masked_rotating(layer: Mamba3, M: Tensor, v: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Mamba-3 with ``M^T q``, the same M in all heads, before queries are rotated."""
    t = layer.terms(v)
    queries = _mapped(t.queries.flatten(2, 3), M).view_as(t.queries)
    return layer.run(replace(t, queries=queries), starts_of(seq_idx))


def _times(function: Forward, factor: Tensor) -> Forward:
    """The function with its result multiplied by ``factor``."""

    def multiplied(*args: Any) -> Tensor:
        result: Tensor = function(*args)
        return result * factor.to(result.dtype)

    return multiplied


def _with_masked_input(layer: nn.Module, factor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run RecurrentGemma's block with the input of its recurrence multiplied by ``factor``."""
    module: Any = layer

    def multiply(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * factor.to(inputs[0].dtype), *inputs[1:])

    cached = module.conv1d_state, module.rg_lru.recurrent_states
    hook = module.rg_lru.register_forward_pre_hook(multiply)
    try:
        return type(layer).forward(layer, *args, **{**kwargs, "use_cache": False})
    finally:
        hook.remove()
        module.conv1d_state, module.rg_lru.recurrent_states = cached


__all__ = ["can_be_masked", "groups_of", "mask_gradients", "masked_forward"]
