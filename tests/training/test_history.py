"""Lines of a history: every kind, what is stored of it, and histories that earlier versions stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressm.errors import CheckpointError
from compressm.training.history import (
    Cut,
    Ended,
    Event,
    FellShort,
    Kept,
    Postponed,
    Recompiled,
    RolledBack,
    Stopped,
    Unchanged,
    Watched,
)

RESULTS = Path(__file__).parents[2] / "results"
KEYS = ["kind", "step", "seconds", "layers", "metric", "reference", "restored_step", "graphs"]
LATER = {"loss": None, "error": None, "predicted_loss": None, "promised": None, "reason": ""}  # keys of later versions
KEYS += LATER
LAYER: dict[str, Any] = {
    "name": "blocks.0.ssm", "states_before": 8, "states_after": 5, "outcome": "cut", "energy_kept": 0.99,
    "error_on_data": 0.01,
}  # fmt: skip
KEPT = {**LAYER, "states_after": 8, "outcome": "kept", "energy_kept": None, "error_on_data": None}

# Every kind, its line, and its numbers for a logger.
LINES: list[tuple[Event, str, dict[str, float]]] = [
    (
        Cut(10, 0.5, (LAYER, {**KEPT, "name": "b"}), 0.9),
        "step 10: cut, states 8 → 5, 8 → 8",
        {
            "compressm/states/blocks.0.ssm": 5.0,
            "compressm/energy_kept/blocks.0.ssm": 0.99,
            "compressm/error_on_data/blocks.0.ssm": 0.01,
            "compressm/states/b": 8.0,
            "compressm/cut_seconds": 0.5,
        },
    ),
    (
        Cut(10, 0.5, (LAYER,), 0.9, 0.85, 0.0123),
        "step 10: cut, states 8 → 5, metric 0.9 → 0.85, predicted rise of the loss 0.012 nats",
        {
            "compressm/states/blocks.0.ssm": 5.0,
            "compressm/energy_kept/blocks.0.ssm": 0.99,
            "compressm/error_on_data/blocks.0.ssm": 0.01,
            "compressm/cut_seconds": 0.5,
            "compressm/metric_change": 0.85 - 0.9,
            "compressm/predicted_loss": 0.0123,
        },
    ),
    (
        Watched(15, metric=0.89, reference=0.9, loss=0.01, error=0.0123),
        "step 15: cut watched on, metric 0.89 against 0.9, loss 0.01 ± 0.01",
        {},
    ),
    (Kept(15, 0.0, 0.91, 0.9, -0.01), "step 15: cut kept, metric 0.91 against 0.9, loss -0.01", {}),
    (Stopped(15, reason="it is late"), "step 15: no more cuts will be tried: it is late", {}),
    (
        Ended(99, 0.0, 0.91, 0.002, 0.001, 0.004),
        "step 99: end, metric 0.91; the kept cuts cost 0.002 ± 0.001 when they were examined, 0.004 was allowed; where "
        "the training would be without cuts is not known, since none ran beside it to the end",
        {},
    ),
    (
        Ended(99, metric=0.91, loss=0.0, error=0.0, promised=0.0),  # max_drop=0
        "step 99: end, metric 0.91; the kept cuts cost 0 ± 0 when they were examined, 0 was allowed; where the "
        "training would be without cuts is not known, since none ran beside it to the end",
        {},
    ),
    (Ended(99), "step 99: end, metric not finite; no cut was kept, so none cost anything", {}),
    (Postponed(10), "step 10: no cut, since the metric is not finite", {}),
    (Ended(99, metric=0.91), "step 99: end, metric 0.91; no cut was kept, so none cost anything", {}),
    (Unchanged(20, 0.25, (KEPT,)), "step 20: nothing to cut", {"compressm/states/blocks.0.ssm": 8.0}),
    (FellShort(20, reason="states=1 was asked for"), "step 20: states=1 was asked for", {}),
    (Kept(15, metric=0.91, reference=0.9), "step 15: cut kept, metric 0.91 against 0.9", {}),
    (
        RolledBack(15, 0.125, 0.5, 0.9, restored_step=10),  # as earlier versions stored it, without the loss
        "step 15: cut undone, back to step 10, metric 0.5 against 0.9",
        {"compressm/cut_seconds": 0.125},
    ),
    (Postponed(10, metric=float("inf")), "step 10: no cut, since the metric is inf", {}),
    (Recompiled(11, graphs=2), "step 11: 2 graphs recompiled", {"compressm/graphs_recompiled": 2.0}),
]


@pytest.mark.parametrize(("event", "line", "numbers"), LINES, ids=[event.kind for event, _, _ in LINES])
def test_a_line_says_what_was_done_and_is_read_back_as_it_was(
    event: Event, line: str, numbers: dict[str, float]
) -> None:
    assert str(event) == line
    assert event.metrics() == numbers
    stored = event.to_dict()
    assert list(stored) == KEYS  # all kinds: pages and reports read any of them
    assert Event.from_dict(stored) == event
    assert Event.from_dict(json.loads(json.dumps(stored))) == event
    assert type(event).from_dict(stored) == event
    assert isinstance(event, Event)


def test_a_kind_has_its_own_values_and_no_others() -> None:
    assert Cut(1).reference is None
    assert Recompiled(1).layers == ()  # a loop over all events may ask each for its layers
    for event in (Cut(1), Unchanged(1), Kept(1), Postponed(1), Recompiled(1)):
        assert not hasattr(event, "restored_step")
    assert not hasattr(Postponed(1), "reference")


@pytest.mark.parametrize(
    "path",
    ["smnist-10k/late-seed0.json", "smnist-max-drop/twenty-cuts-seed0.json", "family-delta-net/random-seed0.json"],
)
def test_stored_histories_are_read_and_written_as_they_are(path: str) -> None:
    history = json.loads((RESULTS / path).read_text())["history"]
    assert history
    for stored in history:
        event = Event.from_dict(stored)
        assert (event.kind, event.step, list(event.layers)) == (stored["kind"], stored["step"], stored["layers"])
        assert event.to_dict() == {"graphs": 0, **LATER, **stored}  # the oldest have no graphs


def test_the_oldest_and_the_newest_form() -> None:
    first = {"kind": "cut", "step": 4, "layers": [{"name": "a", "states_before": 4, "states_after": 2}]}
    assert Event.from_dict(first) == Cut(4, layers=({"name": "a", "states_before": 4, "states_after": 2},))
    undone = {"kind": "rolled_back", "step": 6, "seconds": 1.0, "layers": [], "metric": None, "reference": 0.9,
              "restored_step": 4}  # fmt: skip  # the metric was NaN, which JSON does not have
    assert Event.from_dict(undone) == RolledBack(6, 1.0, None, 0.9, restored_step=4)
    assert str(Event.from_dict(undone)) == "step 6: cut undone, back to step 4, metric not finite against 0.9"
    assert Event.from_dict({**undone, "told_by_a_later_version": 1}) == Event.from_dict(undone)
    with pytest.raises(
        CheckpointError, match=r"kind 'grown'; this version knows cut, unchanged, fell_short, watched, kept"
    ):
        Event.from_dict({"kind": "grown", "step": 1, "layers": []})
