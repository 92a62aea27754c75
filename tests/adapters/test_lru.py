from __future__ import annotations

import torch
from suite import AdapterSuite
from torch import Tensor

from compressm.adapters import LRUAdapter
from compressm.adapters.base import layer_values, write
from compressm.balancing import balance, truncate
from compressm.layers import LRU
from helpers import lru


class TestLRU(AdapterSuite):
    def layer(self, seed: int) -> LRU:
        return lru(seed, d_model=5, d_state=24)

    def input(self, seed: int) -> Tensor:
        return torch.randn(3, 60, 5, generator=torch.Generator().manual_seed(seed))

    def test_pullback_is_the_chain_rule(self) -> None:
        # At full order the cut is a pure change of basis, and the layer's function is the same before and after: the
        # gradients with respect to B and C must then be exactly the pulled-back ones.
        layer = self.layer(6).double()
        u = self.input(6).double()
        weight = torch.randn(3, 60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        (layer(u) * weight).sum().backward()
        old = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}  # type: ignore[union-attr]
        adapter = LRUAdapter()
        reduction = truncate(balance(adapter.read(layer_values(layer))), 24, exceed=True)
        change = adapter.plan(layer_values(layer), reduction)
        write(layer, change)
        (layer(u) * weight).sum().backward()
        for part in change.parameters:
            if part.names[0] not in ("B_re", "C_re"):
                continue
            before = torch.cat([old[name] for name in part.names], part.axis)
            after = torch.cat([layer.get_parameter(name).grad for name in part.names], part.axis)  # type: ignore[misc]
            expected = torch.tensordot(part.pullback, before, ([1], [part.axis])).movedim(0, part.axis)
            # A state read off a real eigenvalue has an imaginary half that no pullback reaches.
            used = expected.abs().amax(1 - part.axis) > 0
            torch.testing.assert_close(after.movedim(part.axis, 0)[used], expected.movedim(part.axis, 0)[used])

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
