"""Optimizers that begin anew with what a cut changed, and several optimizers of one model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import compressm
from compressm.cutting.carry import unwrap_optimizer
from compressm.errors import UnsupportedOptimizerError
from compressm.layers import Mamba2
from compressm.training.compressor import Compressor
from optimizer_zoo import ALL, Keeps, layer_and_data, of


@pytest.mark.parametrize("name", [name for name in ALL if name != "Muon"])
def test_after_a_reset_the_first_step_is_as_long_as_a_new_optimizer_s_or_it_is_refused(name: str) -> None:
    torch.manual_seed(0)
    layer, u = Mamba2(4, 8, head_dim=4), torch.randn(3, 10, 4)
    optimizer = ALL[name](layer.parameters())

    def train(one: nn.Module, by: Optimizer) -> None:
        by.zero_grad()
        one(u).square().mean().backward()
        by.step()

    for _ in range(40):
        train(layer, optimizer)
    counts_together = {"schedule-free AdamW", "schedule-free RAdam", "Prodigy"}
    if name in counts_together:
        with pytest.raises(
            UnsupportedOptimizerError, match=r"counts the steps of all parameters together \('k'.*transform"
        ):
            compressm.compress(layer, states=4, data=[u], optimizer=optimizer, carry="reset")
        return
    assert compressm.compress(layer, states=4, data=[u], optimizer=optimizer, carry="reset").cut
    small = copy.deepcopy(layer)
    fresh = ALL[name](small.parameters())
    before = layer.in_proj.weight.detach().clone()
    train(layer, optimizer)
    train(small, fresh)
    mine, theirs = layer.in_proj.weight.detach() - before, small.in_proj.weight.detach() - before
    assert name == "Adan" or mine.norm() > 0  # whose first step has no length
    if name == "schedule-free SGD":  # averages weigh a step by the number of all steps; the point z begins anew
        torch.testing.assert_close(optimizer.state[layer.in_proj.weight]["z"], fresh.state[small.in_proj.weight]["z"])
    else:
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["schedule-free AdamW", "schedule-free RAdam", "Prodigy"])
def test_carried_over_these_go_on_with_steps_of_the_same_length(name: str) -> None:
    # Begun anew, the first of them were 20 to 60 times too long.
    torch.manual_seed(0)
    layer = Mamba2(4, 8, head_dim=4)
    optimizer = ALL[name](layer.parameters())

    def step() -> float:
        state = optimizer.state[layer.in_proj.weight]
        point = state["z"] if "z" in state else layer.in_proj.weight.detach()
        before = point.clone()
        optimizer.zero_grad()
        (layer(torch.randn(8, 10, 4)) - 1).square().mean().backward()
        optimizer.step()
        return float((point - before).abs().mean())

    lengths = [step() for _ in range(120)]
    assert compressm.compress(layer, states=4, data=[torch.randn(3, 10, 4)], optimizer=optimizer).cut
    after = [step() for _ in range(3)]
    usual = sum(lengths[-10:]) / 10
    assert all(usual / 4 < length < 4 * usual for length in after)


@pytest.mark.parametrize(
    ("name", "key", "neutral"),
    [
        ("schedule-free SGD", "z", lambda p: p),
        ("Rprop", "step_size", lambda p: torch.full_like(p, 1e-2)),
        ("Adagrad", "sum", torch.zeros_like),
    ],
)
def test_neutral_values_are_those_of_a_new_optimizer_not_zero(
    name: str, key: str, neutral: Callable[[Tensor], Tensor]
) -> None:
    layer, u = layer_and_data()
    make = of("torch.optim", "Rprop", lr=1e-2, etas=(1.0 - 1e-9, 1.0 + 1e-9)) if name == "Rprop" else ALL[name]
    optimizer = make(layer.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        layer(u).square().mean().backward()
        optimizer.step()
    compressm.compress(layer, states=4, data=[u], optimizer=optimizer, carry="reset")
    at = layer.A_log.detach().clone()
    optimizer.zero_grad()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[layer.A_log][key], neutral(at))


# Several optimizers.


def muon_and_adam(layer: nn.Module) -> list[Optimizer]:
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW([p for p in layer.parameters() if p.ndim != 2])]


def test_several_optimizers_are_carried_together() -> None:
    torch.manual_seed(0)
    layer, u = Mamba2(4, 8, head_dim=4), torch.randn(3, 10, 4)
    muon, adam = optimizers = muon_and_adam(layer)
    compressor = Compressor(layer, optimizers, 20, states=3, cuts=1, window=0.1)
    events = []
    for _ in range(5):
        layer.zero_grad()
        layer(u).square().mean().backward()
        muon.step()
        adam.step()
        events.append(compressor.step())
    assert [event.kind for event in events if event] == ["cut"]
    assert muon.state[layer.in_proj.weight]["momentum_buffer"].shape == layer.in_proj.weight.shape
    assert adam.state[layer.conv1d.weight]["exp_avg"].shape == layer.conv1d.weight.shape
    assert layer.conv1d.weight.shape[0] == layer.d_inner + 6


@pytest.mark.filterwarnings("ignore:.*no more cuts will be tried")
def test_several_optimizers_go_back_with_a_roll_back() -> None:
    torch.manual_seed(0)
    layer, u = Mamba2(4, 8, head_dim=4), torch.randn(3, 10, 4)
    muon, adam = optimizers = muon_and_adam(layer)
    compressor = Compressor(
        layer, optimizers, 20, states=3, cuts=1, window=0.1, max_drop=0.1, evaluate=lambda one: float(one.d_state == 8),
        check_after=2, on_setback="stop",
    )  # fmt: skip
    kept: list[Tensor] = []
    kinds: list[str] = []
    for step in range(4):
        layer.zero_grad()
        layer(u).square().mean().backward()
        muon.step()
        adam.step()
        if step == 1:  # the cut comes now
            kept = [muon.state[layer.in_proj.weight]["momentum_buffer"], adam.state[layer.conv1d.weight]["exp_avg_sq"]]
            kept = [value.clone() for value in kept]
        kinds += [event.kind] if (event := compressor.step()) else []
    assert kinds == ["cut", "rolled_back"]
    assert torch.equal(muon.state[layer.in_proj.weight]["momentum_buffer"], kept[0])
    assert torch.equal(adam.state[layer.conv1d.weight]["exp_avg_sq"], kept[1])


def test_every_one_of_several_optimizers_is_examined_and_all_parameters_must_be_in_one() -> None:
    layer, _ = layer_and_data()
    others = [p for p in layer.parameters() if p is not layer.A_log]
    with pytest.raises(UnsupportedOptimizerError, match=r"^A_log is a parameter .*pass a list of all optimizers"):
        Compressor(layer, torch.optim.AdamW(others), 20, states=4)
    with pytest.raises(UnsupportedOptimizerError, match=r"^Keeps keeps 'average' for A_log"):
        Compressor(layer, [torch.optim.AdamW(others), Keeps([layer.A_log])], 20, states=4)
    Compressor(layer, (torch.optim.AdamW(others), torch.optim.Adafactor([layer.A_log])), 20, states=4)
    one = torch.optim.SGD(layer.parameters())
    assert unwrap_optimizer([one]) is one
    with pytest.raises(UnsupportedOptimizerError, match=r"^optimizer is an empty list"):
        unwrap_optimizer([])
