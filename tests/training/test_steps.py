"""A step is one that changed the weights: every count is compared with the optimizer's own."""

from __future__ import annotations

import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from compressm import Compressor
from compressm.errors import UnsupportedOptimizerError
from compressm.layers import LRU, Mamba, SequenceClassifier
from compressm.observing.moments import NotFiniteWarning
from compressm.training.steps import _watches  # pyright: ignore[reportPrivateUsage]

STEPS = 12


def classifier() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, 2, d_model=4, d_state=16, dropout=0.0, norm="layer", r_min=0.9)


def compressing(model: nn.Module, optimizer: Any) -> Compressor:
    return Compressor(model, optimizer, STEPS, states=4, window=0.5, cuts=2)  # after steps 3 and 6


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    u = torch.randn(count, 20, 1, generator=torch.Generator().manual_seed(1))
    return u, (u.sum((1, 2)) > 0).long()


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Adam's own count of its steps; it does not count what a scaler skips."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def test_accumulated_batches_of_accelerate_are_one_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, inner = classifier(), torch.optim.AdamW
    batches = DataLoader(TensorDataset(*examples(4 * 4 * STEPS)), batch_size=4)
    network, optimizer, batches = accelerator.prepare(model, inner(model.parameters(), lr=1e-2), batches)
    compressor = compressing(network, optimizer)
    seen = []
    for u, y in batches:
        with accelerator.accumulate(network):
            accelerator.backward(F.cross_entropy(network(u), y))
            optimizer.step()
            event = compressor.step()
            optimizer.zero_grad()
        if event is not None:
            seen.append((event.kind, event.step, steps_of(optimizer.optimizer)))
    assert steps_of(optimizer.optimizer) == STEPS
    assert seen == [("cut", 3, 3), ("cut", 6, 6)]
    assert compressor.state_dict()["steps"] == STEPS


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_counted(fused: bool) -> None:
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    compressor = compressing(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    seen, calls = [], 0
    u, y = examples(4)
    while steps_of(optimizer) < STEPS:
        calls += 1
        loss = F.cross_entropy(model(u), y)
        optimizer.zero_grad()
        scaler.scale(loss * (float("inf") if calls in (1, 4, 5, 9) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        event = compressor.step()
        if event is not None:
            seen.append((event.kind, event.step, steps_of(optimizer)))
    assert calls == STEPS + 4
    assert seen == [("cut", 3, 3), ("cut", 6, 6)]


def test_a_batch_that_is_not_finite_and_is_skipped_leaves_no_trace() -> None:
    def run(bad: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        torch.manual_seed(0)
        model = nn.Sequential(Mamba(2, d_state=16), nn.Linear(2, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        compressor = compressing(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        numbers = iter(range(100))
        for call in range(STEPS + len(bad)):
            seed = 999 if call in bad else next(numbers)
            u = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(seed))
            u[0, 3] = float("nan") if call in bad else 0.0
            optimizer.zero_grad()
            scaler.scale(model(u).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            compressor.step()
        assert [event.step for event in compressor.history] == [3, 6]
        return model.state_dict(), compressor.state_dims

    clean, sizes = run(())
    with pytest.warns(NotFiniteWarning, match="the model's input"):
        poisoned, same_sizes = run((0, 3, 4))
    assert sizes == same_sizes == {"0": 4}
    assert all(torch.equal(value, poisoned[name]) for name, value in clean.items())


def test_a_step_that_a_scaler_skips_leaves_no_trace_in_the_gradients_observed() -> None:
    def run(bad: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], int]:
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        compressor = Compressor(model, optimizer, STEPS, states=4, cuts=1, window=0.5, gramians="loss", scaler=scaler)
        numbers = iter(range(100))
        for call in range(STEPS + len(bad)):
            seed = 999 if call in bad else next(numbers)
            u = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(seed))
            loss = F.cross_entropy(model(u), (u.sum((1, 2)) > 0).long())
            optimizer.zero_grad()
            scaler.scale(loss * (float("inf") if call in bad else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            observer = compressor._cutter.observations.observer
            seen = 0 if observer is None else max(map(len, observer.samples().values()), default=0)
            if compressor.step() is not None:
                assert seen == 6  # every step before the cut
        return model.state_dict(), compressor.state_dims["blocks.0.ssm"]

    (clean, size), (skipping, same_size) = run(()), run((0, 2, 3))
    assert size == same_size == 4
    assert all(torch.equal(value, skipping[name]) for name, value in clean.items())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_optimizer_that_took_the_place_of_the_compressors_is_refused(steps_before: int) -> None:
    model, (u, y) = classifier(), examples(4)
    first = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = compressing(model, first)
    second = torch.optim.SGD(model.parameters(), lr=1e-2, fused=steps_before > 0)

    def train(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(u), y).backward()
        optimizer.step()
        compressor.step()

    for _ in range(steps_before):
        train(first)
    with pytest.raises(UnsupportedOptimizerError, match=r"SGD trains parameters .* build a new Compressor with it"):
        train(second)
    assert compressor.state_dims["blocks.0.ssm"] == 16


def test_a_compressor_that_is_called_once_an_epoch_says_so() -> None:
    model, (u, y) = classifier(), examples(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    compressor = compressing(model, optimizer)

    def train(steps: int) -> None:
        F.cross_entropy(model(u), y).backward()
        for _ in range(steps):
            optimizer.step()
        compressor.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(5)  # steps before the first call, such as of a warm-up
        train(1)
    with pytest.warns(UserWarning, match=r"came for 7 steps of the optimizer, and counts them as one: call it after"):
        train(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(7)
    assert [event.step for event in compressor.history] == [3]


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_second_optimizer_beside_the_compressors_is_refused(order: str) -> None:
    model, (u, y) = classifier(), examples(4)
    first, second = (torch.optim.AdamW(model.parameters(), lr=1e-2) for _ in range(2))
    compressor = compressing(model, first)
    F.cross_entropy(model(u), y).backward()
    for optimizer in (first, second) if order == "after" else (second, first):
        optimizer.step()
    with pytest.raises(UnsupportedOptimizerError, match=r"AdamW trains parameters .* or with a list of all optimizers"):
        compressor.step()
    both = Compressor(model, [first, second], STEPS, states=4, window=0.5, cuts=2)
    del compressor
    for _ in range(3):
        first.step()
        second.step()
        event = both.step()
    assert event is not None
    assert event.step == 3


class Outer(torch.optim.Optimizer):
    """Makes its steps by optimizers inside of it."""

    def __init__(self, inner: list[torch.optim.Optimizer]) -> None:
        super().__init__([parameter for one in inner for parameter in one.param_groups[0]["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        del closure
        for one in self.inner:
            one.step()


@pytest.mark.parametrize("passed", ["inner", "outer"])
def test_optimizers_inside_each_other_and_of_other_parameters_are_no_strangers(passed: str) -> None:
    model, (u, y) = classifier(), examples(4)
    inner = torch.optim.SGD(model.parameters(), lr=1e-2)
    outer, head = Outer([inner]), torch.optim.SGD(model.decoder.parameters(), lr=1e-2)
    idle = torch.optim.SGD(model.parameters(), lr=1e-2)  # has the same parameters, and finds no gradients
    compressor = compressing(model, inner if passed == "inner" else outer)
    for _ in range(3):
        F.cross_entropy(model(u), y).backward()
        outer.step()
        head.step()
        model.zero_grad()
        idle.step()
        event = compressor.step()
    assert event is not None
    assert event.step == 3


def test_a_compressor_of_a_model_that_is_not_trained_says_so() -> None:
    layer = LRU(1, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    compressor = compressing(layer, optimizer)
    for _ in range(20):  # accumulated gradients
        compressor.step()
    layer(torch.randn(2, 8, 1)).square().mean().backward()
    optimizer.step()
    compressor.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(256 + 4 * 20 - 1):
            compressor.step()
    with pytest.warns(UserWarning, match="336 times in a row without a step .* are those that train"):
        compressor.step()


def test_another_optimizer_is_welcome_after_the_last_cut() -> None:
    model, (u, y) = classifier(), examples(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = compressing(model, optimizer)
    for step in range(STEPS):
        if step == 6:
            assert compressor.done
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.zero_grad()
        F.cross_entropy(model(u), y).backward()
        optimizer.step()
        compressor.step()
    assert compressor.state_dims["blocks.0.ssm"] == 4


class FirstAndSecond(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is commonly published: its loops call ``first_step`` and ``second_step``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(self.param_groups, lr=1e-2)

    def second_step(self) -> None:
        self.inner.step()

    def step(self, closure: Any = None) -> None:
        del closure
        self.second_step()


def test_an_optimizer_that_is_not_called_by_step_is_noticed_by_the_weights() -> None:
    model = classifier()
    optimizer = FirstAndSecond(model.parameters())
    compressor = Compressor(model, optimizer, STEPS, states=4, window=0.5, cuts=2, carry="reset")
    u, y = examples(4)
    seen = []
    for call in range(2 * STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(u), y).backward()
        if call % 2:
            optimizer.second_step()
        if event := compressor.step():
            seen.append((event.kind, event.step, call + 1))
    assert seen == [("cut", 3, 6), ("cut", 6, 12)]


def test_a_step_at_a_learning_rate_of_zero_counts() -> None:
    layer = LRU(2, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    compressor = compressing(layer, optimizer)
    for _ in range(3):
        layer(torch.randn(2, 8, 2)).square().mean().backward()
        optimizer.step()
        event = compressor.step()
    assert event is not None
    assert event.step == 3


def test_a_compressor_that_is_gone_leaves_no_hook() -> None:
    layer = LRU(2, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    gc.collect()
    before = len(_watches)
    compressing(layer, optimizer)
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks  # pyright: ignore[reportPrivateUsage]
    assert len(_watches) == before


def test_a_compressor_may_be_collected_while_an_optimizer_goes_through_its_hooks() -> None:
    layer, other = LRU(2, 16), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    held = [compressing(layer, torch.optim.SGD(layer.parameters(), lr=0.1))]

    def collect(*_: Any) -> None:
        held.clear()
        gc.collect()

    handle = register_optimizer_step_post_hook(collect)
    optimizer.step()
    handle.remove()
    assert not held


def test_a_scaler_that_is_restored_or_updated_late_measures_no_step_at_another_scale() -> None:
    """The loss of a step is multiplied by the factor that its own ``scale`` call used, whenever the scaler got it."""

    def train(order: str, stop: int | None = None) -> tuple[dict[str, torch.Tensor], list[float | None]]:
        def build() -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, Compressor]:
            model = classifier()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
            options: dict[str, Any] = {"total_states": 8, "cuts": 1, "window": 0.5, "gramians": "loss"}
            return model, optimizer, scaler, Compressor(model, optimizer, STEPS, scaler=scaler, **options)

        model, optimizer, scaler, compressor = build()
        for step in range(STEPS):
            if step == stop:
                saved = (compressor.state_dict(), *(one.state_dict() for one in (model, optimizer, scaler)))
                model, optimizer, scaler, compressor = build()
                for one, state in zip((compressor, model, optimizer, scaler), saved, strict=True):
                    one.load_state_dict(state)
            u = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(u), (u.sum((1, 2)) > 0).long())).backward()
            scaler.step(optimizer)
            if order == "update last":
                compressor.step()
            scaler.update()
            if order != "update last":
                compressor.step()
        return model.state_dict(), [layer["predicted_loss"] for event in compressor.history for layer in event.layers]

    weights, losses = train("update first")
    for again in (train("update first", stop=4), train("update first", stop=5), train("update last")):
        assert again[1] == losses != []
        assert all(torch.equal(value, again[0][name]) for name, value in weights.items())


@pytest.mark.parametrize("late", ["resumed", "loaded", "layer"])
def test_loading_weights_is_no_step_where_gradients_are_accumulated(late: str) -> None:
    """`step` is called after every batch, also after those before the optimizer's first step in this process."""

    def build() -> tuple[SequenceClassifier, torch.optim.Optimizer, Compressor]:
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, compressing(model, optimizer)

    model, optimizer, compressor = build()
    weights = {name: 1.001 * value for name, value in model.state_dict().items()}
    if late == "loaded":
        model.load_state_dict(weights)
    elif late == "layer":
        layer, prefix = model.get_submodule("blocks.0.ssm"), "blocks.0.ssm."
        layer.load_state_dict({key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)})
    u, y = examples(4)
    cuts = []
    for batch in range(2 * STEPS):
        if late == "resumed" and batch == 4:
            saved = [one.state_dict() for one in (compressor, model, optimizer)]
            model, optimizer, compressor = build()
            for one, state in zip((compressor, model, optimizer), saved, strict=True):
                one.load_state_dict(state)
        (F.cross_entropy(model(u), y) / 2).backward()
        if batch % 2:
            optimizer.step()
            optimizer.zero_grad()
        if event := compressor.step():
            cuts.append((event.step, steps_of(optimizer)))
    assert cuts == [(3, 3), (6, 6)]


def test_a_model_is_pickled_without_what_is_observed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Mamba(2, d_state=16), nn.Linear(2, 1))
    plain = len(pickle.dumps(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options: dict[str, Any] = {"states": 4, "cuts": 1, "window": 0.5, "gramians": "loss"}
    compressor = Compressor(model, optimizer, STEPS, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 500, 2)).square().mean().backward()
        optimizer.step()
        compressor.step()
    written = pickle.dumps(model)
    assert len(written) < 1.5 * plain  # a sequence alone has 4 kB, which is as much as the model
    u = torch.randn(1, 8, 2)
    assert torch.equal(pickle.loads(written)(u), model(u))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("gramians", ["white", "loss"])
def test_a_scaler_that_the_compressor_does_not_know_is_warned_of_where_its_factor_matters(
    gramians: Any, known: bool
) -> None:
    gc.collect()  # scalers of other tests
    model, (u, y) = classifier(), examples(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    given = scaler if known else None
    compressor = Compressor(model, optimizer, STEPS, states=4, cuts=1, window=0.5, gramians=gramians, scaler=given)
    scaler.scale(F.cross_entropy(model(u), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compressor.step()
    said = [str(one.message) for one in caught if "GradScaler" in str(one.message)]
    assert bool(said) == (gramians == "loss" and not known)
    assert all("pass Compressor(scaler=...)" in one for one in said)
