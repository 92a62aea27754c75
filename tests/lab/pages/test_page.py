"""The report: what it reads, what it says, and that nothing in the data can become a part of the page."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest

from compressm import __version__
from compressm.cli import main
from compressm.errors import CheckpointError, ConfigError
from compressm.lab.pages import load_runs, write_page
from compressm.lab.pages.charts import comparison_charts, run_charts
from compressm.lab.pages.metrics import front
from compressm.lab.pages.page import _cards, _event, _row, _seconds, render
from compressm.lab.pages.words import in_words
from compressm.training.history import Cut, Ended, Event

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_every_chart_of_a_run(runs: Path) -> None:
    (run,) = load_runs([runs / "cut"])
    charts = {chart.title: chart for chart in run_charts(run)}
    assert list(charts) == [
        "Loss and accuracy", "State dimension", "Hankel singular values", "Eigenvalues in the unit disc",
        "Certificates", "Cost of a step",
    ]  # fmt: skip
    for chart in charts.values():
        for frames in chart.views.values():
            for frame in frames:  # plotly refuses what it does not know
                go.Figure(data=frame.traces, layout={**chart.layout, **frame.layout})
    assert list(charts["Hankel singular values"].views) == ["blocks.0.ssm", "blocks.1.ssm"]
    labels = [frame.label for frame in charts["Hankel singular values"].views["blocks.0.ssm"]]
    assert labels[0] == "step 0"
    assert any("→" in label for label in labels)
    cuts = [event for event in run.history if event["kind"] == "cut"]
    assert len(charts["Eigenvalues in the unit disc"].views["blocks.0.ssm"]) == len(cuts)
    shapes = charts["Loss and accuracy"].layout["shapes"]
    assert len(shapes) == len([event for event in run.history if event["kind"] in ("cut", "rolled_back")])


def test_a_roll_back_gives_the_states_back_in_the_picture(runs: Path) -> None:
    (run,) = load_runs([runs / "cut"])
    chart = next(chart for chart in run_charts(run) if chart.title == "State dimension")
    line = chart.views[""][0].traces[0]
    undone = next(event for event in run.history if event["kind"] == "rolled_back")
    cut = [event for event in run.history if event["kind"] == "cut" and event["step"] <= undone["step"]][-1]
    at = max(index for index, step in enumerate(line["x"]) if step <= undone["step"])
    assert line["y"][at] == cut["layers"][0]["states_before"] > cut["layers"][0]["states_after"]
    assert line["y"][-1] == load_runs([runs / "cut"])[0].result.state_dims[0]  # type: ignore[union-attr]


def test_a_cut_that_was_undone_is_called_so(runs: Path) -> None:
    (run,) = load_runs([runs / "cut"])
    fates = [event["kind"] for event in run.history if event["kind"] in ("kept", "rolled_back")]
    expected = [fate == "rolled_back" for fate in fates]
    assert len(run.cuts) == len(expected)
    charts = {chart.title: chart for chart in run_charts(run)}
    poles = [frame.label for frame in charts["Eigenvalues in the unit disc"].views["blocks.0.ssm"]]
    spectra = [frame.label for frame in charts["Hankel singular values"].views["blocks.0.ssm"] if "→" in frame.label]
    certificates = charts["Certificates"].views[""][0].traces[0]["text"]
    for labels in (poles, spectra, certificates):
        assert [label.endswith("states, undone") for label in labels] == expected


def test_eigenvalues_are_those_of_the_layer(runs: Path) -> None:
    (run,) = load_runs([runs / "cut"])
    for layer in run.cuts[0]["layers"]:
        assert len(layer["poles_before"]) == layer["states_before"] == 16
        assert len(layer["poles_after"]) == layer["states_after"]
        assert all(abs(complex(*pole)) < 1 for pole in layer["poles_before"] + layer["poles_after"])


def test_runs_are_compared(runs: Path) -> None:
    both = load_runs([runs / "cut", runs / "big"])
    _, states, seconds = comparison_charts(both)
    x = [trace["x"] for trace in states.views[""][0].traces[:-1]]
    assert x == [[sum(run.result.state_dims)] for run in both if run.result]
    assert [trace["y"] for trace in seconds.views[""][0].traces[:-1]] == [
        [100 * r.result.test_accuracy] for r in both if r.result
    ]
    assert comparison_charts(both[:1]) == []
    page = render(both, "compressm report")
    assert "Compared" in page
    assert "Compared" not in render(both[:1])


def test_the_pareto_front_is_of_runs_that_no_other_beats() -> None:
    draw = random.Random(0)
    points = [(float(draw.randrange(8)), float(draw.randrange(8))) for _ in range(30)]
    for metric, sign in (("accuracy", 1), ("perplexity", -1)):
        best = front(points, metric)  # type: ignore[arg-type]
        beaten = [
            one for one in points
            if any(a <= one[0] and sign * b >= sign * one[1] and (a, b) != one for a, b in points)
        ]  # fmt: skip
        assert best == sorted(set(points) - set(beaten))


def test_every_chart_is_told_in_words_and_tiles_are_those_of_the_table(runs: Path) -> None:
    both = load_runs([runs / "cut", runs / "big"])
    (run, result) = both[0], both[0].result
    assert result is not None
    assert result.savings is not None
    for chart in [*comparison_charts(both), *run_charts(run)]:
        assert all(len(line) > 20 for line in in_words(chart)), chart.title
    last = result.curve[-1]
    told = next(" ".join(in_words(chart)) for chart in run_charts(run) if chart.title == "Loss and accuracy")
    assert f"{100 * last['validation_accuracy']:.4g} at {result.steps:,}" in told
    cards, row = dict(_cards(run)), _row(run)
    assert cards["test accuracy"] == row["test"]
    assert cards["training"] == row["seconds"]
    assert cards["states"].endswith(row["states"])
    longer = result.savings["seconds_if_big"] / result.savings["seconds"]
    assert cards["training without cuts (estimate)"] == _seconds(longer * result.train_seconds)
    assert cards["a step"].startswith(f"{1000 * result.phases[0]['step_seconds']:.3g} → ")
    assert render(both).count('class="words"') == len(comparison_charts(both)) + sum(len(run_charts(r)) for r in both)
    assert not re.search(r"delete", render(both).partition('id="plotly"')[0])


def test_a_run_that_predicts_numbers_is_shown_by_its_own_metric(runs: Path, tmp_path: Path) -> None:
    content = json.loads((runs / "cut/result.json").read_text())
    content |= {"metric": "r2", "test_score": 0.75, "validation_score": 0.5, "test_accuracy": None}
    content["validation_accuracy"] = None
    for point in content["curve"]:
        point["validation_r2"] = point.pop("validation_accuracy")
    (tmp_path / "numbers.json").write_text(json.dumps(content))
    loaded = load_runs([tmp_path / "numbers.json", runs / "big"])
    page = render(loaded)
    assert "test R²" in page
    assert "0.75" in page
    assert comparison_charts(loaded) == []  # one has another metric


def test_the_page_is_whole_and_small(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(runs / "cut"), str(runs / "big"), "--output", str(out)]) == 0
    assert " MB)" in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert len(page) < 2.5e6
    assert not re.search(r"""(src|href)=["']?\s*(https?:)?//""", page)  # nothing is fetched
    for text in ("compressm train digits", "cut undone", "blocks.1.ssm", __version__):
        assert text in page


def test_fifty_runs_take_little_more_than_one(runs: Path, tmp_path: Path) -> None:
    text = (runs / "cut/result.json").read_text()
    for number in range(50):
        (tmp_path / f"run-seed{number}.json").write_text(text)
    fifty = load_runs([tmp_path])
    page = render(fifty)
    assert len(fifty) == 50
    assert len(page) < 4e6


def test_nothing_in_the_data_becomes_a_part_of_the_page(runs: Path, tmp_path: Path) -> None:
    content = json.loads((runs / "cut/result.json").read_text())
    text = json.dumps(content).replace("blocks.0.ssm", HOSTILE.replace("/", "\\/"))
    content = {
        **json.loads(text),
        "command": HOSTILE,
        "data": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "device": HOSTILE,
    }
    content["history"][0]["layers"][0]["reason"] = HOSTILE
    hostile = tmp_path / f"{HOSTILE.replace('/', '')}.json"
    hostile.write_text(json.dumps(content))
    page = render(load_runs([hostile]), HOSTILE)
    assert page.count("<script") == 3  # data, plotly, and the page's own
    assert "<img" not in page
    assert "alert(1)" in page


def test_energy_of_a_part_of_the_steps_is_said_to_be_that(runs: Path, tmp_path: Path) -> None:
    content = json.loads((runs / "big/result.json").read_text())
    for steps, label in ((90, "energy (estimate)"), (30, "energy (estimate, of 30 of 90 steps)")):
        content["energy"] = {"kwh": 1e-3, "steps": steps}
        (tmp_path / f"{steps}.json").write_text(json.dumps(content))
        assert label in render(load_runs([tmp_path / f"{steps}.json"]))


def test_a_saved_model_tells_its_history(runs: Path) -> None:
    (run,) = load_runs([runs / "cut/model"])
    assert run.result is None
    titles = [chart.title for chart in run_charts(run)]
    assert titles == ["State dimension", "Hankel singular values", "Eigenvalues in the unit disc", "Certificates"]
    assert "What the compressor did" in render([run])


@pytest.mark.parametrize(
    ("event", "details"),
    [
        (Cut(10, predicted_loss=0.0123), "predicted rise of the loss 0.012 nats"),
        (Cut(10, 0.0, (), 0.9, 0.85, 0.0123), "metric 0.9000 → 0.8500, predicted rise of the loss 0.012 nats"),
        (Ended(99, metric=0.9), "metric 0.9000; no cut was kept"),
    ],
)
def test_an_event_is_told_by_what_is_known_of_it(event: Event, details: str) -> None:
    assert _event(event.to_dict())["details"] == details


def test_a_folder_of_results(runs: Path, tmp_path: Path) -> None:
    for name in ("full-seed0", "full-seed1", "small-seed0"):
        (tmp_path / f"{name}.json").write_text((runs / "big/result.json").read_text())
    loaded = load_runs([tmp_path])
    assert [run.name for run in loaded] == ["full-seed0", "full-seed1", "small-seed0"]
    colours = [trace["marker"]["color"] for trace in comparison_charts(loaded)[1].views[""][0].traces[:-1]]
    assert colours[0] == colours[1] != colours[2]
    twice = load_runs([tmp_path / "full-seed0.json", tmp_path / "full-seed0.json"])
    assert len({run.name for run in twice}) == 2


def test_results_of_older_versions(runs: Path, tmp_path: Path) -> None:
    content = json.loads((runs / "cut/result.json").read_text())
    del content["spectra"]
    for event in content["history"]:
        for layer in event["layers"]:
            del layer["poles_before"], layer["poles_after"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    titles = [chart.title for chart in run_charts(load_runs([tmp_path / "old.json"])[0])]
    assert "Hankel singular values" in titles
    assert "Eigenvalues in the unit disc" not in titles


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "not the result"), ("{", "damaged"), ("{}", "damaged"), ("é".encode("latin-1"), "damaged")],
)
def test_damaged_results(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        load_runs([tmp_path])


def test_nothing_to_report(tmp_path: Path, runs: Path) -> None:
    (tmp_path / "killed" / "checkpoints" / "step-0000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a run that has not ended yet; go on with compressm train --resume"):
        load_runs([tmp_path / "killed"])
    with pytest.raises(ConfigError, match="neither a run's folder nor a result file"):
        load_runs([tmp_path])
    with pytest.raises(ConfigError, match="no run"):
        write_page([], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(load_runs([runs / "big"]), tmp_path / "none/report.html")
