"""The reduction peer: balanced truncation by pyMOR, on the same real system, to the same number of states.

pyMOR solves two dense Lyapunov equations, takes the singular values, and projects. Our time also includes the way back
to diagonal form and the certificate, which pyMOR does not compute.
"""

from __future__ import annotations

import torch
from pymor.core.logger import set_log_levels
from pymor.models.iosys import LTIModel
from pymor.reductors.bt import BTReductor

from compressm.adapters import LRUAdapter
from compressm.adapters.changes import layer_values
from compressm.lab.bench.ours import lru_layer
from compressm.lab.bench.worker import Step


def reduction(n: int, width: int, states: int) -> Step:
    """One LRU layer as a real system of order ``2 n``, cut to order ``2 states``."""
    system = LRUAdapter().read(layer_values(lru_layer(n, width)))
    lam, B, C = system.lam, system.B, system.C
    A_real = torch.cat(
        [torch.cat([lam.real.diag(), -lam.imag.diag()], 1), torch.cat([lam.imag.diag(), lam.real.diag()], 1)]
    )
    B_real, C_real = torch.cat([B.real, B.imag]), torch.cat([C.real, -C.imag], 1)
    set_log_levels({"pymor": "ERROR"})

    def step() -> None:
        model = LTIModel.from_matrices(A_real.numpy(), B_real.numpy(), C_real.numpy(), sampling_time=1)
        BTReductor(model).reduce(2 * states)

    return step
