from __future__ import annotations

import json
import re

import pytest
import torch

from compressm.adapters import LRUAdapter
from compressm.adapters.changes import layer_values
from compressm.cutting.spectrum import LayerSpectrum, Spectrum, analyze, compare, spectrum_changes
from compressm.layers import SequenceClassifier
from compressm.theory.balancing import Balancing, balance
from compressm.theory.systems import DiagonalSystem
from helpers import lru, random_system


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        ((1, 3), r"4 of 16 states .*\(25%\): train small next time, from 3 states a layer, if compressm.probe says"),
        ((1, 4), r"5 of 16 states .*\(31%\): a cut would cost little"),
        ((8, 1), r"9 of 16 states .*\(56%\): state matters here, and a cut would cost"),
    ],
    ids=str,
)
def test_the_loss_says_whether_state_matters(needed: tuple[int, int], said: str) -> None:
    # Fewer states than a layer needs cost 0.006 nats, more than the half of 0.01 that each of two layers may cost.
    rises = [torch.where(torch.arange(9) < n, 0.006, 0.004).double() for n in needed]
    energy = torch.ones(8, dtype=torch.float64)
    spectrum = Spectrum(tuple(LayerSpectrum(str(i), energy, energy, rise) for i, rise in enumerate(rises)))
    assert re.match(said, spectrum.advice())
    assert spectrum.advice() in str(spectrum)
    assert Spectrum(tuple(LayerSpectrum(one.name, energy, energy) for one in spectrum)).advice() == ""


def test_analyze_reports_every_layer() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, d_model=4, d_state=[20, 12], n_layers=2, r_min=0.9)
    spectrum = analyze(model)
    assert [(layer.name, layer.states) for layer in spectrum] == [("blocks.0.ssm", 20), ("blocks.1.ssm", 12)]
    assert len(spectrum) == 2
    layer = spectrum["blocks.1.ssm"]
    assert layer.hsv.shape == (24,)
    assert layer.states_for(0.1) <= layer.states_for(0.001) <= 12
    assert "blocks.0.ssm" in str(spectrum)
    assert json.loads(json.dumps(spectrum.to_dict()))["blocks.0.ssm"]["energy"][0] > 0
    with pytest.raises(KeyError, match=r"blocks\.0\.ssm"):
        spectrum["missing"]


def test_energy_counts_pairs_of_values_in_the_real_method() -> None:
    balancing = balance(random_system(0))
    torch.testing.assert_close(balancing.energy, balancing.hsv[0::2] + balancing.hsv[1::2])
    complex_balancing = balance(random_system(0), "complex")
    assert torch.equal(complex_balancing.energy, complex_balancing.hsv)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("seed", range(4))  # with 96 values, matchings of equal total change abound
def test_no_value_moves_further_than_weyls_bound(size: float, seed: int) -> None:
    layer = lru(seed, d_state=48)
    before = balance(LRUAdapter().read(layer_values(layer)))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = balance(LRUAdapter().read(layer_values(layer)))
    change = compare(before, after)
    moves = (after.hsv - before.hsv).abs().max() / before.hsv[0]
    assert float(moves) <= change.weyl_bound * (1 + 1e-9)
    assert change.largest_move <= change.weyl_bound * (1 + 1e-9)
    assert change.settled(1.0)


def test_an_unchanged_layer_is_settled_and_a_changed_one_is_not() -> None:
    a, b = balance(random_system(0)), balance(random_system(1))
    same = compare(a, a)
    assert same.weyl_bound == pytest.approx(0, abs=1e-12)
    assert same.rank_correlation == pytest.approx(1)
    assert same.settled(1e-9)
    assert not compare(a, b).settled(1e-3)


def test_snapshots_of_different_order_are_not_compared() -> None:
    a, b = balance(random_system(0, n=4)), balance(random_system(0, n=5))
    assert spectrum_changes({"x": a, "y": a}, {"x": b, "y": a}).keys() == {"y"}
    with pytest.raises(ValueError, match="8 and 10"):
        compare(a, b)


def test_directions_that_change_places_are_counted() -> None:
    # Three states far apart in the unit disc, each an input and an output of its own: the directions are the states.
    lam = torch.tensor([0.1, 0.5, 0.9], dtype=torch.complex128)

    def gains(*values: float) -> Balancing:
        gain = torch.tensor(values, dtype=torch.complex128)
        return balance(DiagonalSystem(lam, torch.eye(3, dtype=torch.complex128), torch.diag(gain), False), "complex")

    start = gains(3.0, 2.0, 0.1)  # Hankel singular values 3.03, 2.67, 0.53
    assert compare(start, gains(3.3, 2.1, 0.1)).crossings == 0
    swapped = compare(start, gains(2.0, 3.0, 0.1))
    assert swapped.crossings == pytest.approx(1 / 3)
    assert swapped.rank_correlation == pytest.approx(0.5)
    reversed_ = compare(start, gains(0.1, 1.0, 2.0))
    assert (reversed_.crossings, reversed_.rank_correlation) == (pytest.approx(1), pytest.approx(-1))


@pytest.fixture
def spectrum() -> Spectrum:
    torch.manual_seed(0)
    return analyze(SequenceClassifier(1, 3, d_model=4, d_state=[20, 12], n_layers=2, r_min=0.9))


def test_a_data_frame_has_a_row_per_state(spectrum: Spectrum) -> None:
    frame = spectrum.to_dataframe()
    assert list(frame.columns) == ["layer", "state", "energy", "discarded"]
    assert len(frame) == 32
    second = frame[frame.layer == "blocks.1.ssm"]
    assert list(second.state) == list(range(1, 13))
    kept = spectrum["blocks.1.ssm"].states_for(0.1)
    assert second.discarded.iloc[kept - 1] <= 0.1 < second.discarded.iloc[kept - 2]
    assert second.discarded.iloc[-1] == 0
    total = float(spectrum["blocks.1.ssm"].energy.sum())
    assert second.discarded.iloc[0] == pytest.approx(1 - second.energy.iloc[0] / total)


def test_plots_by_either_library(spectrum: Spectrum) -> None:
    plotly = spectrum.plot()
    assert [trace.name for trace in plotly.data] == ["blocks.0.ssm", "blocks.1.ssm"]
    assert len(plotly.data[1].x) == 12
    (axis,) = spectrum.plot("matplotlib").axes
    lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
    for line, layer, trace in zip(lines, spectrum, plotly.data, strict=True):
        assert list(line.get_ydata()) == list(trace.y) == [max(share, 1e-8) for share in layer.discarded()]
    with pytest.raises(ValueError, match="'plotly' or 'matplotlib'"):
        spectrum.plot("gnuplot")  # type: ignore[arg-type]
