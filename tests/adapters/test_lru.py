from __future__ import annotations

import torch
from suite import AdapterSuite
from torch import Tensor

from compressm.adapters import LRUAdapter
from compressm.adapters.changes import layer_values, write
from compressm.layers import LRU
from compressm.theory.balancing import balance, truncate
from helpers import lru


class TestLRU(AdapterSuite):
    def layer(self, seed: int) -> LRU:
        return lru(seed, d_model=5, d_state=24)

    def input(self, seed: int) -> Tensor:
        return torch.randn(3, 60, 5, generator=torch.Generator().manual_seed(seed))

    def test_summed_amplitude_of_the_states_is_kept(self) -> None:
        layer = self.layer(8)
        before = torch.hypot(layer.B_re.norm(dim=1), layer.B_im.norm(dim=1)).sum()
        adapter = LRUAdapter()
        write(layer, adapter.plan(layer_values(layer), truncate(balance(adapter.read(layer_values(layer))), 10)))
        rows = torch.hypot(layer.B_re.norm(dim=1), layer.B_im.norm(dim=1))
        torch.testing.assert_close(rows.sum(), before)
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))
        squared = (-2 * layer.nu_log.exp()).exp()
        torch.testing.assert_close(layer.gamma_log.exp(), (1 - squared).sqrt(), rtol=1e-3, atol=0)
