"""S5 layers, reduced exactly, since the layer is a linear time-invariant system. The discretised system is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compressm.adapters.changes import LayerChange
from compressm.adapters.diagonal import DiagonalAdapter, PerState, participation, phases, row_norm_kept
from compressm.layers.s5 import S5, zero_order_hold
from compressm.theory.balancing import Reduction
from compressm.theory.systems import DiagonalSystem, decay_rate


class S5Adapter(DiagonalAdapter):
    """Reads the discretised system of an `S5`, and writes the reduced one as a continuous one that discretises to it.

    Eigenvalue and time step of a state enter only as their product, so the step is arbitrary. A new state gets the
    geometric mean of the steps of the old states in it, weighted by their shares. Its parameters then learn at the
    rates of those states.
    """

    layer_type = S5
    per_state = ("log_decay", "frequency", "log_step")

    def read(self, values: Mapping[str, Tensor]) -> DiagonalSystem:
        v = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
        gain, z = hold(v["log_decay"], v["frequency"], v["log_step"])
        C = _weight(values) * torch.complex(v["C_re"], v["C_im"])
        return DiagonalSystem(z.exp(), gain[:, None] * torch.complex(v["B_re"], v["B_im"]), C)

    def plan(self, values: Mapping[str, Tensor], reduction: Reduction) -> LayerChange:
        v = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
        lam = reduction.system.lam
        share = participation(reduction)[0]
        made = share.sum(-1) > 0  # a state without a share of old ones learns at their mean rate
        log_step = torch.where(made, share @ v["log_step"], v["log_step"].mean())
        decay = decay_rate(lam) / log_step.exp()
        frequency = phases(lam) / log_step.exp()
        gain, _ = hold(decay.log(), frequency, log_step)
        scaled = row_norm_kept(reduction, torch.complex(v["B_re"], v["B_im"]), gain)
        B, C = scaled.system.B / gain[:, None], scaled.system.C / _weight(values)
        old_gain, old_z = hold(v["log_decay"], v["frequency"], v["log_step"])
        z = lam.log()
        per_state = (
            PerState("log_decay", decay.log(), old_z.real.abs(), z.real.abs()),
            PerState("frequency", frequency, v["log_step"].exp(), log_step.exp(), phase=True),
            PerState("log_step", log_step, old_z.abs(), z.abs()),
        )
        return self.change(values, scaled, per_state, B, C, old_gain, gain)


def _weight(values: Mapping[str, Tensor]) -> float:
    """The factor of C in the system: 2 for the conjugate pair, times the root of 2 if the layer has two directions.

    A layer with two directions adds their outputs. Its error is at most ``|E_1| + |E_2|``, which is at most the root of
    2 times the error of the system with both outputs stacked. With the factor the system's bound holds for the layer.
    """
    both = values["C_re"].shape[0] == 2 * values["D"].shape[0]
    return 2 * math.sqrt(2) if both else 2.0


def hold(log_decay: Tensor, frequency: Tensor, log_step: Tensor) -> tuple[Tensor, Tensor]:
    """`zero_order_hold` as complex numbers: ``(exp(z) - 1) / Lam`` and ``z``."""
    hold_re, hold_im, a, b = zero_order_hold(log_decay, frequency, log_step)
    return torch.complex(hold_re, hold_im), torch.complex(a, b)
