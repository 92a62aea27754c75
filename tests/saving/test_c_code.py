"""C code of a system: compiled here, and run against scipy."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.signal as signal

from compressm import DiagonalSystem
from compressm.errors import ExportError
from compressm.saving.c_code import to_c

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def system() -> DiagonalSystem:
    A = np.array([[0.9, 0.3, 0], [-0.3, 0.9, 0.1], [0, 0, 0.5]])
    return DiagonalSystem.from_abcd(A, [[1, 0], [0, 2], [1, 1]], [[1, 0, 1], [0, 1, 0]], [[0, 0.5], [0, 0]], dt=0.01)


@needs_compiler
def test_the_compiled_step_computes_what_scipy_computes(tmp_path: Path) -> None:
    report = to_c(system(), tmp_path / "plant.c")
    library = tmp_path / "plant.so"
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(tmp_path / "plant.c")]
    subprocess.run([*command, "-o", str(library)], check=True)
    step = ctypes.CDLL(str(library)).plant_step
    u = np.random.default_rng(1).standard_normal((300, 2)).astype(np.float32)
    state, y, outputs = np.zeros(3, np.float32), np.zeros(2, np.float32), []
    for inputs in u:
        step(*(array.ctypes.data_as(ctypes.c_void_p) for array in (state, inputs, y)))
        outputs.append(y.copy())
    np.testing.assert_allclose(outputs, signal.dlsim(system().to_scipy(), u)[1], atol=2e-4)
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert (report.order, report.inputs, report.outputs, report.state_bytes) == (3, 2, 2, 12)
    assert "ns a step here" in str(report)


@needs_compiler
def test_outputs_may_be_written_over_the_inputs(tmp_path: Path) -> None:
    to_c(system(), tmp_path / "plant.c")
    library = tmp_path / "plant.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(tmp_path / "plant.c"), "-o", str(library)], check=True)
    step = ctypes.CDLL(str(library)).plant_step
    u = np.random.default_rng(1).standard_normal((300, 2)).astype(np.float32)
    state, samples = np.zeros(3, np.float32), u.copy()
    for sample in samples:
        step(*(array.ctypes.data_as(ctypes.c_void_p) for array in (state, sample, sample)))
    np.testing.assert_allclose(samples, signal.dlsim(system().to_scipy(), u)[1], atol=2e-4)


@needs_compiler
def test_an_input_that_nothing_reads_gives_no_warning(tmp_path: Path) -> None:
    to_c(DiagonalSystem.from_abcd([[0.5]], [[1.0, 0.0]], [[3.0]]), tmp_path / "half.c")
    command = ["cc", "-std=c99", "-pedantic", "-Wall", "-Werror", "-shared", "-fPIC", str(tmp_path / "half.c")]
    subprocess.run([*command, "-o", str(tmp_path / "half.so")], check=True)


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [("a.c", "no name", "is no name in C"), ("missing/a.c", None, "cannot be written"), ("2.c", None, "pass name=")],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, path: str, name: str | None, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        to_c(system(), tmp_path / path, name=name)


def test_a_complex_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="complex output"):
        to_c(DiagonalSystem.from_abcd([[0.5j]], [[1.0]], [[1.0]]), tmp_path / "a.c")
