"""Play cuts on stored trainings without cuts: how often does the cushion blame noise, how often does it miss damage?

    python benchmarks/cushion.py        # plays all; writes results/cushion.json and the table of docs/cushion.md

The curves are those of `benchmarks/cushion_curves.py`. A play runs the real `Compressor` on a small layer, and its
``evaluate`` returns the stored scores of the step at hand, changed as a cut with a known cost would have changed them:

- ``nothing``: the cut changes nothing.
- ``heals``: right after the cut the metric is lower by ``max_drop`` and three standard errors; half of it is back after
  a sixth of ``check_after``, and so on.
- ``damage``: one cut lowers the metric by ``max_drop`` and three standard errors, for good.
- ``late damage``: the same, but right after the cut nothing is to be seen of it.

The standard error is the one that the cushion states of the loss after its last examination. Runs are cut four times in
their first tenth (the default), or in their first half.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cushion_curves import UNITS, evaluated_at, unpacked
from numpy.typing import NDArray
from stored import between, rewrite, store

from compressm import Compressor, RankRule
from compressm.cutting import Plan
from compressm.cutting.metrics import MetricWarning
from compressm.layers import LRU
from compressm.training.cushion import CushionWarning
from compressm.training.history import Cut, Kept, RolledBack, Stopped
from compressm.training.noise import Look, estimate

SAMPLES, DROPS, ERRORS = (100, 500, 2000), (0.002, 0.01, 0.02), 3
KINDS = ("nothing", "heals", "damage", "late damage")
WINDOWS = {"tenth": (1, 0.1, 80), "half": (5, 0.5, 51)}  # units per step, window, last step with an evaluation at hand
PAGE = Path(__file__).parent.parent / "docs" / "cushion.md"
BEGIN, END = "<!-- table of results/cushion.json, by benchmarks/cushion.py -->", "<!-- end of table -->"
CURVES = Path(__file__).parent.parent / "results" / "cushion_curves.npz"


@dataclass(frozen=True)
class Curve:
    """A training: which examples were right at each of its steps.

    Attributes:
        name: data set and seed.
        right: by step, shape ``(N,)`` each.
    """

    name: str
    right: dict[int, NDArray[np.bool_]]

    def at(self, step: int, samples: int) -> NDArray[np.float64]:
        """The scores of the first examples after a step."""
        return self.right[step][:samples].astype(float)


def read(path: Path, window: str, name: str) -> Curve:
    """A stored training, with the steps that a schedule has."""
    unit, _, last = WINDOWS[window]
    units = evaluated_at()
    with np.load(path) as stored:
        right = unpacked(stored[name], int(stored[f"{name.split('-')[0]}-examples"]))
    return Curve(name, {step: right[units.index(step * unit)] for step in range(1, last + 1)})


@dataclass(frozen=True)
class Played:
    """What became of the cuts.

    Attributes:
        cuts, undone: how many were made, and how many of those undone.
        stopped: whether no more cuts were tried.
        hit: whether the damaged cut was undone; None without one.
        error: standard error of the loss by each of the four cuts, from all examinations that it may have.
    """

    cuts: int
    undone: int
    stopped: bool
    hit: bool | None
    error: tuple[float, ...]


_PLANS: dict[tuple[RankRule, bytes], Plan] = {}


class Play:
    """The compressor of a small layer, whose metric is that of a stored training.

    Args:
        curve: the training.
        window: a key of `WINDOWS`.
        samples: validation examples.
        max_drop: as in `Compressor`.
        pairs: whether `evaluate` returns one score per example.
        kind: what cuts cost, one of `KINDS`.
        which: the cut that costs something, from 0. With ``heals`` every cut does.
        cost: what it costs.
    """

    def __init__(
        self,
        curve: Curve,
        window: str,
        samples: int,
        max_drop: float,
        pairs: bool,
        kind: str = "nothing",
        which: int = 0,
        cost: tuple[float, ...] = (0.0,) * 4,
    ) -> None:
        torch.manual_seed(0)
        self.curve, self.samples, self.pairs, self.kind, self.which, self.cost = (
            curve,
            samples,
            pairs,
            kind,
            which,
            cost,
        )
        self.layer, self.step, self.kept = LRU(1, 32), 0, 0
        self.standing, self.made_at = 32, 0  # states without a cut that is being examined, and the step of that cut
        _, share, self.last = WINDOWS[window]
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0)
        steps = UNITS if window == "tenth" else round(UNITS / 5)
        self.compressor = Compressor(
            self.layer, optimizer, steps, window=share, tolerance=0.99, min_reduction=0.0, max_drop=max_drop,
            evaluate=self.evaluate,
        )  # fmt: skip

        # The layer never learns, so that the same cuts come again and again: each is planned once.
        self._plan, self.compressor._cutter.plan = self.compressor._cutter.plan, self.planned  # type: ignore[method-assign]

    def planned(self, rule: RankRule) -> Plan:
        """The plan of a cut, from a memory of plans."""
        weights = b"".join(value.numpy().tobytes() for value in self.layer.state_dict().values())
        if (rule, weights) not in _PLANS:
            _PLANS[rule, weights] = self._plan(rule)
        return copy.deepcopy(_PLANS[rule, weights])

    def evaluate(self, layer: torch.nn.Module) -> Any:
        """The stored scores at this step, less what the cut costs that is being examined."""
        scores = self.curve.at(self.step, self.samples)
        if self.layer.d_state != self.standing:
            scores = self._harmed(scores, self._loss())
        return torch.from_numpy(scores) if self.pairs else float(scores.mean())

    def _loss(self) -> float:
        cut, age = self.kept, self.step - self.made_at
        if cut > 3 or self.kind == "nothing" or (self.kind != "heals" and cut != self.which):
            return 0.0
        if self.kind == "heals":
            return self.cost[cut] * 0.5 ** (6 * age / self.compressor.check_after)
        return 0.0 if self.kind == "late damage" and not age else self.cost[cut]

    def _harmed(self, scores: NDArray[np.float64], loss: float) -> NDArray[np.float64]:
        """As many examples wrong that were right, the same ones each time as far as possible; the rest as a share."""
        if not self.pairs:
            return scores - loss
        harmed, left = scores.copy(), loss * len(scores)
        for index in np.random.default_rng(len(scores)).permutation(len(scores)):
            if left <= 0:
                break
            taken = min(left, 1.0, harmed[index])
            harmed[index] -= taken
            left -= taken
        return harmed - max(0.0, left) / len(scores)  # below zero where accuracy is lower than the loss

    def run(self) -> Played:
        """Until the curve ends or all cuts are decided."""
        errors: list[float] = []
        hit = None
        cuts = undone = 0
        while self.step < self.last and not self.compressor.done:
            self.step += 1
            seen = len(self.compressor.history)
            before = self.layer.d_state
            if self.compressor._cushion.observed is None:
                self.standing, self.made_at = before, self.step
            self.compressor.optimizer.step()  # without gradients: it only tells the compressor that a step was made
            self.compressor.step()
            for event in self.compressor.history[seen:]:
                if isinstance(event, Cut):
                    cuts += 1
                    if len(errors) == self.kept:
                        errors.append(self._error())
                elif isinstance(event, Kept):
                    hit = False if self.kept == self.which else hit
                    self.kept += 1
                    self.standing = self.layer.d_state
                    if self.kind in ("damage", "late damage") and self.kept > self.which:
                        return Played(cuts, undone, False, hit, tuple(errors))
                elif isinstance(event, RolledBack):
                    undone += 1
                    self.step = event.restored_step
                    if self.kind in ("damage", "late damage") and self.kept == self.which:
                        return Played(cuts, undone, False, True, tuple(errors))
        stopped = any(isinstance(event, Stopped) for event in self.compressor.history)
        return Played(cuts, undone, stopped, hit, tuple(errors))

    def _error(self) -> float:
        """Standard error of the loss after all examinations of the cut that was just made."""
        apart, first = max(1, self.compressor.check_after // 2), self.step + self.compressor.check_after
        steps = [step for step in (first, first + apart, first + 2 * apart) if step in self.curve.right]
        if not steps:
            return math.nan
        after = []
        for step in steps:
            scores = self.curve.at(step, self.samples)
            after.append(Look(step, scores.mean(), torch.from_numpy(scores) if self.pairs else None))
        return estimate(self.compressor._cushion.looks, after).error or 0.0


def plays(
    path: Path,
    names: Sequence[str] | None = None,
    *,
    pairs: Sequence[bool] = (False, True),
    kinds: Sequence[str] = KINDS,
    samples: Sequence[int] = SAMPLES,
    drops: Sequence[float] = DROPS,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """All plays, one row for each window, way to evaluate, number of samples, max_drop and kind.

    Args:
        path: the stored trainings.
        names: those to play; by default all.
    """
    with np.load(path) as stored:
        names = [name for name in stored.files if "examples" not in name] if names is None else names
    jobs = [(path, window, name, pairs, kinds, samples, drops) for window in WINDOWS for name in names]
    rows: dict[tuple[Any, ...], list[Played]] = {}
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
        for part in map(_of_one, jobs) if pool is None else pool.imap(_of_one, jobs):
            for key, played in part:
                rows.setdefault(key, []).append(played)
    return [_row(key, played) for key, played in rows.items()]


def _of_one(job: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Played]]:
    """All plays on one training, with their keys."""
    path, window, name, pairs, kinds, samples, drops = job
    torch.set_num_threads(1)
    curve, seed, found = read(path, window, name), int(name.split("-")[1]), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CushionWarning)
        warnings.simplefilter("ignore", MetricWarning)
        for count, drop, way in itertools.product(samples, drops, pairs):
            for kind, played in _kinds(curve, window, count, drop, way, seed, kinds):
                found.append(((window, way, count, drop, kind), played))
    return found


def _kinds(
    curve: Curve, window: str, samples: int, drop: float, pairs: bool, seed: int, kinds: Sequence[str]
) -> Iterator[tuple[str, Played]]:
    nothing = Play(curve, window, samples, drop, pairs).run()
    if "nothing" in kinds:
        yield "nothing", nothing
    cost = tuple(drop + ERRORS * error for error in (*nothing.error, *(math.nan,) * 4)[:4])
    for kind in kinds:
        which = seed % 4
        if kind == "nothing" or (kind != "heals" and not cost[which] < math.inf):
            continue
        if kind == "heals":
            cost = tuple(0.0 if math.isnan(one) else one for one in cost)
        yield kind, Play(curve, window, samples, drop, pairs, kind, which, cost).run()


def _row(key: tuple[Any, ...], played: list[Played]) -> dict[str, Any]:
    window, pairs, samples, drop, kind = key
    cuts, undone = sum(one.cuts for one in played), sum(one.undone for one in played)
    hits = [one.hit for one in played if one.hit is not None]
    errors = [error for one in played for error in one.error if not math.isnan(error)]
    row: dict[str, Any] = {
        "window": window, "evaluate": "one score per example" if pairs else "one number", "samples": samples,
        "max_drop": drop, "cut": kind, "runs": len(played), "cuts": cuts, "undone": undone,
        "gave_up": sum(one.stopped for one in played),
    }  # fmt: skip
    if kind in ("damage", "late damage"):
        row |= {"damaged": len(hits), "damaged_undone": sum(hits)}
    else:
        row["median_error"] = float(np.median(errors))
    return row


def totals(rows: list[dict[str, Any]], **which: Any) -> dict[str, int]:
    """Sums over the rows that have these values."""
    chosen = [row for row in rows if all(row[key] == value for key, value in which.items())]
    keys = ("runs", "cuts", "undone", "gave_up", "damaged", "damaged_undone")
    return {key: sum(row.get(key, 0) for row in chosen) for key in keys}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, one line for each number of samples and max_drop."""
    lines = [
        "| validation samples | `max_drop` | cut that changes nothing: undone | gave up | cut that heals: undone | "
        "damage: undone | late damage: undone | median standard error |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for samples in sorted({row["samples"] for row in rows}):
        for drop in sorted({row["max_drop"] for row in rows}):
            one = {kind: totals(rows, samples=samples, max_drop=drop, cut=kind) for kind in KINDS}
            errors = [
                r["median_error"]
                for r in rows
                if r["samples"] == samples and r["max_drop"] == drop and r["cut"] == "nothing"
            ]
            null, heals = one["nothing"], one["heals"]
            cells = [
                f"{samples:,}", f"{drop:g}",
                f"{null['undone']} of {null['cuts']}", f"{null['gave_up']} of {null['runs']}",
                f"{heals['undone']} of {heals['cuts']}",
                *(f"{one[kind]['damaged_undone']} of {one[kind]['damaged']}" for kind in ("damage", "late damage")),
                f"{np.mean(errors):.3f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page docs/cushion.md with the table of these rows."""
    return between(page, BEGIN, END, table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Play cuts on stored trainings without cuts.")
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--output", type=Path, default=Path("results/cushion.json"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    rows = plays(arguments.curves, workers=arguments.workers)
    store(arguments.output, rows=rows)
    rewrite(PAGE, with_table, rows)
    print(table(rows))
    for kind in KINDS:
        for window in WINDOWS:
            print(kind, window, json.dumps(totals(rows, cut=kind, window=window)))


if __name__ == "__main__":
    main()
