"""``max_drop=0.005`` with defaults on every data set at hand: is its promise kept, how small, and what does it cost?

    COMPRESSM_DATA=FOLDER python benchmarks/max_drop.py [--data smnist] [--layers lru] [--seeds 0] [--arms uncut]
    python benchmarks/max_drop.py --table    # from results/max_drop.json into docs/cushion.md; nothing is trained

Five trainings of the same seed, which see the same batches:

- ``uncut``;
- ``max_drop``: 0.005, in units of the metric: half a point of accuracy or fit, 0.005 bits per byte;
- ``rounded``: uncut, its weights rounded to bfloat16 once, where the last cut would come. Nobody calls that damage, and
  yet the two trainings drift apart: what it "loses" is how much the end of a training fluctuates;
- ``tolerance``: 0.02;
- ``states``: the mean size at which ``max_drop`` ended, left out if that cut nothing.

All other options are the defaults. The cuts see the validation part only; the test part is evaluated once, after the
last step. What a training lost is the metric of the uncut one less its own, at the end of both. Its standard error is
that of the differences, example by example: what another sample of examples might have shown. ``max_drop`` is promised
for each cut, so a run may lose as often that as it kept cuts. A loss beyond that by less than 1.645 standard errors is
*within noise*. The rounded trainings are judged by what the cut ones of the same seed were allowed.

Every training is stored in the folder ``--parts`` when it is done, and not made again. Trainings that several processes
make at once (with other ``--data``, ``--layers`` or ``--seeds``) are gathered by the next call. One thread; CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from max_drop_data import TASKS, Task
from numpy.typing import NDArray
from stored import add_files, between, rewrite, store, stored_rows
from torch import nn

import compressm
from compressm.cutting import state_dims
from compressm.layers import parameter_groups
from compressm.runtime.progress import Bar
from compressm.training.history import Kept, RolledBack

MAX_DROP, TOLERANCE, NOISE = 0.005, 0.02, 1.645
LAYERS: dict[str, dict[str, int]] = {
    "lru": {"states": 64}, "s5": {"states": 64}, "mamba": {"states": 16}, "mamba2": {"states": 64, "head_dim": 16},
}  # fmt: skip
ARMS = ("uncut", "max_drop", "rounded", "tolerance", "states")
STEPS, BATCH, WIDTH, WINDOW = 600, 16, 16, 0.1
PAGE = Path(__file__).parent.parent / "docs" / "cushion.md"
BEGIN, END = (
    "<!-- table of results/max_drop.json, by benchmarks/max_drop.py -->",
    "<!-- end of that table -->",
)


@dataclass(frozen=True)
class Job:
    """One training: data set, layer, seed and arm."""

    data: str
    layer: str
    seed: int
    arm: str

    def other(self, arm: str) -> Job:
        """The training of another arm beside this one."""
        return Job(self.data, self.layer, self.seed, arm)

    def path(self, parts: Path) -> Path:
        return parts / f"{self.data}-{self.layer}-{self.seed}-{self.arm}.npz"


@cache
def task(name: str) -> Task:
    """A data set, read once."""
    return TASKS[name]()


def rule(job: Job, found: Task, parts: Path) -> dict[str, Any] | None:
    """The options of `Compressor` in an arm. None if the arm is to be left out; empty without cuts."""
    if job.arm in ("uncut", "rounded"):
        return {}
    if job.arm == "tolerance":
        return {"tolerance": TOLERANCE}
    if job.arm == "max_drop":
        return {"max_drop": MAX_DROP, "evaluate": found.evaluate, "mode": found.mode}
    ended = json.loads(str(read(job.other("max_drop").path(parts))["about"]))["states"]
    size = round(sum(ended) / len(ended))
    return {"states": size} if size < LAYERS[job.layer]["states"] else None


def trained(job: Job, found: Task, steps: int, options: dict[str, Any]) -> tuple[nn.Module, Any, float, list[str]]:
    """The model after a training, its compressor, the CPU time in seconds, and what was warned of."""
    torch.manual_seed(job.seed)
    model = found.model(job.layer, WIDTH, **LAYERS[job.layer])
    optimizer = torch.optim.AdamW(parameter_groups(model, found.lr, 0.01, 0.5), fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps)
    started, step = time.process_time(), 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        compressor = compressm.Compressor(model, optimizer, steps, scheduler=scheduler, **options) if options else None
        while step < steps:
            drawn = torch.Generator().manual_seed(1_000_000 * job.seed + step)  # the same batches in every arm
            batch = torch.randint(0, len(found.train[0]), (BATCH,), generator=drawn)
            loss = found.loss(model, found.train[0][batch], found.train[1][batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            step += 1
            if job.arm == "rounded" and step == round(WINDOW * steps):
                model.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()})
            event = None if compressor is None else compressor.step()
            if isinstance(event, RolledBack):
                step = event.restored_step
    return model, compressor, time.process_time() - started, sorted({str(one.message) for one in warned})


def make(job: Job, steps: int, parts: Path) -> None:
    """One training, to its file."""
    found = task(job.data)
    options = rule(job, found, parts)
    if options is None:
        return
    model, compressor, seconds, warned = trained(job, found, steps, options)
    history = [] if compressor is None else compressor.history
    about = {
        "steps": steps,
        "mode": found.mode,
        "states_at_first": LAYERS[job.layer]["states"],
        "states": list(state_dims(model).values()),
        "seconds": round(seconds, 2),
        "cuts_kept": sum(isinstance(event, Kept) for event in history),
        "history": [str(event) for event in history],
        "warnings": warned,
    }
    scores = {name: found.scores(model, getattr(found, name)).numpy() for name in ("validation", "test")}
    parts.mkdir(parents=True, exist_ok=True)
    whole = job.path(parts)
    np.savez_compressed(unfinished := whole.with_suffix(".part.npz"), about=json.dumps(about), **scores)  # type: ignore[arg-type]
    unfinished.rename(whole)


def read(path: Path) -> dict[str, NDArray[Any]]:
    """A stored training: what is said about it, and its scores."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def row(job: Job, parts: Path) -> dict[str, Any]:
    """A stored training beside the uncut one of the same seed."""
    own, uncut = read(job.path(parts)), read(job.other("uncut").path(parts))
    about, without = (json.loads(str(one["about"])) for one in (own, uncut))
    found: dict[str, Any] = {**vars(job), **about, "time": about["seconds"] / without["seconds"]}
    sign = -1 if about["mode"] == "min" else 1
    for name in ("validation", "test"):
        lost = sign * (uncut[name].astype(float) - own[name])
        found[name] = {
            "metric": float(own[name].mean()), "error": standard_error(own[name]), "lost": float(lost.mean()),
            "error_of_lost": standard_error(lost), "examples": len(lost),
        }  # fmt: skip
    if job.arm in ("max_drop", "rounded") and job.other("max_drop").path(parts).exists():
        cuts = json.loads(str(read(job.other("max_drop").path(parts))["about"]))["cuts_kept"]
        found["allowed"] = MAX_DROP * cuts
        for name in ("validation", "test"):
            found[name]["promise"] = verdict(found[name], found["allowed"])
    return found


def standard_error(scores: NDArray[Any]) -> float:
    """Of the mean."""
    return float(scores.std(ddof=1) / len(scores) ** 0.5)


def verdict(measured: dict[str, Any], allowed: float) -> str:
    """Whether a loss is within what was allowed."""
    excess = measured["lost"] - allowed
    if excess <= 1e-9:
        return "kept"
    return "within noise" if excess <= NOISE * measured["error_of_lost"] else "not kept"


def gathered(parts: Path) -> Iterator[dict[str, Any]]:
    """Rows of all trainings that are stored."""
    seeds = sorted({int(path.stem.split("-")[2]) for path in parts.glob("*-*-*-uncut.npz")})
    for job in jobs(list(TASKS), list(LAYERS), seeds, ARMS):
        if job.path(parts).exists() and job.other("uncut").path(parts).exists():
            yield row(job, parts)


def jobs(data: Sequence[str], layers: Sequence[str], seeds: Sequence[int], arms: Sequence[str]) -> Iterator[Job]:
    """Trainings in an order in which each finds what it needs."""
    for seed in seeds:
        for name in data:
            for layer in layers:
                yield from (Job(name, layer, seed, arm) for arm in ARMS if arm in arms)


def summary(rows: list[dict[str, Any]]) -> str:
    """How often the promise was kept, and how often without any cut."""
    lines = ["| trainings | runs | part | kept | within noise | not kept |", "|---|---:|---|---:|---:|---:|"]
    for arm, words in (("max_drop", "cut under `max_drop=0.005`"), ("rounded", "uncut, weights rounded once")):
        for part in ("validation", "test"):
            found = [row[part]["promise"] for row in rows if row["arm"] == arm and "promise" in row[part]]
            counts = " | ".join(str(found.count(word)) for word in ("kept", "within noise", "not kept"))
            lines.append(f"| {words} | {len(found)} | {part} | {counts} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each data set and layer: means over the seeds."""
    lines = [
        "| data | layer | seeds | metric uncut | kept or within noise on validation, test | states | time | "
        "lost on test: `max_drop` | rounded | `tolerance` (states) | `states` |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in TASKS:
        for layer in LAYERS:
            ours = {arm: [r for r in rows if (r["data"], r["layer"], r["arm"]) == (name, layer, arm)] for arm in ARMS}
            if ours["max_drop"]:
                lines.append(_line(name, layer, ours))
    return "\n".join(lines)


def _line(name: str, layer: str, ours: dict[str, list[dict[str, Any]]]) -> str:
    cut, count = ours["max_drop"], len(ours["max_drop"])
    kept = [sum(row[part]["promise"] != "not kept" for row in cut) for part in ("validation", "test")]
    tolerance = f"{_lost(ours['tolerance'])} ({_states(ours['tolerance'])})" if ours["tolerance"] else "–"
    cells = [
        name, layer, str(count), f"{np.mean([row['test']['metric'] for row in ours['uncut']]):.3f}",
        f"{kept[0]}, {kept[1]} of {count}", f"{cut[0]['states_at_first']} → {_states(cut)}",
        f"{np.mean([row['time'] for row in cut]):.2f}", _lost(cut), _lost(ours["rounded"]), tolerance,
        _lost(ours["states"]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _states(rows: list[dict[str, Any]]) -> str:
    return f"{np.mean([states for row in rows for states in row['states']]):.0f}"


def _lost(rows: list[dict[str, Any]]) -> str:
    """The mean loss on test data, and where there are several seeds its standard error by them."""
    lost = np.array([row["test"]["lost"] for row in rows])
    if not len(lost):
        return "–"
    return f"{lost.mean():.3f}" + (f" ± {standard_error(lost):.3f}" if len(lost) > 1 else "")


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page docs/cushion.md with the tables of these rows."""
    return between(page, BEGIN, END, f"{summary(rows)}\n\n{table(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="max_drop on every data set, beside an uncut training.")
    parser.add_argument("--data", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=STEPS)
    add_files(parser, "max_drop", PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        rewrite(PAGE, with_table, stored_rows(arguments.json))
        return
    train(arguments)
    keep(arguments)


def keep(arguments: argparse.Namespace) -> None:
    """Store the rows of all trainings that are done."""
    rows = list(gathered(arguments.parts))
    store(arguments.json, max_drop=MAX_DROP, steps=arguments.steps, batch=BATCH, width=WIDTH, rows=rows)


def train(arguments: argparse.Namespace) -> None:
    """Make the trainings that are not stored yet."""
    wanted = list(jobs(arguments.data, arguments.layers, arguments.seeds, arguments.arms))
    with Bar("trainings", len(wanted)) as bar:
        for job in wanted:
            bar.describe(f"{job.data} {job.layer} {job.seed} {job.arm}")
            if not job.path(arguments.parts).exists():
                make(job, arguments.steps, arguments.parts)
                keep(arguments)
                print(job, flush=True)
            bar.advance()


if __name__ == "__main__":
    main()
