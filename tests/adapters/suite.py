"""What every adapter must do. A test of a new family subclasses `AdapterSuite` and supplies the layer and its input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.adapters.base import layer_values, write
from compressm.balancing import balance, truncate


class AdapterSuite:
    def layer(self, seed: int) -> nn.Module:
        raise NotImplementedError

    def input(self, seed: int) -> Tensor:
        raise NotImplementedError

    def adapter_of(self, layer: nn.Module):
        return next(iter(find_layers(layer).values()))[1]

    def test_reads_the_system_that_the_layer_computes(self) -> None:
        layer = self.layer(0).double()
        u = self.input(0).double()
        kernel = self.adapter_of(layer).read(layer_values(layer)).kernel(u.shape[1])
        response = torch.zeros_like(u)
        for k in range(u.shape[1]):
            response[:, k:] += torch.einsum("jqp,bp->bjq", kernel[: u.shape[1] - k], u[:, k])
        with torch.no_grad():
            instant = layer.get_parameter("D") * u
            torch.testing.assert_close(layer(u), response + instant)

    @pytest.mark.parametrize("method", ["real", "complex"])
    @pytest.mark.parametrize("share", [0.5, 0.2])
    def test_written_layer_computes_the_reduced_system(self, method: str, share: float) -> None:
        layer = self.layer(1).double()
        adapter = self.adapter_of(layer)
        states = int(share * adapter.state_dim(layer))
        reduction = truncate(balance(adapter.read(layer_values(layer)), method), states)  # type: ignore[arg-type]
        write(layer, adapter.plan(layer_values(layer), reduction))
        assert adapter.state_dim(layer) == reduction.system.n <= states
        again = adapter.read(layer_values(layer))
        # 1e-7: a real eigenvalue is written with a phase of 1e-8.
        assert reduction.system.minus(again).h2_norm() <= 1e-7 * reduction.system.h2_norm()

    def test_planning_writes_nothing(self) -> None:
        layer = self.layer(2)
        before = copy.deepcopy(layer.state_dict())
        adapter = self.adapter_of(layer)
        adapter.plan(layer_values(layer), truncate(balance(adapter.read(layer_values(layer))), 5))
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name])

    def test_writing_keeps_parameters_and_gives_them_gradients_of_their_shape(self) -> None:
        layer = self.layer(3)
        kept = dict(layer.named_parameters())
        u = self.input(3)
        loss = layer(u).square().sum()  # held on to: its graph has accumulators of the old shapes
        loss.backward()
        adapter = self.adapter_of(layer)
        write(layer, adapter.plan(layer_values(layer), truncate(balance(adapter.read(layer_values(layer))), 6)))
        layer(u).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter is kept[name]
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert parameter.is_contiguous()
        assert loss.item() > 0

    def test_resized_layer_takes_the_weights_of_a_cut_one(self) -> None:
        cut, fresh = self.layer(4), self.layer(5)
        adapter = self.adapter_of(cut)
        write(cut, adapter.plan(layer_values(cut), truncate(balance(adapter.read(layer_values(cut))), 7)))
        write(fresh, adapter.resized(fresh, adapter.state_dim(cut)))
        fresh.load_state_dict(cut.state_dict())
        u = self.input(4)
        assert torch.equal(fresh(u), cut(u))

    def test_pullback_is_the_chain_rule(self) -> None:
        # At full order the cut is a pure change of basis, and the layer's function is the same before and after: the
        # gradients with respect to B and C must then be exactly the pulled-back ones.
        layer = self.layer(6).double()
        u = self.input(6).double()
        weight = torch.randn(u.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        (layer(u) * weight).sum().backward()
        old = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}  # type: ignore[union-attr]
        adapter = self.adapter_of(layer)
        reduction = truncate(balance(adapter.read(layer_values(layer))), adapter.state_dim(layer), exceed=True)
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
