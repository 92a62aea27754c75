"""Tables of an experiment, from its stored results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from compressm.lab.reproduce.experiments import Arm, Experiment
from compressm.lab.reproduce.gaps import Recovered, Results, recovered
from compressm.lab.reproduce.scale import scale
from compressm.lab.runs.result import RunResult
from compressm.lab.runs.spectra import settled_at


@dataclass(frozen=True)
class Row:
    """One arm over its seeds.

    Attributes:
        arm: which.
        runs: its results, in the order of the seeds.
        seconds: computing time of every run, a teacher's training included; None unknown, or on another processor than
            the big arm's run; see `Experiment.big_of`.
        step_ms: milliseconds of computing that the last training steps took each, the median over seeds; None unknown.
        step_speedup: the same of the big arm's runs over it, of those seeds that both have; likewise None.
        run_speedup: computing time of the big arm's whole training over this one's, likewise.
        recovered: the share of the gap between small and big; None for arms without a small counterpart.
    """

    arm: Arm
    runs: Sequence[RunResult]
    seconds: Sequence[float | None]
    step_ms: float | None
    step_speedup: float | None
    run_speedup: float | None
    recovered: Recovered | None = None

    @property
    def scores(self) -> list[float]:
        """The metric on the test data, as `scale` shows it: accuracies in percent."""
        shown = scale(self.runs).shown
        return [shown(run.score) for run in self.runs]

    @property
    def score(self) -> str:
        """Mean and, with several seeds, sample standard deviation."""
        mean = f"{statistics.fmean(self.scores):.2f}"
        return f"{mean} ± {statistics.stdev(self.scores):.2f}" if len(self.runs) > 1 else mean

    @property
    def outdated(self) -> bool:
        """Whether linear layers were cut by the version whose cuts left Adam's steps too long; see docs/carry.md."""
        return any(
            run.versions.get("compressm") == "0.1.0.dev0"
            and any("bound" in (layer["certificate"] or {}) for event in run.history for layer in event["layers"])
            and run.phases[-1]["steps"] > 1  # something was trained after it
            for run in self.runs
        )

    @property
    def states(self) -> str:
        """Final state dimensions: the mean over seeds, layer by layer."""
        means = [statistics.fmean(dims) for dims in zip(*(run.state_dims for run in self.runs), strict=True)]
        return " + ".join(f"{mean:.0f}" for mean in means)


def rows(experiment: Experiment, results: Results) -> list[Row]:
    """The arms that have results, in the experiment's order."""
    by_arm = {
        arm.name: {seed: run for (name, seed), run in results.items() if name == arm.name} for arm in experiment.arms
    }
    made = []
    for arm in experiment.arms:
        runs, big = by_arm[arm.name], experiment.big_of(arm)
        if not runs:
            continue
        alike = {seed for seed, run in runs.items() if _on_one_processor(run, results.get((big.name, seed)))}
        seconds = {seed: _computing(arm, seed, results) if seed in alike else None for seed in sorted(runs)}
        both = [seed for seed in alike if (big.name, seed) in results]
        steps = [step for seed, run in runs.items() if seed in alike and (step := _last_step(run)) is not None]
        made.append(
            Row(
                arm,
                [runs[seed] for seed in sorted(runs)],
                list(seconds.values()),
                statistics.median(steps) * 1000 if steps else None,
                _ratio([(_last_step(results[big.name, seed]), _last_step(runs[seed])) for seed in both]),
                _ratio([(_computing(big, seed, results), seconds[seed]) for seed in both]),
                recovered(experiment, arm, results),
            )
        )
    return made


def _on_one_processor(run: RunResult, other: RunResult | None) -> bool:
    """Whether times may be compared, as far as the results tell."""
    return other is None or run.processor == other.processor


def _last_step(run: RunResult) -> float | None:
    """Computing seconds of the last training steps, one of them; a size with which nothing was trained has none."""
    trained = [phase for phase in run.phases if phase["steps"]]
    return trained[-1]["step_cpu_seconds"] if trained else None


def _computing(arm: Arm, seed: int, results: Results) -> float | None:
    """Computing seconds of all steps, each phase at its median, of the cuts, and of the teacher whom the run needs."""
    own = computing(results[arm.name, seed])
    if own is None or arm.teacher is None:
        return own
    teacher = results.get((arm.teacher, seed))
    teaching = None if teacher is None else computing(teacher)
    return None if teaching is None else own + teaching


def computing(run: RunResult) -> float | None:
    """Computing seconds of one run: of all steps, each phase at its median, and of the cuts; None unknown."""
    if _last_step(run) is None:
        return None
    typical = next(phase["step_cpu_seconds"] for phase in run.phases if phase["step_cpu_seconds"] is not None)
    return cutting(run) + sum(_passed(phase, "step_cpu_seconds", typical) for phase in run.phases)


def _passed(phase: Mapping[str, Any], kind: str, typical: float = 0.0) -> float:
    """Seconds of the steps of a phase by the medians of one kind, those of observed steps by their own."""
    usual, observed = phase[kind] or typical, phase.get("observed", 0)  # absent in results from before it was kept
    return (phase["steps"] - observed) * usual + observed * (phase.get(f"observed_{kind}") or usual)


def cutting(run: RunResult) -> float:
    """Computing seconds of the cuts of one run.

    They are stored with the seconds that passed, which are many times their computing time beside other work, and
    counted with the share of the processor that the run's steps had.
    """
    timed = [one for one in run.phases if one["step_cpu_seconds"] is not None and one.get("step_seconds")]
    passed = sum(_passed(one, "step_seconds") for one in timed)
    share = min(1.0, sum(_passed(one, "step_cpu_seconds") for one in timed) / passed) if passed else 1.0
    return share * run.reduction_seconds


def operations(runs: Sequence[RunResult]) -> float:
    """Floating point operations of all training steps, forward and backward; the mean over runs."""
    return statistics.fmean(sum(phase["steps"] * phase["flops"] for phase in run.phases) for run in runs)


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    ratios = [one / other for one, other in pairs if one is not None and other is not None]
    return statistics.median(ratios) if ratios else None


def header(results: Results) -> tuple[str, ...]:
    """What stands above the columns."""
    tested = f"test {scale(results.values()).heading}"
    return ("", "states", tested, "gap recovered", "paper", "difference", "step", "faster", "whole run", "seeds")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    paper = row.arm.paper
    return (
        row.arm.name + " †" * row.outdated,
        row.states,
        row.score,
        "" if row.recovered is None else str(row.recovered),
        "" if paper is None else f"{paper:.1f}",
        "" if paper is None else f"{statistics.fmean(row.scores) - paper:+.1f}",
        "" if row.step_ms is None else f"{row.step_ms:.0f} ms",
        "" if row.step_speedup is None else f"{row.step_speedup:.1f}×",
        "" if row.run_speedup is None else f"{row.run_speedup:.1f}×",
        str(len(row.runs)),
    )


def table(experiment: Experiment, results: Results) -> Table:
    """For the terminal, which is narrow: without columns that are empty, and with whole names."""
    lines, above = [cells(row) for row in rows(experiment, results)], header(results)
    used = [index for index in range(len(above)) if any(line[index] for line in lines)]
    made = Table(title=experiment.title, title_justify="left", padding=(0, 0))
    for index in used:
        made.add_column(above[index], justify="right" if above[index] else "left", no_wrap=not above[index])
    for line in lines:
        made.add_row(*(line[index] for index in used))
    return made


def render(experiment: Experiment, results: Results, picture: str | None = None) -> str:
    """For the documentation: title, table, what the columns are, the command, and the picture's address."""
    lines, above = [f"## {experiment.title}", ""], header(results)
    lines += ["| " + " | ".join(above) + " |", "|---|" + "---:|" * (len(above) - 1)]
    made = rows(experiment, results)
    lines += ["| " + " | ".join(cells(row)) + " |" for row in made]
    if any(row.outdated for row in made):
        lines += ["", "† made before cuts carried Adam's averages of eigenvalues over in their sizes: see the top."]
    steps = sorted({run.steps for run in results.values()})
    lines += [
        "",
        f"{' and '.join(f'{count:,}' for count in steps)} steps. Results of every run: `results/{experiment.name}/`.",
        "",
        "```console",
        f"compressm reproduce {experiment.name} --data DIRECTORY",
        "```",
    ]
    if picture is not None:
        name = scale(results.values()).name
        curves, trio = "over the steps, and against computing time", "of small, cut and big, in every setting"
        shows = trio if experiment.in_settings else curves
        lines += ["", f"![{name[0].upper()}{name[1:]} {shows}]({picture})"]
    for (arm, seed), run in results.items():
        if run.spectra:
            lines += ["", *_spectra(f"`{arm}`, seed {seed}", run.spectra)]
    return "\n".join(lines) + "\n"


def _spectra(title: str, record: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the Hankel singular values of every layer moved, at steps that double."""
    lines: list[str] = []
    for layer in record[0]["layers"]:
        settled = settled_at(record, layer)
        lines += [
            f"### Hankel singular values over training: {title}, {layer}",
            "",
            "Changes since the look before. *Moved* is the total change of the values over their sum; *bound* is "
            "Weyl's on the change of any of them and *largest change* the true one, both over the largest value; "
            "*crossings* is the share of pairs of state directions that changed places; *lower half* is the energy "
            f"share of the smallest half of the values. With a threshold of 2 % the spectrum held still from step "
            f"{'(never)' if settled is None else f'{settled:,}'} on.",
            "",
            "| step | largest value | states at τ = 0.02 | moved | bound | largest change | crossings | lower half |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for index in sorted({2**power for power in range(len(record).bit_length())} | {len(record) - 1}):
            entry = record[index] if index < len(record) else None
            if entry is None or layer not in entry["layers"]:
                continue
            values, change = entry["layers"][layer]["hsv"], entry["layers"][layer]["change"]
            cells = [
                f"{entry['step']:,}",
                f"{values[0]:.3g}",
                str(_states_at(values, entry["layers"][layer]["states"], 0.02)),
            ]
            if change is None:
                cells += [""] * 5
            else:
                cells += [
                    f"{100 * change['share_moved']:.1f} %",
                    f"{change['weyl_bound']:.3g}",
                    f"{change['largest_move']:.3g}",
                    f"{100 * change['crossings']:.1f} %",
                    f"{100 * change['bottom_share_after']:.2f} %",
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _states_at(hsv: Sequence[float], states: int, tolerance: float) -> int:
    """States that hold all but this share of the energy; two values are one state where a real system was balanced."""
    each = len(hsv) // states
    energies = [sum(hsv[each * state : each * (state + 1)]) for state in range(states)]
    kept, total = 0.0, sum(energies)
    for count, energy in enumerate(energies, 1):
        kept += energy
        if kept >= (1 - tolerance) * total:
            return count
    return len(energies)


__all__ = ["Results", "Row", "computing", "cutting", "operations", "render", "rows", "table"]
