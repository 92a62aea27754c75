"""The suites as a whole: every row names something that exists, and the command runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path

import pytest

from compressm.cli import main
from compressm.lab.bench.results import markdown, plot
from compressm.lab.bench.suites import SUITES, sweep

CASES = [case for suite in SUITES.values() for case in suite("cpu")]
SWEEPS = [point for suite in SUITES for point in sweep(suite, "cpu")]
EXTRAS = {
    "peers_jax": ["optax"],
    "peers_hf": ["transformers"],
    "peers_pymor": ["pymor"],
    "peers_fla": ["fla", "triton"],
    "mamba2_training": ["transformers"],
}


def test_names_are_unique_and_say_their_suite() -> None:
    names = [case.name for case in CASES] + [point.case.name for point in SWEEPS]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == set(SUITES)


def test_every_side_can_be_called() -> None:
    """A side's arguments are those of its function, and survive JSON."""
    for case in [*CASES, *(point.case for point in SWEEPS)]:
        for side in (case.ours, case.peer_side):
            module, function = side.build.split(":")
            if all(importlib.util.find_spec(needed) for needed in EXTRAS.get(module.rsplit(".", 1)[1], [])):
                inspect.signature(getattr(importlib.import_module(module), function)).bind(**side.arguments)
            assert json.loads(json.dumps(side.arguments)) == side.arguments
        assert case.work.flops > 0


def test_sweeps_change_one_size_at_a_time() -> None:
    for point in SWEEPS:
        assert point.case.ours.arguments[point.axis] == point.value


ROW = {
    "name": "lru/row",
    "ours_ms": 2.0,
    "ours_quartiles_ms": [1.9, 2.2],
    "repetitions": 30,
    "peer": "a | peer",
    "peer_ms": 250.0,
    "peer_quartiles_ms": [240.0, 260.0],
    "peer_repetitions": 10,
    "ratio": 125.0,
    "roofline_ms": 1.0,
    "of_roofline": 2.0,
    "peak_mb": 20.0,
    "peer_peak_mb": 300.0,
    "reason": None,
    "traffic_mb": 0.5,
}
NOT_MEASURED = dict.fromkeys(("peer_ms", "peer_quartiles_ms", "ratio", "peer_peak_mb"))
MISSING = {**ROW, **NOT_MEASURED, "reason": "peer: not there"}
RESULT = {
    "command": "compressm bench lru",
    "machine": {"cpu": "a processor", "threads": 2},
    "rates": {"gflops": 100.0, "gexps": 1.0, "gbytes": 20.0},
    "rows": [ROW, MISSING],
    "sweep": [
        {**row, "suite": "lru", "axis": "n", "value": value, "sizes": {"n": value, "batch": 8}}
        for value, row in ((8, ROW), (16, ROW), (32, MISSING))
    ],
}


def test_markdown() -> None:
    text = markdown(RESULT)
    assert "| lru/row | 2.00 (1.90–2.20) | a \\| peer | 250 (240–260) | 125 | 1.00 | 2.00 | 20.0 | 300 | 0.50 |" in text
    assert "| lru/row | 2.00 (1.90–2.20) | a \\| peer | – | – | 1.00 | 2.00 | 20.0 | – | 0.50 |" in text
    assert "- lru/row: peer: not there" in text
    assert "compressm bench lru" in text


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(RESULT, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lur"], "suite 'lur' is not known; choose from lru"),
        (["lru", "--only", "nothing"], "no row's name contains 'nothing'"),
        (["lru", "--plot", "x.png"], "add --sweep"),
        (["lru", "--markdown", "no/such/folder/x.md"], "its folder does not exist"),
        (["lru", "--device", "tpu"], "device 'tpu' is not there"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    """The smallest rows, for real: one against a peer, one against ourselves, and two points of a sweep."""
    target, table = tmp_path / "bench.json", tmp_path / "bench.md"
    only = ["--only", "batch1"]
    assert main(["bench", "ssd", "--quick", "--sweep", *only, "--json", str(target), "--markdown", str(table)]) == 0
    result = json.loads(target.read_text(encoding="utf-8"))
    assert result["command"].startswith("compressm bench ssd --quick --sweep --only batch1")
    assert result["versions"]["torch"]
    assert result["rates"]["gflops"] > 0
    assert [point["value"] for point in result["sweep"]] == [1, 16]
    for row in result["sweep"]:
        assert row["ours_ms"] > 0
        assert row["of_roofline"] == pytest.approx(row["ours_ms"] / row["roofline_ms"], rel=1e-3)
        if row["peer_ms"] is not None:
            assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"], rel=1e-3)
        else:
            assert "pip install" in row["reason"]
    assert str(tmp_path) not in json.dumps({key: value for key, value in result.items() if key != "command"})
