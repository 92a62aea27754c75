"""What every adapter must do. A test of a new family subclasses `AdapterSuite` and supplies the layer and its input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values, write
from compressm.cutting import compress
from compressm.theory.balancing import balance, truncate


class AdapterSuite:
    phase_floor = 0.0  # what a parametrisation that cannot hold a real eigenvalue adds to a relative error

    def layer(self, seed: int) -> nn.Module:
        raise NotImplementedError

    def input(self, seed: int) -> Tensor:
        raise NotImplementedError

    def adapter_of(self, layer: nn.Module):
        return next(iter(find_layers(layer).values()))[1]

    def kernel(self, layer: nn.Module, length: int) -> Tensor:
        """Impulse response of the system that the adapter reads, ``(length, d_model, d_model)``."""
        return self.adapter_of(layer).read(layer_values(layer)).kernel(length)

    def test_reads_the_system_that_the_layer_computes(self) -> None:
        layer = self.layer(0).double()
        u = self.input(0).double()
        kernel = self.kernel(layer, u.shape[1])
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
        assert (reduction.system.minus(again).h2_norm() <= 1e-7 * reduction.system.h2_norm()).all()

    def test_at_full_rank_the_outputs_are_the_same(self) -> None:
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            layer, u = self.layer(7).to(dtype), self.input(7).to(dtype)
            adapter = self.adapter_of(layer)
            with torch.no_grad():
                before = layer(u)
                full = truncate(balance(adapter.read(layer_values(layer))), adapter.state_dim(layer), exceed=True)
                write(layer, adapter.plan(layer_values(layer), full))
                assert (layer(u) - before).norm() <= max(tolerance, self.phase_floor) * before.norm()

    def test_at_half_rank_the_error_is_within_its_bound(self) -> None:
        layer, u = self.layer(8).double(), self.input(8).double()
        adapter = self.adapter_of(layer)
        with torch.no_grad():
            before = layer(u)
            half = truncate(balance(adapter.read(layer_values(layer))), adapter.state_dim(layer) // 2)
            write(layer, adapter.plan(layer_values(layer), half))
            assert half.certificate.valid
            error = (layer(u) - before).norm()
        assert 0 < error <= max(c.bound for c in half.certificates) * u.norm()

    @pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
    def test_after_a_cut_of_a_trained_layer_the_next_steps_move_every_tensor(self, make: Any) -> None:
        layer, u = self.layer(9), self.input(9)
        optimizer = make(layer.parameters(), lr=1e-3, **({} if make is torch.optim.Adam else {"momentum": 0.9}))
        target = torch.randn_like(u)

        def step() -> float:
            optimizer.zero_grad()
            loss = (layer(u) - target).square().mean()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        losses = [step() for _ in range(5)]
        assert compress(layer, states=self.adapter_of(layer).state_dim(layer) // 2, optimizer=optimizer).cut
        before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        losses += [step() for _ in range(5)]
        for name, parameter in layer.named_parameters():
            assert (parameter != before[name]).any(), name
        assert losses[-1] < losses[0]

    def test_after_a_cut_step_by_step_is_the_sequence(self) -> None:
        layer, u = self.layer(10).double(), self.input(10).double()
        compress(layer, states=7)
        state, outputs = layer.initial_state(u.shape[0]), []  # type: ignore[operator]
        for now in u.unbind(1):
            y, state = layer.step(now, state)  # type: ignore[operator]
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), layer(u), atol=1e-10, rtol=1e-10)

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
            before = torch.cat([old[name] for name in part.names], part.axis).movedim(part.axis, -1)
            after = torch.cat([layer.get_parameter(name).grad for name in part.names], part.axis)  # type: ignore[misc]
            pullback = part.pullback if part.pullback.ndim > 2 else part.pullback.expand(*before.shape[:-1], -1, -1)
            after, expected = after.movedim(part.axis, -1), (pullback @ before[..., None])[..., 0]
            # A state read off a real eigenvalue has an imaginary half that no pullback reaches.
            used = pullback.abs().amax(-1) > 0
            assert used.sum() > 0.8 * used.numel()
            torch.testing.assert_close(after[used], expected[used])
