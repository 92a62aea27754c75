"""S4D layers: one system per channel, reduced exactly. The discretised systems are cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compressm.adapters.changes import LayerChange
from compressm.adapters.diagonal import DiagonalAdapter, PerState, phases, pullback_of_C, scaled
from compressm.adapters.s5 import hold
from compressm.layers.s4d import S4D
from compressm.theory.balancing import Reduction
from compressm.theory.systems import DiagonalSystem, decay_rate


class S4DAdapter(DiagonalAdapter):
    """Reads the discretised system of every channel of an `S4D`, and writes the reduced ones as continuous ones that
    discretise to them.

    All channels keep the same number of states, the largest that any of them needs. A channel that needs fewer gets
    states whose output vector is zero. Input vectors are ones, which fixes the scale and phase of every mode, so ``C``
    holds the whole residue. The channels keep their time steps.
    """

    layer_type = S4D
    per_state = ("log_decay", "frequency")
    B_names = ()

    @property
    def axes(self) -> dict[str, int]:
        return dict.fromkeys((*self.per_state, *self.C_names), 1)

    def read(self, values: Mapping[str, Tensor]) -> DiagonalSystem:
        v = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
        gain, z = hold(v["log_decay"], v["frequency"], v["log_step"][:, None])
        C = 2 * gain * torch.complex(v["C_re"], v["C_im"])
        return DiagonalSystem(z.exp(), torch.ones_like(z)[..., None], C[:, None])

    def plan(self, values: Mapping[str, Tensor], reduction: Reduction) -> LayerChange:
        v = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
        log_step, system = v["log_step"][:, None], reduction.system
        old_gain, z = hold(v["log_decay"], v["frequency"], log_step)
        b = system.B[..., 0]
        used = b.abs() > 0
        b = torch.where(used, b, 1.0)
        # An added state needs a mode that can be trained. It gets that of the slowest old state instead of zero.
        lam = torch.where(used, system.lam, z.exp().abs().amax(1, keepdim=True).to(b))
        decay = decay_rate(lam) / log_step.exp()
        frequency = phases(lam) / log_step.exp()
        gain, _ = hold(decay.log(), frequency, log_step)
        C = torch.where(used, system.C[:, 0] * b, 0.0) / (2 * gain)
        # The layer's states are the reduction's divided by b, and its C does not include the gain.
        left = scaled(gain / b, scaled(1 / old_gain.conj(), reduction.left.mT).mT)
        steps = log_step.exp()
        per_state = (
            PerState("log_decay", decay.log(), z.real.abs(), decay * steps),
            PerState("frequency", frequency, steps, steps, phase=True),
        )
        return LayerChange(
            (
                *self.eigenvalue_parts(values, reduction, per_state),
                self.part(values, self.C_names, (C.real, C.imag), pullback_of_C(replace(reduction, left=left))),
            ),
            {},
        )
