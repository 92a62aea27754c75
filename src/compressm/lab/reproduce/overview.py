"""The first screen of the results: one figure and five sentences, computed from all that is stored."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressm.lab.reproduce.experiments import Arm, Experiment
from compressm.lab.reproduce.gaps import FEWEST_SEEDS, SMALLEST_GAP, Recovered, all_recovered
from compressm.lab.reproduce.tables import Results, rows
from compressm.runtime.files import replacing

Found = Mapping[str, tuple[Experiment, Results]]

LITTLE = 0.25  # a share below it is called little
SHOWN = (-0.6, 2.2)  # the figure's shares


def cut_while_training(arm: Arm) -> bool:
    """Whether an arm is the method itself: not a rival, not a choice of states that serves for comparison."""
    at_the_end = "compression.start" in arm.changes  # see `after`; the penalty's arms are cut there too
    selected = arm.changes.get("compression.selection", "hankel") == "hankel"
    return arm.small is not None and selected and not at_the_end and arm.teacher is None


def method_shares(found: Found) -> list[Recovered]:
    """The shares of all arms that are cut while they train."""
    arms = {(name, arm.name) for name, (one, _) in found.items() for arm in one.arms if cut_while_training(arm)}
    return [share for share in all_recovered(found) if (share.experiment, share.arm) in arms]


def sentences(found: Found) -> list[str]:
    """What a busy reader takes away; five sentences, of which those without anything to say are left out."""
    shares = method_shares(found)
    gaps = [one for one in shares if one.share is not None]
    certain = [one for one in gaps if one.half_width is not None]
    little = [one for one in gaps if one.share is not None and one.share < LITTLE]
    absent = [one for one in shares if one.share is None]
    made = []
    if gaps:
        middle = statistics.median(one.share for one in gaps if one.share is not None)
        made.append(
            f"In {len(gaps)} of {len(shares)} comparisons of a cut model with a big and a small one, the big one is at "
            f"least {SMALLEST_GAP:.0f} point of accuracy, or percent of perplexity, better than the one that is small "
            f"from the start; cut to its size while it trains, the big one keeps {100 * middle:.0f} % of that gap in "
            "the median. Several ways to cut may share a gap."
        )
    if certain:
        loss, without = "by the loss", "by white noise or second moments"
        kinds: dict[str, list[float]] = {loss: [], without: []}
        for one in _with_and_without(certain, found):
            kinds[loss if by_the_loss(one, found) else without].append(one.share or 0.0)
        each = ", ".join(f"{kind} {_spread(shares)}" for kind, shares in kinds.items() if shares)
        told = f"where both were run at one size and time, cuts keep {each}; " if each else ""
        made.append(
            f"{len(certain)} of these rest on {FEWEST_SEEDS} seeds or more: {told}the figure has the 95 % intervals, "
            "and all other comparisons rest on fewer seeds."
        )
    if little:
        each = ", ".join(f"{name} ({_percents(some)})" for name, some in _by_experiment(little).items())
        made.append(f"Less than {100 * LITTLE:.0f} % of the gap is kept in {len(little)} of them: {each}.")
    if absent:
        whole = {one.experiment for one in shares} - {one.experiment for one in gaps}
        each = ", ".join(
            name if some[0].experiment in whole else f"{len(some)} of {name}"
            for name, some in _by_experiment(absent).items()
        )
        made.append(
            f"Without a gap there is nothing to keep: in {each} a model that is small from the start is as good, and "
            "training small is the better choice."
        )
    faster = _speedups(found)
    if faster:
        made.append(
            f"The whole training, cuts included, takes {1 / statistics.median(faster):.2f} of the big one's computing "
            f"time in the median ({1 / max(faster):.2f} to {1 / min(faster):.2f})."
        )
    return made


def _speedups(found: Found) -> list[float]:
    """Of all arms that are cut while they train: how much less computing the whole run takes than the big one's."""
    all_rows = [row for one, results in found.values() for row in rows(one, results)]
    return [row.run_speedup for row in all_rows if cut_while_training(row.arm) and row.run_speedup is not None]


def by_the_loss(share: Recovered, found: Found) -> bool:
    """Whether the loss decided what was cut."""
    experiment, _ = found[share.experiment]
    return experiment.arm(share.arm).changes.get("compression.gramians") == "loss"


def _with_and_without(shares: Sequence[Recovered], found: Found) -> list[Recovered]:
    """Those that differ in the loss alone: arms to one size, cut at one time, of which some are by the loss and some
    are not. Otherwise early and late cuts without the loss would stand against the best with it."""
    groups: dict[tuple[str, object, object], list[Recovered]] = {}
    for one in shares:
        arm = found[one.experiment][0].arm(one.arm)
        groups.setdefault((one.experiment, arm.small, arm.changes.get("compression.window")), []).append(one)
    both = (some for some in groups.values() if len({by_the_loss(one, found) for one in some}) == 2)
    return [one for some in both for one in some]


def _spread(shares: Sequence[float]) -> str:
    """Median and range, in percent."""
    low, middle, high = (100 * one for one in (min(shares), statistics.median(shares), max(shares)))
    return f"{middle:.0f} % in the median ({low:.0f} to {high:.0f} %, {len(shares)} comparisons)"


def _by_experiment(shares: Sequence[Recovered]) -> dict[str, list[Recovered]]:
    """Those of one experiment under its name, as it is written in the sentences."""
    found: dict[str, list[Recovered]] = {}
    for one in shares:
        found.setdefault(f"`{one.experiment}`", []).append(one)
    return found


def _percents(shares: Sequence[Recovered]) -> str:
    """Arm by arm, with intervals where there are any."""
    return ", ".join(f"{one.arm} {one}" for one in shares)


def draw_overview(found: Found, picture: Path) -> None:
    """One line for every comparison with a gap and enough seeds: the share that is kept, with its interval.

    Comparisons of fewer seeds are drawn, as hollow points, only where there are no others.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    shares = [one for one in method_shares(found) if one.share is not None]
    shares = [one for one in shares if one.half_width is not None] or shares
    figure, axis = plt.subplots(figsize=(6, 1.1 + 0.32 * len(shares)), layout="constrained")
    for line, one in enumerate(reversed(shares)):
        _point(axis, line, one, "tab:orange" if by_the_loss(one, found) else "tab:blue")
    labels = [f"{one.experiment} · {one.arm} (gap {one.gap:.1f}, n = {one.seeds})" for one in reversed(shares)]
    axis.set_yticks(range(len(shares)), labels, fontsize=8)
    for at, name in ((0.0, "small"), (1.0, "big")):
        axis.axvline(at, color="0.6", linewidth=1, zorder=0)
        axis.text(at, len(shares) - 0.35, name, ha="center", va="bottom", fontsize=8, color="0.4")
    axis.set(
        xlim=SHOWN, ylim=(-0.7, len(shares) + 0.3),
        xlabel="share of the gap kept",
    )  # fmt: skip
    figure.supxlabel(f"orange: by the loss, blue: without it; {FEWEST_SEEDS} seeds or more, 95 % intervals", fontsize=9)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "overview"}), replacing(picture) as new:
        figure.savefig(new, metadata={"Date": None} if picture.suffix == ".svg" else None, format=picture.suffix[1:])
    plt.close(figure)


def _point(axis: Any, line: int, one: Recovered, colour: str) -> None:
    """A dot, and its interval."""
    assert one.share is not None
    at = min(max(one.share, SHOWN[0] + 0.03), SHOWN[1] - 0.03)
    filled = one.half_width is not None
    axis.plot(at, line, "o", color=colour, markerfacecolor=colour if filled else "white", markersize=6)
    if one.half_width is not None:
        axis.plot([at - one.half_width, at + one.half_width], [line, line], color=colour, linewidth=1.5, zorder=1)


def render_overview(found: Found, picture: str) -> str:
    """For the documentation: the figure, and the sentences below it."""
    lines: Sequence[str] = [f"{number}. {sentence}" for number, sentence in enumerate(sentences(found), 1)]
    text = "\n".join([f"![Which share of the gap between small and big is kept]({picture})", "", *lines])
    return f"{text}\n\nWhat did not work has a [page of its own](negative.md).\n"


__all__ = ["cut_while_training", "draw_overview", "method_shares", "render_overview", "sentences"]
