"""LRU layers: exact, since the layer is a linear time-invariant system."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compressm.adapters.changes import LayerChange
from compressm.adapters.diagonal import DiagonalAdapter, PerState, phases, row_norm_kept
from compressm.layers.lru import LRU
from compressm.theory.balancing import Reduction
from compressm.theory.systems import DiagonalSystem, decay_rate


class LRUAdapter(DiagonalAdapter):
    """Reads ``lam``, ``gamma B`` and ``C`` of an `LRU`, and writes the reduced system in the same parametrisation.

    The scale of a mode is arbitrary, and Adam's steps are relative to it. ``gamma = sqrt(1 - |lam|^2)`` gives every
    state unit variance under white noise, as at initialisation; for the rows of ``B`` see `row_norm_kept`.
    """

    layer_type = LRU
    per_state = ("nu_log", "theta_log", "gamma_log")

    def read(self, values: Mapping[str, Tensor]) -> DiagonalSystem:
        v = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
        return DiagonalSystem(
            torch.exp(torch.complex(-v["nu_log"].exp(), v["theta_log"].exp())),
            v["gamma_log"].exp()[:, None] * torch.complex(v["B_re"], v["B_im"]),
            torch.complex(v["C_re"], v["C_im"]),
        )

    def plan(self, values: Mapping[str, Tensor], reduction: Reduction) -> LayerChange:
        v = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
        lam = reduction.system.lam
        nu = decay_rate(lam)
        gamma = (-torch.expm1(-2 * nu)).sqrt()
        # The phase is stored as its logarithm: 1e-8 rad is zero in float32.
        theta = torch.remainder(phases(lam), 2 * math.pi).clamp_min(1e-8)
        scaled = row_norm_kept(reduction, torch.complex(v["B_re"], v["B_im"]), gamma)
        B, C = scaled.system.B / gamma[:, None], scaled.system.C
        per_state = (
            PerState("nu_log", nu.log(), v["nu_log"].exp(), nu),
            PerState("theta_log", theta.log(), v["theta_log"].exp(), theta, phase=True),
            PerState("gamma_log", gamma.log(), torch.ones_like(v["nu_log"]), torch.ones_like(nu), order=0),
        )
        return self.change(values, scaled, per_state, B, C, v["gamma_log"].exp(), gamma)
