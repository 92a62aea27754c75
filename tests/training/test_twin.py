"""The uncut twin: it is what the training would be, so the difference of two metrics is what a cut cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.errors import CheckpointError, EvaluationError, InvalidRankRuleError
from compressm.layers import LRU
from compressm.training.cushion import CushionWarning
from compressm.training.history import Kept, RolledBack, Watched


class Model(nn.Module):
    """Dropout, so that random states matter, and a layer with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.ssm, self.dropout, self.head = LRU(2, 8, r_min=0.5), nn.Dropout(0.2), nn.Linear(2, 1)

    def forward(self, u: Tensor) -> Tensor:
        return self.head(self.dropout(self.ssm(u)))


def train_step(model: nn.Module, optimizer: Any, batch: Tensor) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(batch), batch[..., :1].cumsum(1)).backward()
    optimizer.step()


def scores(model: nn.Module) -> Tensor:
    model.eval()
    u = torch.randn(20, 9, 2, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return -(model(u) - u[..., :1].cumsum(1)).square().mean((1, 2))


class Loop:
    """A small training with a schedule, which makes one cut after its tenth step."""

    def __init__(self, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.8)
        given: dict[str, Any] = {
            "states": 2, "cuts": 1, "window": 0.25, "max_drop": 1e6, "evaluate": scores, "check_after": 6,
            "scheduler": self.scheduler, "control": "twin", "train_step": train_step, **arguments,
        }  # fmt: skip
        self.compressor = compressm.Compressor(self.model, self.optimizer, 40, **given)
        self.batches = torch.Generator().manual_seed(1)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = torch.randn(4, 9, 2, generator=self.batches)
            train_step(self.model, self.optimizer, batch)
            self.scheduler.step()
            self.compressor.step(batch)


def uncut(steps: int) -> Loop:
    """The same training without any cut."""
    loop = Loop()
    for _ in range(steps):
        train_step(loop.model, loop.optimizer, torch.randn(4, 9, 2, generator=loop.batches))
        loop.scheduler.step()
    return loop


def test_the_twin_is_the_training_without_the_cut_bit_for_bit() -> None:
    loop = Loop()
    loop.run(14)
    assert loop.compressor.observing
    assert loop.model.ssm.d_state == 2
    twin = loop.compressor._cushion.twin
    assert twin is not None
    alone = uncut(14)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(twin.model.state_dict()[name], value), name


def test_a_harmful_cut_is_undone_and_no_step_is_lost() -> None:
    loop = Loop(states=1, max_drop=0.01, on_setback="stop")
    with pytest.warns(CushionWarning, match="is finer than"):
        loop.run(40)
    *watched, undone = (one for one in loop.compressor.history if isinstance(one, Watched | RolledBack))
    assert [(one.kind, one.step) for one in watched] == [("watched", 16), ("watched", 19)]
    assert isinstance(undone, RolledBack)
    assert undone.step == undone.restored_step == 22
    assert "the uncut twin goes on" in str(undone)
    assert undone.seconds > 0
    assert undone.error is not None
    assert undone.loss is not None
    assert undone.loss > 0.1
    alone = uncut(40)
    assert all(torch.equal(value, loop.model.state_dict()[name]) for name, value in alone.model.state_dict().items())
    moments = alone.optimizer.state_dict()["state"]
    for index, values in loop.optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[index][key], value) for key, value in values.items())


def test_the_loss_is_the_difference_of_the_two_metrics() -> None:
    loop = Loop()
    loop.run(19)
    kept = loop.compressor.history[-1]
    assert isinstance(kept, Kept)
    assert loop.compressor._cushion.twin is None
    differences = []
    for steps in (16, 19):
        other = Loop()
        other.run(steps)
        differences.append(scores(uncut(steps).model).mean() - scores(other.model).mean())
    assert kept.loss == pytest.approx(float(sum(differences)) / 2, rel=1e-5)


def test_a_training_resumes_beside_its_twin() -> None:
    whole = Loop()
    whole.run(40)
    first = Loop()
    first.run(13)
    state: dict[str, Any] = copy.deepcopy(
        {
            "compressor": first.compressor.state_dict(),
            "model": first.model.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "scheduler": first.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "batches": first.batches.get_state(),
        }
    )
    second = Loop()
    second.compressor.load_state_dict(state["compressor"])
    for part in ("model", "optimizer", "scheduler"):
        getattr(second, part).load_state_dict(state[part])
    torch.set_rng_state(state["rng"])
    second.batches.set_state(state["batches"])
    second.run(27)
    assert [(one.kind, one.step) for one in second.compressor.history] == [
        (one.kind, one.step) for one in whole.compressor.history
    ]
    mine, theirs = second.compressor.history[-2], whole.compressor.history[-2]
    assert isinstance(mine, Kept)
    assert isinstance(theirs, Kept)
    assert mine.loss == theirs.loss
    with pytest.raises(CheckpointError, match="control='twin' and train_step"):
        Loop(control="trend", train_step=None).compressor.load_state_dict(state["compressor"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train_step": None}, "needs train_step"),
    ({"max_drop": None, "evaluate": None}, "give max_drop and evaluate"),
    ({"scaler": torch.amp.GradScaler("cpu")}, "scaler="),
]


@pytest.mark.parametrize(("arguments", "match"), REFUSED)
def test_what_cannot_be_had_is_refused_at_construction(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRankRuleError, match=match):
        Loop(**arguments)


def test_what_a_copy_cannot_have_is_refused() -> None:
    model, outside = Model(), nn.Parameter(torch.zeros(1))
    common: dict[str, Any] = {
        "states": 2, "max_drop": 0.1, "evaluate": scores, "control": "twin", "train_step": train_step,
    }  # fmt: skip
    with pytest.raises(InvalidRankRuleError, match="outside of it"):
        compressm.Compressor(model, torch.optim.Adam([*model.parameters(), outside]), 100, **common)

    class TwoWeights(torch.optim.SGD):
        def eval(self) -> None:
            """As schedule-free optimizers have it."""

    with pytest.raises(InvalidRankRuleError, match="other weights for evaluation"):
        compressm.Compressor(model, TwoWeights(model.parameters(), 0.1), 100, **common)
    average = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(InvalidRankRuleError, match="followers="):
        compressm.Compressor(model, torch.optim.Adam(model.parameters()), 100, followers=[average], **common)


def test_calls_that_do_not_tell_the_twin_what_to_do_are_refused() -> None:
    loop = Loop()
    with pytest.raises(InvalidRankRuleError, match=r"compressor\.step\(batch\)"):
        loop.compressor.step()
    loop.run(1)
    with pytest.raises(InvalidRankRuleError, match="as a list"):
        loop.compressor.step(torch.zeros(1))


@pytest.mark.parametrize("what", ["train_step", "evaluate"])
def test_a_function_that_ignores_its_arguments_is_refused(what: str) -> None:
    own: list[Loop] = []
    ignoring: Callable[..., Any] = {
        "train_step": lambda model, optimizer, batch: train_step(own[0].model, own[0].optimizer, batch),
        "evaluate": lambda model: scores(own[0].model),
    }[what]
    own.append(Loop(**{what: ignoring}))
    with pytest.raises((InvalidRankRuleError, EvaluationError), match="that it was given"):
        own[0].run(20)
