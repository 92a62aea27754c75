"""The examination of optimizers before training: who is refused and why, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import compressm
from compressm.cutting import examination
from compressm.cutting.carry import check_optimizer
from compressm.errors import UnsupportedOptimizerError
from compressm.layers import SequenceClassifier
from compressm.training.compressor import Compressor
from optimizer_zoo import ALL, Keeps, layer_and_data, of, tensors_of


class SOAP(Keeps):
    """The layout of Vyas et al.'s optimizer: moments in eigenbases, and those bases in lists."""

    def make(self, parameter: nn.Parameter) -> dict[str, Any]:
        zero, eyes = torch.zeros_like(parameter), [torch.eye(n) for n in parameter.shape]
        return {"step": 0, "exp_avg": zero, "exp_avg_sq": zero.clone(), "GG": eyes, "Q": [eye.clone() for eye in eyes]}


class Kron(Keeps):
    """The layout of PSGD with Kronecker factors."""

    def make(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"momentum_buffer": torch.zeros_like(parameter), "Q": [torch.eye(n) for n in parameter.shape]}


class GaLoreAdamW(Keeps):
    """The layout of GaLore: moments of projected gradients, and an object that projects."""

    def make(self, parameter: nn.Parameter) -> dict[str, Any]:
        small = torch.zeros(parameter.shape[0], 2)
        return {"step": 0, "projector": object(), "exp_avg": small, "exp_avg_sq": small.clone()}


class Listed(Keeps):
    """A tensor inside a list, which no look at the entries' own shapes finds."""

    def make(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"parts": [torch.zeros_like(parameter)]}


REFUSED: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "SOAP": (SOAP, r"^SOAP keeps what cannot follow a cut: its second moments live in the eigenbases of .* use AdamW"),
    "Kron": (Kron, r"^Kron keeps what cannot follow a cut: its preconditioners are factors along each axis; use AdamW"),
    "GaLore": (
        GaLoreAdamW,
        r"^GaLoreAdamW keeps what cannot follow a cut: its moments are those of projected gradients",
    ),
    "L-BFGS": (torch.optim.LBFGS, r"^LBFGS keeps what cannot follow a cut: it has one history of all parameters"),
    "unknown": (
        Keeps,
        r"^Keeps keeps 'average' for A_log|x_proj\.weight, and how that changes .* not known: use AdamW",
    ),
    "in a list": (Listed, r"^Listed keeps 'parts' for .*register_optimizer_state"),
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_state_that_no_cut_can_carry_is_refused_at_construction_with_the_remedy(name: str, stepped: bool) -> None:
    layer, u = layer_and_data()
    make, message = REFUSED[name]
    optimizer = make(layer.parameters())
    if stepped:
        layer(u).square().mean().backward()
        optimizer.step(lambda: 1.0)  # type: ignore[arg-type]
    for call in (
        lambda: Compressor(layer, optimizer, 20, states=4),
        lambda: compressm.compress(layer, states=4, data=[u], optimizer=optimizer),
    ):
        with pytest.raises(UnsupportedOptimizerError, match=message):
            call()
    assert layer.d_state == 8


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"])
@pytest.mark.parametrize("carry", ["transform", "reset"])
def test_sharded_state_is_refused_by_name(name: str, carry: Any) -> None:
    layer, _ = layer_and_data()
    kind = type(name, (Keeps,), {}) if name == "ZeroRedundancyOptimizer" else type(name, (), {})
    sharded: Any = kind(layer.parameters()) if issubclass(kind, Optimizer) else kind()
    sharded.optimizer = torch.optim.Adam(layer.parameters())  # both kinds wrap the optimizer of their own shard
    with pytest.raises(UnsupportedOptimizerError, match=rf"^{name} \(ZeRO\) holds a shard .*compress_sharded"):
        Compressor(layer, sharded, 20, states=4, carry=carry)


def test_a_declared_optimizer_works_and_its_subclasses_too() -> None:
    class Mine(Keeps):
        pass

    class MineToo(Mine):
        pass

    compressm.register_optimizer_state(Mine, {"average": "linear"})
    layer, u = layer_and_data()
    optimizer = MineToo(layer.parameters())
    layer(u).square().mean().backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["average"].normal_()
    assert compressm.compress(layer, states=4, data=[u], optimizer=optimizer).cut
    assert all(tensors_of(optimizer, p)["average"].shape == p.shape for p in layer.parameters())
    with pytest.raises(UnsupportedOptimizerError, match=r"^Keeps keeps 'average'"):
        Compressor(layer, Keeps(layer.parameters()), 20, states=2)


def test_names_declare_too() -> None:
    class ByName(Keeps):
        pass

    layer, _ = layer_and_data()
    compressm.register_optimizer_state("ByName", {"average": "linear"})
    Compressor(layer, ByName(layer.parameters()), 20, states=4)


class StepsOnOneShape(Keeps):
    """As optimizers that store a shape at their first step."""

    def make(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"shape": str(tuple(parameter.shape))}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state[parameter] and self.state[parameter]["shape"] != str(tuple(parameter.shape)):
                    raise RuntimeError("a shape has changed")


def test_an_optimizer_whose_next_step_would_fail_is_refused_before_training_begins() -> None:
    layer, _ = layer_and_data()
    with pytest.raises(
        UnsupportedOptimizerError, match=r"^StepsOnOneShape makes no step after a cut \(a shape has .*\); use"
    ):
        Compressor(layer, StepsOnOneShape(layer.parameters()), 20, states=4)


class CountsRows(Keeps):
    """Stores a number that follows from the shape, and would go on with the old one."""

    def make(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"step": 7, "rows": parameter.numel()}


def test_numbers_that_follow_from_the_shape_are_unknown_until_they_are_declared() -> None:
    layer, u = layer_and_data()
    with pytest.raises(UnsupportedOptimizerError, match=r"^CountsRows keeps 'rows' for \S+, and how that changes"):
        Compressor(layer, CountsRows(layer.parameters()), 20, states=4)

    class Declared(CountsRows):
        pass

    compressm.register_optimizer_state(Declared, {"rows": "fresh"})
    optimizer = Declared(layer.parameters())
    layer(u).square().mean().backward()
    optimizer.step()
    assert compressm.compress(layer, states=4, data=[u], optimizer=optimizer).cut
    assert optimizer.state[layer.A_log] == {"step": 7, "rows": layer.A_log.numel()}


def everything(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    states = [copy.deepcopy(dict(optimizer.state[p])) for p in model.parameters() if p in optimizer.state]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [groups, states, [p.detach().clone() for p in model.parameters()], gradients]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("carry", ["transform", "reset"])
@pytest.mark.parametrize("name", [*ALL, "L-BFGS"])
def test_the_examination_leaves_no_trace(name: str, carry: Any, stepped: bool) -> None:
    layer, u = layer_and_data()
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.ndim == 2)  # Muon takes no others
    make = ALL.get(name, of("torch.optim", "LBFGS", max_iter=2))
    optimizer = make([p for p in layer.parameters() if p.requires_grad])
    if optimizer.param_groups[0]["lr"] is not None:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # replaces optimizer.step by a wrapper
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    if stepped:
        layer(u).square().mean().backward()
        optimizer.step(lambda: 1.0)  # type: ignore[arg-type]
    before, made = everything(layer, optimizer), len(calls)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    try:
        check_optimizer(optimizer, {"": layer}, carry)
    except UnsupportedOptimizerError:
        assert name == "L-BFGS" or carry == "reset"
    assert same(before, everything(layer, optimizer))
    assert len(calls) == made
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # noqa: NPY002


def test_one_layer_is_copied_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SequenceClassifier(2, 3, d_model=8, d_state=16, n_layers=6, dropout=0.0, norm="layer", layer="mamba")
    copies: list[int] = []
    twin = examination.twin

    def watched(optimizer: Optimizer, parameters: Any, **options: Any) -> Optimizer:
        copies.append(sum(p.numel() for p in parameters))
        return twin(optimizer, parameters, **options)

    monkeypatch.setattr(examination, "twin", watched)
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 1e-3 / (1 + i)} for i, p in enumerate(model.parameters())])
    Compressor(model, optimizer, 20, states=4)
    layer = model.get_submodule("blocks.0.ssm")
    assert copies == [layer.get_parameter("A_log").numel() + layer.get_parameter("x_proj.weight").numel()]


def test_groups_with_settings_of_their_own_are_examined_each() -> None:
    class Adaptive(Keeps):
        """Keeps an entry of unknown kind where ``lora`` is set."""

        def __init__(self, groups: Any) -> None:
            Optimizer.__init__(self, groups, {"lr": 1e-3, "odd": False})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter].clear()
                    if group["odd"]:
                        self.state[parameter]["basis"] = torch.eye(3)

    model = SequenceClassifier(2, 3, d_model=8, d_state=16, n_layers=3, dropout=0.0, norm="layer", layer="mamba")
    odd = [model.get_parameter("blocks.2.ssm.x_proj.weight")]
    rest = [p for p in model.parameters() if p is not odd[0]]
    with pytest.raises(UnsupportedOptimizerError, match=r"^Adaptive keeps 'basis' for blocks\.2\.ssm\.x_proj\.weight"):
        Compressor(model, Adaptive([{"params": rest}, {"params": odd, "odd": True}]), 20, states=4)
    odd[0].requires_grad_(False)  # a frozen one keeps nothing
    Compressor(model, Adaptive([{"params": rest}, {"params": odd, "odd": True}]), 20, states=4)


def test_state_that_appears_in_mid_training_stops_a_cut_before_anything_is_written() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 3, d_model=6, d_state=8, n_layers=3, dropout=0.0, norm="layer", layer="lru")
    optimizer = torch.optim.AdamW(model.parameters())
    compressor = Compressor(model, optimizer, 20, states=4, cuts=1, window=0.1)
    last = model.get_parameter("blocks.2.ssm.C_im")
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 2)).sum().backward()
        optimizer.step()
        optimizer.state[last]["surprise"] = torch.zeros(3, 3)
        before = everything(model, optimizer)
        if step == 0:
            compressor.step()
    with pytest.raises(UnsupportedOptimizerError, match=r"^AdamW keeps 'surprise' for blocks\.2\.ssm\.C_im"):
        compressor.step()
    assert same(before, everything(model, optimizer))
