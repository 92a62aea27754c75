"""Which engine of `lti_scan` a machine's measured rates choose, and what a cut changes about it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from compressm import compress
from compressm.lab.bench.counting import count
from compressm.layers import LRU
from compressm.scans import native, rates

pytestmark = pytest.mark.skipif(not native.available(), reason="the choice is between compiled kernels")
FFT, DIRECT = "fft", "lti_forward"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """Where this machine's rates are stored, empty; the compiled kernels are loaded already."""
    monkeypatch.setenv("COMPRESSM_CACHE", str(tmp_path))
    rates.factors.cache_clear()
    yield native.cache_file("rates.json")
    rates.factors.cache_clear()


def kernels(layer: LRU, inputs: torch.Tensor) -> list[str]:
    called = list[str]()
    with native.watched(lambda name, _: called.append(name)), torch.no_grad():
        layer(inputs)
    return called


def test_measured_rates_decide_and_without_them_the_counts(file: Path) -> None:
    torch.manual_seed(0)
    layer, inputs = LRU(8, 8), torch.randn(64, 64, 8)
    assert kernels(layer, inputs) == [DIRECT]
    file.write_text('{"direct": 1e6, "fft": 1.0, "chunked": 1.0}')
    rates.factors.cache_clear()
    assert DIRECT not in kernels(layer, inputs)
    for broken in ("{", '{"direct": 1}', '{"direct": -1, "fft": 1, "chunked": 1}', "[]"):
        file.write_text(broken)
        rates.factors.cache_clear()
        assert rates.factors() == {"direct": 1.0, "fft": 1.0, "chunked": 1.0}


@pytest.mark.slow
def test_a_calibration_is_stored_and_read(file: Path) -> None:
    found = rates.calibrate(repeats=1)
    assert found["chunked"] == 1.0
    assert all(0.01 < value < 100 for value in found.values())
    assert rates.factors() == found
    assert file.exists()


def test_a_cut_chooses_the_engine_anew_and_leaves_nothing_behind(file: Path) -> None:
    """After a cut a step does what it does in a layer built small: the same operations, kernels and kept bytes."""
    torch.manual_seed(0)
    layer, inputs = LRU(8, 256), torch.randn(64, 256, 8, requires_grad=True)
    before, large = kernels(layer, inputs), count(layer, inputs)
    compress(layer, states=8)
    assert kernels(layer, inputs) == [DIRECT] != before
    small = LRU(8, 8)
    assert count(layer, inputs) == count(small, inputs)
    assert count(layer, inputs).operations < large.operations
    assert count(layer, inputs) == count(layer, inputs)  # from the first step on
