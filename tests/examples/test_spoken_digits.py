"""The spoken digits' story, in small: made-up recordings through the real scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLE = Path(__file__).parents[2] / "examples" / "spoken_digits"
# Runs a script with torch, onnx and this package out of its reach.
HIDE = "import runpy, sys; sys.modules.update(torch=None, compressm=None, onnx=None); sys.argv = sys.argv[1:]; "
WITHOUT_TORCH = HIDE + "runpy.run_path(sys.argv[0], run_name='__main__')"


def recording(path: Path, digit: int, generator: np.random.Generator) -> None:
    """A chord that stands for a digit, with noise, 0.25 to 0.35 s long."""
    seconds = np.arange(generator.integers(2000, 2800)) / 8000
    tone = sum(np.sin(2 * np.pi * hertz * seconds) for hertz in (300 + 150 * digit, 2000 + 170 * digit))
    samples = 0.2 * tone + 0.01 * generator.normal(size=len(seconds))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((32767 * samples).astype("<i2").tobytes())


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_train_shrink_export_recognise(tmp_path: Path) -> None:
    generator, data, output = np.random.default_rng(0), tmp_path / "recordings", tmp_path / "digits"
    data.mkdir()
    for digit in range(10):
        for speaker in ("ann", "bob", "theo"):
            for take in (0, 5, 10, 11, 12, 13):
                recording(data / f"{digit}_{speaker}_{take}.wav", digit, generator)
    arguments = ["--data", str(data), "--output", str(output), "--steps", "150", "--states", "32"]
    trained = run(str(EXAMPLE / "train.py"), *arguments)
    assert trained.returncode == 0, trained.stderr

    result = json.loads((output / "result.json").read_text())
    assert max(result["state_dims"]) < 32
    assert result["model-step.onnx"]["max_error"] < 1e-4
    assert result["model-step.onnx"]["test"] >= 0.9
    assert result["model-step-int8.onnx"]["bytes"] < result["model-step.onnx"]["bytes"]

    clips = [data / f"{digit}_theo_0.wav" for digit in range(10)]
    recognise = ("-c", WITHOUT_TORCH, str(EXAMPLE / "recognise.py"), str(output / "model-step.onnx"))
    heard = run(*recognise, *map(str, clips))
    assert heard.returncode == 0, heard.stderr
    answers = [line.split()[1] for line in heard.stdout.splitlines()]
    assert sum(answer == str(digit) for digit, answer in enumerate(answers)) >= 9

    (tmp_path / "noise.wav").write_bytes(b"not audio")
    refused = run(*recognise, str(tmp_path / "noise.wav"))
    assert refused.returncode == 2
    assert "noise.wav: not a WAV file" in refused.stderr
