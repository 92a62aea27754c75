"""A cut that the layer's dtype cannot hold is refused: rounding would change more than the truncation does."""

from __future__ import annotations

import copy

import pytest
import torch

from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values, write
from compressm.cutting import compress
from compressm.layers import LRU
from compressm.theory.balancing import balance, truncate
from compressm.theory.certificate import Certificate


def slow_layer(seed: int) -> LRU:
    """Modes so slow that the phases which half precision rounds matter, and half of the states next to nothing."""
    torch.manual_seed(seed)
    layer = LRU(4, 8, r_min=0.99, r_max=0.995)
    with torch.no_grad():
        layer.C_re[:, 4:] *= 1e-2
        layer.C_im[:, 4:] *= 1e-2
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_a_cut_that_is_lost_in_rounding_is_refused_and_nothing_is_written(dtype: torch.dtype, seed: int) -> None:
    layer = slow_layer(seed).to(dtype)
    before = copy.deepcopy(layer.state_dict())
    # What would be written, and how far its impulse response is from the truncated one's: the H2 error by definition.
    ((_, adapter),) = find_layers(layer).values()
    system = adapter.read(layer_values(layer))  # type: ignore[union-attr]
    reduction = truncate(balance(system), 6)
    rounded = copy.deepcopy(layer)
    write(rounded, adapter.plan(layer_values(layer), reduction))  # type: ignore[union-attr, arg-type]
    wanted, full = reduction.system.kernel(6000), system.kernel(6000)
    written = adapter.read(layer_values(rounded)).kernel(6000)  # type: ignore[union-attr]
    rounding, truncation = float((written - wanted).norm()), float((full - wanted).norm())
    assert rounding > 2 * truncation

    (report,) = compress(layer, states=6).layers
    assert report.outcome == "refused"
    assert "rounding to the layer's dtype adds an H2 error" in report.reason
    assert report.states_after == 8
    assert report.energy_kept is None
    assert isinstance(report.certificate, Certificate)
    assert report.certificate.rounding_error == pytest.approx(rounding, rel=1e-3)
    assert report.certificate.h2_error == pytest.approx(truncation, rel=1e-3)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("seed", range(3))
def test_the_same_cut_is_made_where_the_dtype_holds_it(seed: int) -> None:
    (report,) = compress(slow_layer(seed), states=6).layers
    assert report.outcome == "cut"
    assert isinstance(report.certificate, Certificate)
    assert report.certificate.rounding_error < report.certificate.h2_error
