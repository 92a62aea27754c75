"""Layers of transformers that carry a state which cannot be cut, each with the reason."""

from __future__ import annotations

from torch import nn

from compressm.adapters.composed import is_kind

_TAPS = (
    "its state is the last inputs of a short convolution; their number is the length of the filter, and there is no "
    "state dimension to cut"
)
_ONE_SIZE = (
    "its class builds keys, values, gates and norm from one number, config.{field}, so that a checkpoint with fewer "
    "key dimensions alone cannot be loaded"
)

REFUSED = {
    "lfm2.modeling_lfm2.Lfm2ShortConv": _TAPS,
    "lfm2_moe.modeling_lfm2_moe.Lfm2MoeShortConv": _TAPS,
    "lfm3.modeling_lfm3.Lfm3ShortConv": _TAPS,
    "inkling.modeling_inkling.InklingShortConvolution": _TAPS,
    "inkling2.modeling_inkling2.Inkling2ShortConvolution": _TAPS,
    "inkling2.modeling_inkling2.Inkling2DynamicShortConvolution": _TAPS,
    "zaya.modeling_zaya.ZayaCCAProjection": (
        "its state is the last inputs of two short convolutions and the values of the last token; there is no state "
        "dimension to cut"
    ),
    "kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention": _ONE_SIZE.format(field="linear_head_dim"),
    "glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention": _ONE_SIZE.format(field="linear_head_dim"),
    "bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention": _ONE_SIZE.format(field="linear_head_dim"),
    "minimax.modeling_minimax.MiniMaxLightningAttention": (
        "its class builds keys and values from one number, config.head_dim, which is also the size of the heads of the "
        "model's softmax attention and of their rotary embedding, so that a smaller state cannot be loaded"
    ),
    "rwkv.modeling_rwkv.RwkvSelfAttention": (
        "RwkvModel allocates the state of every layer by config.hidden_size, whatever config.attention_hidden_size "
        "says, so that a layer with fewer channels cannot generate from its state"
    ),
}


def reason_refused(module: nn.Module) -> str | None:
    """Why the state of a module cannot be cut; None if nothing is known against it."""
    for name, reason in REFUSED.items():
        if is_kind(module, f"transformers.models.{name}"):
            return reason
    return None


__all__ = ["REFUSED", "reason_refused"]
