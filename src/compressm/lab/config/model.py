"""The section ``model`` of a configuration, with the options that each layer has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compressm.lab.config.section import Section

Layer = Literal[
    "lru",
    "s5",
    "s4d",
    "mamba",
    "mamba2",
    "mamba3",
    "linear_attention",
    "gated_linear_attention",
    "delta_net",
    "rg_lru",
]

# Which options each layer has; the defaults are the layer's own.
_LAYER_OPTIONS = {
    "lru": ("r_min", "r_max", "max_phase"),
    "s5": ("dt_min", "dt_max", "bidirectional"),
    "s4d": ("dt_min", "dt_max", "init"),
    "mamba": ("expand", "d_conv", "dt_rank"),
    "mamba2": ("expand", "d_conv", "head_dim", "n_groups"),
    "mamba3": ("expand", "head_dim", "n_groups", "rope_fraction", "mimo_rank"),
    "linear_attention": ("expand", "n_heads", "d_conv", "decay"),
    "gated_linear_attention": ("expand", "n_heads", "d_conv", "gate_rank"),
    "delta_net": ("expand", "n_heads", "d_conv", "gated"),
    "rg_lru": ("n_blocks", "d_conv"),
}


class ModelConfig(Section):
    """Arguments of `compressm.layers.SequenceClassifier`; input width and classes come from the data.

    ``build`` names a function of your own instead, ``package.module:function``, that returns a classifier of sequences.
    It gets ``d_input``, ``n_classes`` and ``vocabulary`` of the data if its signature names them. See docs/own.md.

    ``r_min``, ``r_max`` and ``max_phase`` are options of ``layer: lru``; ``dt_min`` and ``dt_max`` of ``s5`` and
    ``s4d``, ``bidirectional`` of ``s5``, ``init`` of ``s4d``; ``expand`` and ``d_conv`` of ``mamba`` and ``mamba2``,
    ``dt_rank`` of ``mamba``, ``head_dim`` and ``n_groups`` of ``mamba2`` and ``mamba3``, ``expand``, ``rope_fraction``
    and ``mimo_rank`` of ``mamba3``; ``n_heads``, ``expand`` and ``d_conv`` of the
    layers with a matrix-valued state, ``decay`` of ``linear_attention``, ``gate_rank`` of ``gated_linear_attention``,
    ``gated`` of ``delta_net``, ``n_blocks`` and ``d_conv`` of ``rg_lru``. ``d_conv`` is the number of taps of the short
    convolution: 4 by default, and in layers with a matrix-valued state 0, for none.
    """

    d_model: int | None = Field(None, ge=1)
    d_state: int | list[int] | None = None
    n_layers: int = Field(1, ge=1)
    layer: Layer = "lru"
    dropout: float = Field(0.1, ge=0, lt=1)
    norm: Literal["batch", "layer", "rms"] | None = None
    r_min: float | None = Field(None, ge=0, lt=1)
    r_max: float | None = Field(None, gt=0, lt=1)
    max_phase: float | None = Field(None, gt=0, le=6.283185307179586)
    dt_min: float | None = Field(None, gt=0)
    dt_max: float | None = Field(None, gt=0)
    bidirectional: bool | None = None
    init: Literal["legs", "lin"] | None = None
    expand: int | None = Field(None, ge=1)
    d_conv: int | None = Field(None, ge=0)
    dt_rank: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    n_groups: int | None = Field(None, ge=1)
    rope_fraction: float | None = Field(None, ge=0.5, le=1)
    mimo_rank: int | None = Field(None, ge=1)
    n_heads: int | None = Field(None, ge=1)
    decay: Literal["none", "fixed", "gated"] | None = None
    gate_rank: int | None = Field(None, ge=1)
    gated: bool | None = None
    n_blocks: int | None = Field(None, ge=1)
    build: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.build is not None:
            if others := sorted(self.model_fields_set - {"build"}):
                raise ValueError(f"model.{others[0]}|is given beside model.build, whose function alone says it")
            return self
        if self.d_model is None or self.d_state is None:
            name = "d_model" if self.d_model is None else "d_state"
            raise ValueError(f"model.{name}|missing; add it to the file, or give model.{name}=<value>, or model.build")
        dims = [self.d_state] if isinstance(self.d_state, int) else self.d_state
        if not dims or min(dims) < 1:
            raise ValueError("model.d_state|must be at least 1, or a list of such numbers")
        if isinstance(self.d_state, list) and len(self.d_state) != self.n_layers:
            raise ValueError(f"model.d_state|must be one number, or n_layers={self.n_layers} of them")
        known = _LAYER_OPTIONS[self.layer]
        for name in sorted({option for options in _LAYER_OPTIONS.values() for option in options}.difference(known)):
            if getattr(self, name) is not None:
                raise ValueError(f"model.{name}|is no option of layer {self.layer}, which has {', '.join(known)}")
        r_min, r_max = self.r_min or 0.0, 0.999 if self.r_max is None else self.r_max
        if r_min >= r_max:
            raise ValueError(f"model.r_min|must be less than r_max={r_max}")
        dt_min, dt_max = self.dt_min or 1e-3, self.dt_max or 0.1
        if dt_min > dt_max:
            raise ValueError(f"model.dt_min|must not exceed dt_max={dt_max}; the layer's own are 0.001 and 0.1")
        matrix_states = ("linear_attention", "gated_linear_attention", "delta_net")
        if self.layer in matrix_states and (self.expand or 1) * self.d_model % (self.n_heads or 4):
            raise ValueError(  # before the data are read
                f"model.n_heads|must divide expand * d_model = {(self.expand or 1) * self.d_model}; it is "
                f"{self.n_heads or 4}"
            )
        if self.d_conv == 1 and self.layer in matrix_states:
            raise ValueError(f"model.d_conv|must be at least 2 taps, or 0 for no convolution, in layer {self.layer}")
        if self.d_conv == 0 and self.layer not in matrix_states:
            raise ValueError(
                f"model.d_conv|must be at least 1 tap in layer {self.layer}; leave it out for the default, 4"
            )
        if self.layer == "mamba3":
            if self.rope_fraction not in (None, 0.5, 1.0):
                raise ValueError(f"model.rope_fraction|must be 0.5 or 1; it is {self.rope_fraction}")
            if odd := [n for n in dims if n % round(2 / (self.rope_fraction or 0.5))]:
                raise ValueError(
                    f"model.d_state|must be a multiple of {round(2 / (self.rope_fraction or 0.5))} in layer mamba3, "
                    f"whose states turn in pairs; it is {odd[0]}"
                )
        if self.layer in ("mamba2", "mamba3"):
            d_inner, head_dim = (self.expand or 2) * self.d_model, self.head_dim or 64
            if d_inner % head_dim or (d_inner // head_dim) % (self.n_groups or 1):
                raise ValueError(
                    f"model.head_dim|must divide expand * d_model = {d_inner} into a multiple of n_groups heads; "
                    f"it is {head_dim}"
                )
        return self


__all__ = ["Layer", "ModelConfig"]
