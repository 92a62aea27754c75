from __future__ import annotations

import torch
from suite import AdapterSuite
from torch import Tensor

from compressm.adapters import S4DAdapter
from compressm.adapters.changes import layer_values, write
from compressm.layers import S4D
from compressm.theory.balancing import balance, truncate


class TestS4D(AdapterSuite):
    def layer(self, seed: int) -> S4D:
        torch.manual_seed(seed)
        return S4D(5, 16, dt_min=1e-2)

    def input(self, seed: int) -> Tensor:
        return torch.randn(3, 60, 5, generator=torch.Generator().manual_seed(seed))

    def kernel(self, layer: S4D, length: int) -> Tensor:
        one_each = self.adapter_of(layer).read(layer_values(layer)).kernel(length)  # (channels, length, 1, 1)
        return torch.diag_embed(one_each[..., 0, 0].T)


def test_channels_that_need_fewer_states_get_states_that_do_nothing_and_can_learn() -> None:
    torch.manual_seed(0)
    layer = S4D(3, 8).double()
    with torch.no_grad():
        layer.C_re[0, 2:] = layer.C_im[0, 2:] = 0  # two states
        layer.C_re[1] = layer.C_im[1] = 0  # none
    u = torch.randn(2, 300, 3, dtype=torch.float64)
    before = layer(u)
    adapter = S4DAdapter()
    reduction = truncate(balance(adapter.read(layer_values(layer))), 5)
    write(layer, adapter.plan(layer_values(layer), reduction))
    torch.testing.assert_close(layer(u)[..., :2], before[..., :2], atol=1e-9, rtol=1e-9)
    error = (layer(u) - before)[..., 2].norm()
    assert 0 < error <= reduction.certificates[2].bound * u[..., 2].norm()
    layer(u).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert bool((layer.C_re.grad[0] != 0).all())  # type: ignore[index]
