"""Which share of the gap between a small model and a big one a way of training recovers.

    share = mean(x - small) / mean(big - small)

over the seeds that all three have, by the test data: in percentage points of accuracy, or in hundredths of the
logarithm of the perplexity, which are percent of it. Its 95 % interval is that of a ratio of
paired means by the delta method: the residuals ``x - small - share (big - small)`` have mean zero, and their standard
error, over the mean gap, times Student's quantile, is the half width (Cochran, Sampling Techniques, 1977, section 6.3).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from compressm.lab.reproduce.experiments import Arm, Experiment
from compressm.lab.reproduce.scale import scale
from compressm.lab.runs.result import RunResult

Results = Mapping[tuple[str, int], RunResult]  # by arm and seed

SMALLEST_GAP = 1.0  # points, or percent of the perplexity: below it three seeds could not show what is recovered
FEWEST_SEEDS = 3  # below it no interval is given


@dataclass(frozen=True)
class Recovered:
    """A share of the gap.

    Attributes:
        experiment: its name.
        arm: the arm's name.
        gap: how much better the big model is than the small one, the mean over seeds; see `scale` for its unit.
        gained: how much better this arm is than the small one, likewise.
        half_width: of the share's 95 % interval; None with fewer than `FEWEST_SEEDS` seeds, or without a gap.
        seeds: how many seeds big, small and this arm all have.
    """

    experiment: str
    arm: str
    gap: float
    gained: float
    half_width: float | None
    seeds: int

    @property
    def share(self) -> float | None:
        """1 where it is as good as the big model, 0 as the small one; None where the gap is below `SMALLEST_GAP`."""
        return self.gained / self.gap if self.gap >= SMALLEST_GAP else None

    def __str__(self) -> str:
        if self.share is None:
            return "no gap"
        spread = "" if self.half_width is None else f" ± {100 * self.half_width:.0f}"
        return f"{100 * self.share:.0f}{spread} %"


def recovered(experiment: Experiment, arm: Arm, results: Results) -> Recovered | None:
    """The share that an arm recovers; None where no seed has it, its ``small`` and its ``big``."""
    if arm.small is None:
        return None
    trio = (arm.name, arm.small, experiment.big_of(arm).name)
    seeds = sorted(seed for name, seed in results if name == arm.name and all((one, seed) in results for one in trio))
    if not seeds:
        return None
    worth = scale(results.values()).worth
    mine, small, big = ([worth(results[name, seed].score) for seed in seeds] for name in trio)
    gains = [one - other for one, other in zip(mine, small, strict=True)]
    gaps = [one - other for one, other in zip(big, small, strict=True)]
    return Recovered(
        experiment.name, arm.name, statistics.fmean(gaps), statistics.fmean(gains), _half_width(gains, gaps), len(seeds)
    )


def _half_width(gains: list[float], gaps: list[float]) -> float | None:
    count, gap = len(gains), statistics.fmean(gaps)
    if count < FEWEST_SEEDS or gap < SMALLEST_GAP:
        return None
    from scipy.stats import t

    share = statistics.fmean(gains) / gap
    residuals = [gain - share * one for gain, one in zip(gains, gaps, strict=True)]
    return float(t.ppf(0.975, count - 1)) * statistics.stdev(residuals) / (count**0.5 * gap)


def all_recovered(found: Mapping[str, tuple[Experiment, Results]]) -> list[Recovered]:
    """Every share of every experiment, in the experiments' order."""
    shares = (recovered(one, arm, results) for one, results in found.values() for arm in one.arms)
    return [share for share in shares if share is not None]


__all__ = ["FEWEST_SEEDS", "SMALLEST_GAP", "Recovered", "Results", "all_recovered", "recovered"]
