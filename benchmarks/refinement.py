"""What training does next: does a cut that is refined before training goes on end better?

    COMPRESSM_DATA=FOLDER python benchmarks/refinement.py [--seeds 0 1 2] [--states 6 4] [--ways loss ...]
    python benchmarks/refinement.py --table    # from results/refinement.json into docs/loss.md; nothing is trained

An LRU of 256 states learns MNIST as sequences of 196 pixels for 500 steps. From that one checkpoint it is cut to 6 and
to 4 states in every way of `WAYS`, and training goes on for 1,500 steps, on the same batches with the same dropout, to
the end of the schedule. Accuracy and loss are those on all images of validation: before the cut, right after it (and
after what refines it), 100 and 500 steps later and at the end. Test data are not looked at.

``rounded`` is the cut by the loss with all weights rounded to bfloat16 once, which nobody calls a different method: the
difference that it makes at the end is how far single trainings drift apart.

The trainings are stored in the folder ``--parts`` when they are done, and not made again. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from refining import distilled, gain_kept, h2_error, joined, of, refined, singular_perturbation, weighted_error
from stored import add_files, between, rewrite, store, stored_rows
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import Adapter, find_layers
from compressm.adapters.changes import layer_values
from compressm.cutting import Plan, Report, plan_reduction
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import BatchOrder, SequenceData, load_data
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.observing.loss_evidence import LossEvidence
from compressm.observing.observer import Observer
from compressm.runtime.progress import Bar
from compressm.saving.checkpoint import load_tree, save_tree
from compressm.theory.balancing import Balancing, Reduction, balance, truncate
from compressm.theory.covariance import CovarianceBalancing, balance_covariances, truncate_covariances
from compressm.theory.evidence import Covariances
from compressm.theory.rank_rule import RankRule

STATES, BATCH, CUT_AT, STEPS, RATE = 256, 50, 500, 2000, 4e-3
LATER = (100, 500, STEPS - CUT_AT)  # steps after the cut
OBSERVED, SEQUENCES, RECORDED = 50, 4, 50  # steps and sequences of each, as in a Compressor; batches for distillation
LAYER = "blocks.0.ssm"
PAGE = Path(__file__).parents[1] / "docs" / "loss.md"
BEGIN, END = "<!-- table of results/refinement.json: begin -->", "<!-- end of that table -->"


@dataclass(frozen=True)
class Way:
    """How a model is cut, and what refines the cut.

    Attributes:
        words: what the table calls it.
        gramians: ``white`` or ``loss``.
        alpha: share of white noise in P and Q; None for the library's choice.
        system: what refines the reduced system: ``h2``, ``weighted``, ``perturbed`` or ``gain``; None for nothing.
        match: steps of matching the old layer's outputs, as the library does it on what it has observed.
        distil: the same on 50 whole batches, with D learnt as well.
        by_gradients: whether these are weighted by the gradients' covariance.
        rounded: whether all weights are rounded to bfloat16 after the cut.
    """

    words: str
    gramians: str = "loss"
    alpha: float | None = None
    system: str | None = None
    match: int = 0
    distil: int = 0
    by_gradients: bool = False
    rounded: bool = False


WAYS = {
    "loss": Way("**by the loss**"),
    "white": Way("**by white noise**", "white"),
    "rounded": Way("weights rounded to bfloat16 once", rounded=True),
    "loss-match400": Way("`match_steps=400`", match=400),
    "loss-distil400": Way("400 steps of matching on 50 batches of 50", distil=400),
    "loss-distil400-gradients": Way("the same, weighted by the gradients", distil=400, by_gradients=True),
    "loss-weighted": Way("H2-optimal, weighted by data and loss", system="weighted"),
    "loss-h2": Way("H2-optimal", system="h2"),
    "loss-alpha0": Way("α = 0", alpha=0.0),
    "loss-alpha0.1": Way("α = 0.1", alpha=0.1),
    "loss-alpha0.5": Way("α = 0.5", alpha=0.5),
    "loss-perturbed": Way("singular perturbation, diagonal of its direct term", system="perturbed"),
    "loss-gain": Way("response to the mean input restored", system="gain"),
    "white-distil400": Way("400 steps of matching on 50 batches of 50", "white", distil=400),
    "white-h2": Way("H2-optimal", "white", system="h2"),
    "white-weighted": Way("H2-optimal, weighted by data and loss", "white", system="weighted"),
    "white-perturbed": Way("singular perturbation, diagonal of its direct term", "white", system="perturbed"),
}


class Trained:
    """A training in progress: model, optimizer, schedule and the step that it is at.

    Args:
        seed: of the model and the order of batches.
        states: of the model.
    """

    def __init__(self, data: SequenceData, seed: int, states: int = STATES) -> None:
        torch.manual_seed(seed)
        self.data, self.seed, self.step = data, seed, 0
        self.model = SequenceClassifier(1, 10, d_model=8, d_state=states, r_min=0.9, r_max=0.999, max_phase=np.pi / 10)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, RATE, 0.01), fused=True)
        warm = round(0.03 * STEPS)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / warm, total_iters=warm),
                torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS - warm),
            ],
            [warm],
        )
        self.order = BatchOrder(len(data.train), BATCH, seed)

    @property
    def layer(self) -> nn.Module:
        return self.model.get_submodule(LAYER)

    def run(self, until: int, before_each: Callable[[int], None] | None = None) -> None:
        """Train up to a step."""
        self.model.train()
        for step in range(self.step, until):
            torch.manual_seed(1_000_000 * (self.seed + 1) + step)  # of dropout, the same in every way
            if before_each is not None:
                before_each(step)
            x, y = self.data.batch(self.data.train, self.order.indices(step))
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.schedule.step()
        self.step = until

    @torch.no_grad()
    def measured(self) -> dict[str, float]:
        """Accuracy in percent and loss in nats on all validation data."""
        self.model.eval()
        logits, labels = list[Tensor](), list[Tensor]()
        for indices in torch.arange(len(self.data.validation)).split(500):
            x, y = self.data.batch(self.data.validation, indices)
            logits.append(self.model(x))
            labels.append(y)
        out, y = torch.cat(logits), torch.cat(labels)
        return {"accuracy": 100 * float((out.argmax(-1) == y).float().mean()), "loss": float(F.cross_entropy(out, y))}


@cache
def mnist() -> SequenceData:
    """Sequences of 196 pixels."""
    return load_data(DataConfig(name="smnist", pool=2, validation=0.1))


@cache
def checkpoint(seed: int, parts: Path) -> dict[str, Any]:
    """The state of the uncut training at the step of the cut, with what was observed; made once."""
    folder = parts / f"checkpoint-{seed}"
    if not folder.exists():
        training = Trained(mnist(), seed)
        observer = Observer(training.model, "sequences", SEQUENCES, memory=0.98, keep=SEQUENCES * OBSERVED)
        training.run(CUT_AT - OBSERVED)
        training.run(CUT_AT, lambda _: observer.observe_next())
        observer.close()
        state = {
            "model": training.model.state_dict(), "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(), "observer": observer.state_dict(),
            "measured": training.measured(),
        }  # fmt: skip
        save_tree(folder, state)
    return load_tree(folder)


def continued(seed: int, parts: Path) -> tuple[Trained, Observer]:
    """The uncut training at the step of the cut, and what was observed of it."""
    state = copy.deepcopy(checkpoint(seed, parts))
    training = Trained(mnist(), seed)
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.schedule.load_state_dict(state["schedule"])
    training.step = CUT_AT
    observer = Observer(training.model, "sequences", SEQUENCES, memory=0.98, keep=SEQUENCES * OBSERVED)
    observer.load_state_dict(state["observer"])
    return training, observer


@torch.no_grad()
def recorded(training: Trained) -> list[Tensor]:
    """The layer's inputs on the last batches before the cut."""
    inputs = list[Tensor]()
    hook = training.layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    training.model.eval()
    for step in range(CUT_AT - RECORDED, CUT_AT):
        training.model(training.data.batch(training.data.train, training.order.indices(step))[0])
    hook.remove()
    return inputs


def cut(training: Trained, observer: Observer, way: Way, states: int) -> dict[str, Any]:
    """Cut the model in one way, refine it, and say what that did to the layer's own errors."""
    adapter = find_layers(training.model)[LAYER][1]
    assert isinstance(adapter, Adapter)
    old, values = copy.deepcopy(training.layer), layer_values(training.layer)
    system, seen = adapter.read(values), observer.evidence()[LAYER]
    u, g = joined([one for one in observer.samples()[LAYER] if isinstance(one, tuple)])
    assert isinstance(seen, Covariances)
    balancing = balance(system) if way.gramians == "white" else balance_covariances(system, seen, way.alpha)
    plain = cut_plainly(balancing, states)
    objectives = {"h2": h2_error(of(system)), "weighted": weighted_error(of(system), u, g)}
    said: dict[str, Any] = {f"{name}_plain": float(f(of(plain.system))) for name, f in objectives.items()}
    started = time.process_time()
    reduction, direct = plain, None
    if way.system in objectives:
        reduction = refined(plain, objectives[way.system])
    elif way.system == "perturbed":
        found = singular_perturbation(balancing, plain)
        reduction, direct = found.reduction, found.direct
        diagonal = float(direct.diagonal().square().sum() / direct.square().sum())
        said |= {"direct_relative": float(direct.norm() / system.h2_norm()), "direct_on_diagonal": diagonal}
    elif way.system == "gain":
        reduction = gain_kept(system, plain, u.mean((0, 1)))
    said |= {f"{name}_refined": float(f(of(reduction.system))) for name, f in objectives.items()}
    reduction = reduction.padded(states)
    plan = Plan(Report((), 0.0), {LAYER: adapter.plan(values, reduction)})
    if way.match:
        evidence, rule = LossEvidence.of(observer), RankRule(states=states)
        plan = plan_reduction(training.model, rule, loss=evidence, match_steps=way.match)
        (report,) = plan.report.layers
        if report.matched is not None:
            said |= {"matched_from": report.matched[0], "matched_to": report.matched[1]}
    plan.apply(training.model, training.optimizer)
    if direct is not None:
        training.layer.get_parameter("D").data += direct.diagonal().float()
    if way.distil:
        gradients = (g.mT @ g).mean(0) if way.by_gradients else None
        errors = distilled(training.layer, old, recorded(training), way.distil, RATE, gradients)
        said |= {"distilled_from": float(np.mean(errors[:1])), "distilled_to": float(np.mean(errors[-RECORDED:]))}
    if way.rounded:
        training.model.load_state_dict({name: x.bfloat16() for name, x in training.model.state_dict().items()})
    return {**said, "refining_seconds": time.process_time() - started}


def cut_plainly(balancing: Balancing, states: int) -> Reduction:
    """The truncation that the library makes."""
    if isinstance(balancing, CovarianceBalancing):
        return truncate_covariances(balancing, states)
    return truncate(balancing, states)


def make(seed: int, states: int, name: str, parts: Path, train: bool = True) -> dict[str, Any]:
    """One training from the checkpoint; with ``train=False`` only the cut."""
    row: dict[str, Any] = {"seed": seed, "states": states, "way": name}
    training, observer = continued(seed, parts)
    row["before"] = checkpoint(seed, parts)["measured"]
    row |= cut(training, observer, WAYS[name], states)
    after = {0: training.measured()}
    for steps in LATER if train else ():
        training.run(CUT_AT + steps)
        after[steps] = training.measured()
    return {**row, "after": after}


def jobs(seeds: Sequence[int], sizes: Sequence[int], ways: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Trainings, all of one seed before those of the next."""
    for seed in seeds:
        for name in ways:
            yield from ((seed, states, name) for states in sizes)


def gathered(parts: Path) -> list[dict[str, Any]]:
    """The rows that are done."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in parts.glob("*.json")]
    order = list(WAYS)
    return sorted(rows, key=lambda row: (-row["states"], order.index(row["way"]), row["seed"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--states", nargs="+", type=int, default=[6, 4])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--cut-only", action="store_true", help="do not train on after the cut")
    add_files(parser, "refinement", PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        rewrite(PAGE, with_table, stored_rows(arguments.json))
        return
    wanted = list(jobs(arguments.seeds, arguments.states, arguments.ways))
    with Bar("trainings", len(wanted)) as bar:
        for seed, states, name in wanted:
            bar.describe(f"seed {seed}, {states} states, {name}")
            path = arguments.parts / f"{seed}-{states}-{name}.json"
            if not path.exists():
                row = make(seed, states, name, arguments.parts, not arguments.cut_only)
                path.write_text(json.dumps(row), encoding="utf-8")
                print(row, flush=True)
                store(arguments.json, cut_at=CUT_AT, steps=STEPS, rows=gathered(arguments.parts))
            bar.advance()


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page docs/loss.md with the table of these rows."""
    return between(page, BEGIN, END, table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Right after the cut, of seed 0; at the end, of every seed: for plain cuts accuracies and losses, for the
    other ways what these are more than those of the plain cut."""
    lines = [
        "| cut to | way | right after, seed 0: accuracy | loss | at the end, seed by seed: accuracy | loss |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for states in sorted({row["states"] for row in rows}, reverse=True):
        for name, way in WAYS.items():
            ours, plain = (
                {row["seed"]: row["after"] for row in rows if (row["states"], row["way"]) == (states, key)}
                for key in (name, way.gramians)
            )
            if ours:
                words = way.words if name == way.gramians else f"{way.gramians}, {way.words}"
                lines.append(f"| {states} | {words} | {_cells(ours, {} if name == way.gramians else plain)} |")
    return "\n".join(lines)


def _cells(ours: dict[int, Any], plain: dict[int, Any]) -> str:
    """The cells of one way; differences from the plain cut if it is given, and a dash where training did not go on."""
    end, cells = str(LATER[-1]), ["–", "–"]
    if 0 in ours:
        first = ours[0]["0"]
        cells = [f"{first['accuracy']:.1f}", f"{first['loss']:.3f}"]
    for what, digits in (("accuracy", 1), ("loss", 3)):
        sign, trained = "+" if plain else "", [seed for seed in sorted(ours) if end in ours[seed]]
        values = [ours[seed][end][what] - (plain[seed][end][what] if plain else 0) for seed in trained]
        cells.append(", ".join(f"{value:{sign}.{digits}f}" for value in values) or "–")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
