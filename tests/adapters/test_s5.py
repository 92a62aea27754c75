from __future__ import annotations

import torch
from suite import AdapterSuite
from torch import Tensor

from compressm.adapters import S5Adapter
from compressm.adapters.base import layer_values, write
from compressm.balancing import balance, truncate
from compressm.layers import S5


def s5(seed: int, d_model: int = 5, d_state: int = 24) -> S5:
    torch.manual_seed(seed)
    layer = S5(d_model, d_state, dt_min=1e-2, dt_max=0.3)
    with torch.no_grad():  # away from the symmetry of the initialisation
        layer.log_decay += 0.5 * torch.randn(d_state)
    return layer


class TestS5(AdapterSuite):
    def layer(self, seed: int) -> S5:
        return s5(seed)

    def input(self, seed: int) -> Tensor:
        return torch.randn(3, 60, 5, generator=torch.Generator().manual_seed(seed))

    def test_new_time_steps_lie_among_the_old_ones(self) -> None:
        layer = self.layer(8)
        low, high = layer.log_step.min().item(), layer.log_step.max().item()
        adapter = S5Adapter()
        write(layer, adapter.plan(layer_values(layer), truncate(balance(adapter.read(layer_values(layer))), 6)))
        assert low - 1e-6 <= layer.log_step.min().item() <= layer.log_step.max().item() <= high + 1e-6
