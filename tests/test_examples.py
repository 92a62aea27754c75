"""The examples, as they stand, for a few steps each: they run, cut, and mark their three lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import torchrun

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"lightning_lru.py": "lightning", "accelerate_ddp.py": "accelerate", "hf_trainer_mamba.py": "transformers"}
ON_DIGITS = ("plain_pytorch.py", "lightning_lru.py", "accelerate_ddp.py")
IN_LOOPS = (*ON_DIGITS, "hf_trainer_mamba.py")


def run(tmp_path: Path, *command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("name", IN_LOOPS)
def test_is_short_and_marks_its_three_lines(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.count("\n") < 80
    for number in (1, 2, 3):
        assert len(re.findall(rf"# \({number}\)", text)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_DIGITS)
def test_runs_and_cuts(tmp_path: Path, name: str) -> None:
    pytest.importorskip(NEEDS.get(name, "sklearn"))
    output = run(tmp_path, str(EXAMPLES / name), "--quick")
    assert len(re.findall(r"step \d+: cut, states", output)) == 4
    (final,) = re.findall(r"test accuracy 0\.\d+ with states \[(\d+)\]", output)
    assert int(final) < 64


@pytest.mark.slow
def test_a_trainer_cuts_and_plain_transformers_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = run(tmp_path, str(EXAMPLES / "hf_trainer_mamba.py"), "--quick")
    assert len(re.findall(r"step \d+: cut, states", output)) == 4
    assert re.search(r"test loss \d\.\d+ bits per byte with states \[16, 16\]", output)
    assert output.count("The ") >= 1


@pytest.mark.slow
def test_two_processes_run_and_cut(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    output = torchrun(2, EXAMPLES / "accelerate_ddp.py", "--quick", cwd=tmp_path)
    assert output.count("cut, states") == 4  # said once, not twice


@pytest.mark.slow
def test_system_identification_runs_on_a_record_of_its_form(tmp_path: Path) -> None:
    # A tank that drains by the square root of its level, in the columns of the cascaded tanks benchmark.
    rng, level, rows = np.random.default_rng(0), 4.0, list[list[float]]()
    for _ in range(2048):
        inflow = float(rng.uniform(0.5, 4))
        level = max(0.0, level + 0.3 * (inflow - level**0.5))
        rows.append([inflow, level])
    table = np.array(rows)
    folder = tmp_path / "cascaded_tanks"
    folder.mkdir()
    columns = [table[:1024, :1], table[1024:, :1], table[:1024, 1:], table[1024:, 1:]]
    np.savetxt(folder / "dataBenchmark.csv", np.hstack(columns), "%.6g", ",", header="uEst,uVal,yEst,yVal", comments="")
    result = tmp_path / "result.json"
    script = str(EXAMPLES / "system_identification.py")
    run(tmp_path, script, "--data", ".", "--task", "tanks", "--quick", "--json", str(result))
    found = json.loads(result.read_text())
    assert found["big"]["states"] == [64, 64]
    assert max(found["shrunk"]["states"]) <= 8
    assert 0 < found["linear"]["test"] < 1
    for arm in ("big", "shrunk", "small", "random"):
        assert found[arm]["test"] > 0
        assert found[arm]["step_microseconds"] > 0
