"""Which way of training is best for what it costs, each with the learning rate that suits it.

Every way is trained at several learning rates, and the rate is chosen by the mean validation accuracy over the seeds,
so that no way is compared at a rate that was tuned for another. Test data decide nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from compressm.lab.reproduce.experiments import Arm, Experiment
from compressm.lab.reproduce.gaps import Results
from compressm.lab.reproduce.tables import computing, operations
from compressm.lab.runs.result import RunResult


@dataclass(frozen=True)
class Tuned:
    """One way of training at its best learning rate.

    Attributes:
        arm: the way at that rate.
        rate: the rate.
        runs: its results, one per seed.
        seconds: computing seconds of each whole training, of the cuts too; None where a run did not measure it.
    """

    arm: Arm
    rate: float
    runs: Sequence[RunResult]
    seconds: Sequence[float | None]

    @property
    def validation(self) -> float:
        """Mean validation accuracy, in percent. The experiments are classifications, whose runs have one."""
        return 100 * statistics.fmean(run.validation_accuracy or 0.0 for run in self.runs)

    @property
    def operations(self) -> float:
        """Floating point operations of all training steps, forward and backward; the mean over seeds."""
        return operations(self.runs)


def tuned(experiment: Experiment, results: Results) -> list[Tuned]:
    """Every way of an experiment that has results, at its best rate, in the experiment's order."""
    best: dict[str, Tuned] = {}
    for arm in experiment.arms:
        runs = [run for (name, _), run in sorted(results.items()) if name == arm.name]
        if arm.way is None or not runs:
            continue
        one = Tuned(arm, runs[0].config["optimizer"]["lr"], runs, [computing(run) for run in runs])
        if arm.way not in best or one.validation > best[arm.way].validation:
            best[arm.way] = one
    return list(best.values())


HEADER = ("", "learning rate", "test accuracy, %", "operations", "seconds", "seeds")


def render(experiment: Experiment, results: Results) -> list[str]:
    """The comparison as Markdown; no lines for an experiment that compares no rates."""
    made = tuned(experiment, results)
    if not made:
        return []
    lines = ["Every way at its best learning rate, chosen on validation data:", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    for one in made:
        accuracies = [100 * run.score for run in one.runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        seconds = [value for value in one.seconds if value is not None]
        lines.append(
            f"| {one.arm.way} | {one.rate:g} | {statistics.fmean(accuracies):.2f}{spread} | "
            f"{one.operations / 1e9:.0f} G | {f'{statistics.median(seconds):.0f}' if seconds else ''} | "
            f"{len(accuracies)} |"
        )
    return [*lines, ""]


__all__ = ["Tuned", "render", "tuned"]
