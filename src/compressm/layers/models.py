"""Residual blocks and the sequence classifier built from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from compressm.layers.activations import gelu_dropout, glu_residual
from compressm.layers.lru import LRU


class LRUBlock(nn.Module):
    """Norm, LRU, GELU, GLU, with dropout, around a residual connection (Orvieto et al. 2023, figure 1).

        z = GELU(LRU(norm(u)));   v = W1 z;   out = u + dropout(v * sigmoid(W2 z))

    Args:
        d_model: width H.
        d_state: state dimension n.
        dropout: probability of dropping an activation, after the GELU and after the GLU.
        norm: ``"batch"`` (statistics over batch and time, as the CompreSSM paper's models) or ``"layer"``.
        r_min, r_max, max_phase: see `LRU`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        dropout: float = 0.1,
        norm: str = "batch",
        r_min: float = 0.0,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm must be 'batch' or 'layer'; got {norm!r}")
        self.norm = nn.BatchNorm1d(d_model) if norm == "batch" else nn.LayerNorm(d_model)
        self.ssm = LRU(d_model, d_state, r_min, r_max, max_phase)
        self.glu = nn.Linear(d_model, 2 * d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u: Tensor) -> Tensor:
        if isinstance(self.norm, nn.BatchNorm1d):  # noqa: SIM108
            # Batch norm's statistics are those of all batch x time positions: flattening gives it rows without a copy.
            z = self.norm(u.reshape(-1, u.shape[-1])).view_as(u)
        else:
            z = self.norm(u)
        z = gelu_dropout(self.ssm(z), self.dropout.p, self.training)
        return glu_residual(u, self.glu(z), self.dropout.p, self.training)


class SequenceClassifier(nn.Module):
    """Encoder, a stack of `LRUBlock`, mean over time, linear decoder.

    Args:
        d_input: channels of the input sequence.
        n_classes: number of classes.
        d_model: width H.
        d_state: state dimension n of every block, or one number per block.
        n_layers: number of blocks.
        dropout, norm, r_min, r_max, max_phase: see `LRUBlock`.

    Shape:
        input ``(batch, length, d_input)``, real; output logits ``(batch, n_classes)``.
    """

    def __init__(
        self,
        d_input: int,
        n_classes: int,
        d_model: int,
        d_state: int | Sequence[int],
        n_layers: int = 1,
        dropout: float = 0.1,
        norm: str = "batch",
        r_min: float = 0.0,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        dims = [d_state] * n_layers if isinstance(d_state, int) else list(d_state)
        if len(dims) != n_layers:
            raise ValueError(f"d_state lists {len(dims)} state dimensions for n_layers={n_layers} blocks")
        self._arguments = {
            "d_input": d_input,
            "n_classes": n_classes,
            "d_model": d_model,
            "n_layers": n_layers,
            "dropout": dropout,
            "norm": norm,
            "r_min": r_min,
            "r_max": r_max,
            "max_phase": max_phase,
        }
        self.encoder = nn.Linear(d_input, d_model)
        self.blocks = nn.ModuleList(LRUBlock(d_model, n, dropout, norm, r_min, r_max, max_phase) for n in dims)
        self.decoder = nn.Linear(d_model, n_classes)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this model as it is now, with its present state dimensions."""
        return {**self._arguments, "d_state": [block.ssm.d_state for block in self.blocks]}  # type: ignore[union-attr]

    def forward(self, u: Tensor) -> Tensor:
        z = self.encoder(u)
        for block in self.blocks:
            z = block(z)
        return self.decoder(z.mean(1))


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, ssm_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups as SSMs are trained: the recurrence's parameters at a lower rate and without weight decay.

    The parameters ``lam`` (``nu_log``, ``theta_log``), ``B`` and ``gamma`` of every `LRU` form the group ``"ssm"``
    with learning rate ``lr * ssm_lr_factor`` and no decay; biases and norms are not decayed either; everything else is.
    """
    ssm, plain, decayed = [], [], []
    recurrent = {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, LRU) and name in recurrent:
                ssm.append(parameter)
            elif parameter.ndim < 2:
                plain.append(parameter)
            else:
                decayed.append(parameter)
    groups = [
        {"name": "ssm", "params": ssm, "lr": lr * ssm_lr_factor, "weight_decay": 0.0},
        {"name": "no_decay", "params": plain, "lr": lr, "weight_decay": 0.0},
        {"name": "decay", "params": decayed, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


__all__ = ["LRUBlock", "SequenceClassifier", "parameter_groups"]
