"""Models of the package ``mamba_ssm`` with Mamba-3 layers, which transformers does not have, for its checkpoints.

Parameters have the names and shapes of ``MambaLMHeadModel``, so that its tensors fit as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import Mamba3Adapter, register
from compressm.layers import Mamba3

_EPS = 1e-5
_MLP_MULTIPLE = 128  # of the width of the MLPs, as the package rounds it up
# Arguments of the package's layer by our names, those with the only value that ours has, and those that do not matter.
OPTIONS = {
    "d_state": "d_state",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "rope_fraction": "rope_fraction",
    "is_outproj_norm": "out_norm",
}
FIXED: dict[str, Any] = {"A_floor": 1e-4}
NO_MATTER = {"chunk_size", "dropout", "dt_init_floor", "dt_max", "dt_min", "fuse_pregate_headwise_norm"}


class Mixer(Mamba3):
    """A Mamba-3 layer of a checkpoint that has one state dimension for all layers."""


class _MixerAdapter(Mamba3Adapter):
    layer_type = Mixer
    uniform = True


register(_MixerAdapter())


class MixerLanguageModel(nn.Module):
    """A language model of blocks of a norm and a mixer, and of a norm and a gated MLP where it has them.

    Args:
        config: the checkpoint's, with ``ssm_cfg``; see `compressm.saving.mamba_ssm_format`.
        vocabulary: rows of its embedding.

    Shape:
        tokens ``(batch, length)`` to logits ``(batch, length, vocabulary)``.
    """

    def __init__(self, config: Mapping[str, Any], vocabulary: int) -> None:
        super().__init__()
        self.backbone = _Backbone(config, vocabulary)
        self.lm_head = nn.Linear(config["d_model"], vocabulary, bias=False)
        self.tied = bool(config.get("tie_embeddings", True))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head share the embedding's weights, where the checkpoint says so."""
        if self.tied:
            self.lm_head.weight = self.backbone.embedding.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of the tokens."""
        return self.backbone.embedding

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.backbone(input_ids))


class _Backbone(nn.Module):
    def __init__(self, config: Mapping[str, Any], vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config["d_model"])
        self.layers = nn.ModuleList(_Block(config) for _ in range(config["n_layer"]))
        self.norm_f = _norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        h: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            h = layer(h)
        return _normed(self.norm_f, h)


class _Block(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.wide = bool(config.get("residual_in_fp32", True))
        self.norm, self.mixer = _norm(config), Mixer(config["d_model"], **_options(config.get("ssm_cfg") or {}))
        if inner := config.get("d_intermediate") or 0:
            self.norm2, self.mlp = _norm(config), _GatedMLP(config["d_model"], inner)

    def forward(self, h: Tensor) -> Tensor:
        residual = h.float() if self.wide else h
        for norm, part in ((self.norm, self.mixer), *([(self.norm2, self.mlp)] if hasattr(self, "mlp") else [])):
            residual = residual + part(_normed(norm, residual))
        return residual


class _GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        inner = -(-inner // _MLP_MULTIPLE) * _MLP_MULTIPLE
        self.fc1 = nn.Linear(width, 2 * inner, bias=False)
        self.fc2 = nn.Linear(inner, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        y, gate = self.fc1(h).chunk(2, -1)
        return self.fc2(y * F.silu(gate))


def _norm(config: Mapping[str, Any]) -> nn.Module:
    kind = nn.RMSNorm if config.get("rms_norm", True) else nn.LayerNorm
    return kind(config["d_model"], eps=_EPS)


def _normed(norm: nn.Module, h: Tensor) -> Tensor:
    weight: Any = norm.weight
    return norm(h.to(weight.dtype))


def _options(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our layer, from those of the package's."""
    rank = layers.get("mimo_rank", 4) if layers.get("is_mimo", False) else 1
    return {"mimo_rank": rank, **{ours: layers[name] for name, ours in OPTIONS.items() if name in layers}}


__all__ = ["FIXED", "NO_MATTER", "OPTIONS", "Mixer", "MixerLanguageModel"]
