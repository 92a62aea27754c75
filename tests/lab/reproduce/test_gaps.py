"""Shares of the gap against their definition, and what the stored results say of how they were selected."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from compressm.lab.reproduce import EXPERIMENTS, Arm, Experiment, plan_runs, read_results
from compressm.lab.reproduce.gaps import Recovered, recovered
from compressm.lab.reproduce.grid import configuration
from compressm.lab.reproduce.overview import cut_while_training, draw_overview, method_shares, sentences
from compressm.lab.reproduce.tables import Results
from compressm.lab.runs.same_settings import differences
from compressm.observing.scores import better

ROOT = Path(__file__).parents[3]
THREE = Experiment("three", "Three", "digits", (Arm("full", {}), Arm("small", {}), Arm("cut", {}, small="small")))
STORED = sorted(path for name in EXPERIMENTS for path in (ROOT / "results" / name).glob("*.json"))


def runs(full: Any, small: Any, cut: Any, metric: str = "accuracy") -> Results:
    """Runs of these test scores, seed by seed; accuracies in percent."""
    unit = 100 if metric == "accuracy" else 1
    columns = {"full": full, "small": small, "cut": cut}
    made = {
        (name, seed): SimpleNamespace(metric=metric, score=value / unit)
        for name, values in columns.items()
        for seed, value in enumerate(values)
    }
    return cast("Results", made)


def test_it_is_the_share_of_the_mean_gap() -> None:
    share = recovered(THREE, THREE.arms[2], runs([90, 92], [80, 84], [88, 89]))
    assert share is not None
    assert share.gap == pytest.approx(9)
    assert share.share == pytest.approx(6.5 / 9)
    assert share.half_width is None  # two seeds
    assert str(share) == "72 %"


def test_only_seeds_that_all_three_have_count() -> None:
    share = recovered(THREE, THREE.arms[2], runs([90], [80, 0], [85, 100, 100]))
    assert share is not None
    assert (share.seeds, share.share) == (1, pytest.approx(0.5))
    assert recovered(THREE, THREE.arms[2], runs([], [80], [85])) is None
    assert recovered(THREE, THREE.arms[0], runs([90], [80], [85])) is None


def test_an_arm_may_name_the_big_one_of_its_gap() -> None:
    own = Arm("cut", {}, small="small", big="own")
    four = Experiment("four", "Four", "digits", (Arm("full", {}), Arm("own", {}), Arm("small", {}), own))
    stored = {**runs([99], [80], [85]), ("own", 0): SimpleNamespace(metric="accuracy", score=0.9)}
    share = recovered(four, own, cast("Results", stored))
    assert share is not None
    assert share.share == pytest.approx(0.5)


def test_arms_of_one_setting_are_compared_with_its_big_one() -> None:
    arms = [Arm(f"{kind}-{rate}", {}) for rate in ("slow", "fast") for kind in ("big", "small")]
    arms += [Arm(f"cut-{rate}", {}, small=f"small-{rate}", big=f"big-{rate}") for rate in ("slow", "fast")]
    settings = Experiment("settings", "Settings", "digits", (*arms, Arm("other", {}, small="small-fast")))
    for rate in ("slow", "fast"):
        bigs = {settings.big_of(settings.arm(f"{kind}-{rate}")).name for kind in ("big", "small", "cut")}
        assert bigs == {f"big-{rate}"}
    assert settings.big_of(settings.arm("other")).name == "big-slow"
    assert {THREE.big_of(arm).name for arm in THREE.arms} == {THREE.arms[0].name}


def test_no_share_of_a_gap_below_one_point() -> None:
    share = recovered(THREE, THREE.arms[2], runs([80.9] * 3, [80] * 3, [80.5] * 3))
    assert share is not None
    assert (share.share, share.half_width, str(share)) == (None, None, "no gap")


def test_of_perplexities_the_logarithm_counts_and_less_is_better() -> None:
    """A cut that is half way between small and big in nats; as good as big; and two percent that are a gap, of which
    half a percent is none."""
    share = recovered(THREE, THREE.arms[2], runs([4.0], [9.0], [6.0], "perplexity"))
    assert share is not None
    assert share.gap == pytest.approx(100 * np.log(9 / 4))
    assert share.share == pytest.approx(0.5)
    for small, expected in ((4.08, 1.0), (4.02, None)):
        share = recovered(THREE, THREE.arms[2], runs([4.0], [small], [4.0], "perplexity"))
        assert share is not None
        assert share.share == (None if expected is None else pytest.approx(expected))


def test_the_interval_covers_the_true_share_as_often_as_it_says() -> None:
    draws, true, covered, generator = 2000, 0.7, 0, np.random.default_rng(0)
    for _ in range(draws):
        seed = generator.normal(0, 1, 3)  # what all three runs of a seed share
        full, small, cut = (mean + seed + generator.normal(0, 0.5, 3) for mean in (90.0, 80.0, 80 + 10 * true))
        share = recovered(THREE, THREE.arms[2], runs(full, small, cut))
        assert share is not None
        assert share.share is not None
        assert share.half_width is not None
        covered += abs(share.share - true) <= share.half_width
    assert covered / draws == pytest.approx(0.95, abs=0.02)  # four standard deviations of the count


def test_rivals_and_random_choices_are_not_the_method() -> None:
    method = {arm.name for arm in EXPERIMENTS["rivals"].arms if cut_while_training(arm)}
    assert method == {"shrunk"}
    assert {arm.name for arm in EXPERIMENTS["rivals-short"].arms if cut_while_training(arm)} == {"loss", "white"}
    assert {arm.name for arm in EXPERIMENTS["mamba"].arms if cut_while_training(arm)} == {"shrunk"}


def test_every_small_counterpart_exists() -> None:
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            for other in (arm.small, arm.big):
                assert other is None or experiment.arm(other) is not arm


def read_run(share: Recovered) -> dict[str, Any]:
    path = ROOT / "results" / share.experiment / f"{share.arm}-seed0.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_overview_says_what_is_stored(tmp_path: Path) -> None:
    read = {name: (one, read_results(one, ROOT / "results")) for name, one in EXPERIMENTS.items()}
    found = {name: both for name, both in read.items() if both[1]}
    text = "\n".join(sentences(found))
    assert len(sentences(found)) == 5
    shares = method_shares(found)
    gaps = [one.share for one in shares if one.share is not None]
    assert f"In {len(gaps)} of {len(shares)} comparisons" in text
    assert f"{100 * np.median(gaps):.0f} % of that gap" in text
    groups: dict[tuple[Any, ...], dict[bool, list[float]]] = {}
    for one in shares:
        if one.share is not None and one.half_width is not None:
            cut, arm = read_run(one)["config"]["compression"], EXPERIMENTS[one.experiment].arm(one.arm)
            group = groups.setdefault((one.experiment, arm.small, cut["window"]), {True: [], False: []})
            group[cut.get("gramians") == "loss"].append(one.share)
    both = [group for group in groups.values() if all(group.values())]
    for kind, words in ((True, "by the loss"), (False, "by white noise or second moments")):
        each = [share for one in both for share in one[kind]]
        assert f"{words} {100 * np.median(each):.0f} % in the median" in text
    for one in shares:
        assert one.share is not None or f"`{one.experiment}`" in text
    draw_overview(found, tmp_path / "o.svg")
    assert (tmp_path / "o.svg").stat().st_size > 10_000


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nothing_was_selected_on_test_data(path: Path) -> None:
    """The curve knows validation only, and the model that was tested is the best or last of it by validation."""
    run = json.loads(path.read_text(encoding="utf-8"))
    assert not [key for point in run["curve"] for key in point if "test" in key]
    assert not [event for event in run["history"] if "test" in json.dumps(event)]
    metric = run.get("metric", "accuracy")  # the only one, before runs said which
    score = run.get("validation_score", run["validation_accuracy"])
    if run["config"]["run"].get("select") == "best":
        cuts = [event["step"] for event in run["history"] if event["kind"] in ("cut", "rolled_back")]
        since = max(cuts, default=0)
        of_this_size = [p[f"validation_{metric}"] for p in run["curve"] if p["step"] >= since]
        best = max(of_this_size) if better(metric) == "max" else min(of_this_size)
        assert score == pytest.approx(best, abs=1e-9)
    else:
        assert score == pytest.approx(run["curve"][-1][f"validation_{metric}"], abs=1e-9)


def test_runs_from_before_cuts_could_be_limited_are_those_of_today(tmp_path: Path) -> None:
    """With a rule about sizes, no limit of one cut and a limit of all states are the same settings."""
    for name, arm in (("ablation-loss", "loss12"), ("ablation-loss", "loss6"), ("rivals", "shrunk")):
        (run,) = plan_runs(EXPERIMENTS[name], range(1), [arm], ROOT / "results", tmp_path)
        config = configuration(run)
        stored = json.loads((ROOT / "results" / name / f"{arm}-seed0.json").read_text(encoding="utf-8"))
        assert [key for key, *_ in differences(stored["config"], config) if key != "run.steps"] == []
