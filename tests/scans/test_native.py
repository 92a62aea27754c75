"""Building the compiled kernels, and doing without them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from compressm.scans import native

PROGRAM = """
import torch
from compressm.scans import selective_scan
torch.manual_seed(0)
u, delta, B, C = torch.randn(2, 9, 3), torch.rand(2, 9, 3), torch.randn(2, 9, 4), torch.randn(2, 9, 4)
A = -torch.rand(3, 4)
reference = selective_scan(u, delta, A, B, C, engine="loop")
for _ in range(2):
    torch.testing.assert_close(selective_scan(u, delta, A, B, C), reference)
print("right")
"""


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "COMPRESSM_CACHE": str(cache), **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=settings, capture_output=True, text=True, check=True)


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
def test_builds_once_with_a_line_and_is_cached(tmp_path: Path) -> None:
    first, second = run(tmp_path / "new"), run(tmp_path / "new")
    assert first.stdout == second.stdout == "right\n"
    assert first.stderr.count("building the CPU kernels") == 1
    assert second.stderr == ""
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", pytest.param("false", marks=pytest.mark.slow)])
def test_without_a_compiler_one_warning_and_right_results(tmp_path: Path, compiler: str) -> None:
    result = run(tmp_path, CXX=compiler)
    assert result.stdout == "right\n"
    assert result.stderr.count("NativeKernelWarning") == 1
    assert "COMPRESSM_NATIVE=0" in result.stderr


@pytest.mark.slow
def test_can_be_switched_off_silently(tmp_path: Path) -> None:
    result = run(tmp_path, COMPRESSM_NATIVE="0")
    assert result.stdout == "right\n"
    assert result.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these options are of x86")
@pytest.mark.parametrize(("flags", "size"), [("-mno-avx512f", 32), ("-mno-avx", 16)])
def test_shorter_vectors_of_other_processors_are_right_too(tmp_path: Path, flags: str, size: int) -> None:
    environment = {**os.environ, "COMPRESSM_CACHE": str(tmp_path), "COMPRESSM_CXXFLAGS": flags}
    program = "from compressm.scans import native; print(native.vector_bytes())"
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(told.stdout) == min(size, native.vector_bytes())
    tests = Path(__file__).parents[1]
    files = (
        "scans/test_convolution.py",
        "scans/test_lti.py",
        "scans/test_selective.py",
        "layers/test_narrow.py",
        "scans/test_matrix_states.py",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile", *files]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
