"""LRU layers: exact, since the layer is a linear time-invariant system."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressm.adapters.base import Adapter, LayerChange, ParameterChange, layer_values
from compressm.balancing import Reduction
from compressm.layers.lru import LRU
from compressm.systems import DiagonalSystem


class LRUAdapter(Adapter):
    """Reads ``lam``, ``gamma B`` and ``C`` of an `LRU`, and writes the reduced system in the same parametrisation.

    The scale of a mode is free, and Adam's steps are relative to it. ``gamma = sqrt(1 - |lam|^2)`` gives every state
    unit variance under white noise, as at initialisation; and the rows of ``B`` all get the same norm, such that the
    sum of these norms stays what it was. Adam moves every entry of ``C`` by about the same step, and the output then
    moves in proportion to the sum of the states' amplitudes: with that sum kept, the smaller layer goes on learning at
    the pace of the larger one. With the norms themselves kept it would slow down as states go.
    """

    layer_type = LRU

    def read(self, values: Mapping[str, Tensor]) -> DiagonalSystem:
        v = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
        gamma = v["gamma_log"].exp()[:, None]
        return DiagonalSystem(
            torch.exp(torch.complex(-v["nu_log"].exp(), v["theta_log"].exp())),
            torch.complex(gamma * v["B_re"], gamma * v["B_im"]),
            torch.complex(v["C_re"], v["C_im"]),
        )

    def plan(self, values: Mapping[str, Tensor], reduction: Reduction) -> LayerChange:
        old_gamma = values["gamma_log"].detach().to("cpu", torch.float64).exp()
        old_B = torch.complex(
            values["B_re"].detach().to("cpu", torch.float64), values["B_im"].detach().to("cpu", torch.float64)
        )
        lam = reduction.system.lam
        nu = -lam.abs().clamp_min(1e-30).log()
        gamma = (-torch.expm1(-2 * nu)).sqrt()
        # A real positive eigenvalue has phase zero, whose logarithm does not exist: 1e-8 rad is zero in float32.
        theta = torch.remainder(lam.angle(), 2 * math.pi).clamp_min(1e-8)
        row_norm = old_B.norm(dim=1).sum() / lam.shape[0]
        norm = reduction.system.B.norm(dim=1)
        scaled = reduction.rescaled(torch.where(norm > 0, row_norm * gamma / norm, 1.0).clamp_min(1e-300))
        B, C = scaled.system.B / gamma[:, None], scaled.system.C

        # B_old = diag(1/gamma_old) right diag(gamma_new) B_new on the kept subspace, and C_old = C_new left, in the
        # stacked coordinates (Re, Im) for B and (Re, -Im) for C.
        gamma_old, gamma_new = torch.cat([old_gamma, old_gamma]), torch.cat([gamma, gamma])
        for_B = (scaled.right / gamma_old[:, None] * gamma_new).T
        r, n = lam.shape[0], old_gamma.shape[0]
        sign_new, sign_old = torch.ones(2 * r, dtype=torch.float64), torch.ones(2 * n, dtype=torch.float64)
        sign_new[r:], sign_old[n:] = -1, -1
        for_C = sign_new[:, None] * scaled.left * sign_old
        # To first order an eigenvalue moves by d lam'_j = sum_i left_ji right_ij d lam_i: the share of old mode i in
        # new mode j, known as its participation factor (Perez-Arriaga, Verghese, Schweppe 1982).
        share = (scaled.left * scaled.right.T).view(2, r, 2, n).sum((0, 2)).abs()
        share = share / share.sum(1, keepdim=True).clamp_min(1e-300)

        def change(names: tuple[str, ...], new: tuple[Tensor, ...], axis: int, pullback: Tensor) -> ParameterChange:
            squared = pullback if axis == 0 and len(names) == 1 else pullback.square()
            cast = tuple(x.to(values[name]) for name, x in zip(names, new, strict=True))
            return ParameterChange(names, cast, axis, pullback, squared)

        return LayerChange(
            parameters=(
                change(("nu_log",), (nu.log(),), 0, share),
                change(("theta_log",), (theta.log(),), 0, share),
                change(("gamma_log",), (gamma.log(),), 0, share),
                change(("B_re", "B_im"), (B.real, B.imag), 0, for_B),
                change(("C_re", "C_im"), (C.real, C.imag), 1, for_C),
            ),
            attributes={},
        )

    def state_dim(self, layer: nn.Module) -> int:
        assert isinstance(layer, LRU)
        return layer.d_state

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        values = layer_values(layer)
        n, changes = values["nu_log"].shape[0], []
        for name, axis in (
            *((k, 0) for k in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im")),
            ("C_re", 1),
            ("C_im", 1),
        ):
            shape = list(values[name].shape)
            shape[axis] = states
            nothing = torch.zeros(states, n, dtype=torch.float64)
            changes.append(ParameterChange((name,), (values[name].new_zeros(shape),), axis, nothing, nothing))
        return LayerChange(tuple(changes), {})
