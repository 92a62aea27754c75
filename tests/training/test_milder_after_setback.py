"""After a setback the next cut takes half as much, whatever rule says how much that is."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import compressm
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.training.compressor import Compressor
from compressm.training.history import Event

# Accuracies of so few digits cannot resolve a max_drop of 0, and setbacks end the cutting.
pytestmark = pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")


def model(fade: float) -> SequenceClassifier:
    torch.manual_seed(0)
    net = SequenceClassifier(1, 3, d_model=5, d_state=32, n_layers=2, norm="layer", r_min=0.9)
    with torch.no_grad():
        for block in net.blocks:
            block.ssm.C_re[:, 1:] *= fade  # type: ignore[union-attr, index, operator]
            block.ssm.C_im[:, 1:] *= fade  # type: ignore[union-attr, index, operator]
    return net


def cut_undo_and_cut(net: SequenceClassifier, **rule: Any) -> list[Event]:
    """A cut, its roll-back, and the cut that follows; the weights stand still."""
    metrics = iter([0.9] * 4 + [0.1, 0.1] + [0.9] * 20)  # bad right after the first cut and at its examination
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.0))
    compressor = Compressor(
        net, optimizer, 80, window=0.5, cuts=2, max_drop=0.01, evaluate=lambda _: next(metrics), check_after=3, **rule
    )
    while len(compressor.history) < 3:
        F.cross_entropy(net(torch.randn(6, 20, 1)), torch.randint(0, 3, (6,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    assert [event.kind for event in compressor.history] == ["cut", "rolled_back", "cut"]
    return compressor.history


def test_half_of_the_error_is_allowed() -> None:
    net = model(1.0)
    spectra = compressm.analyze(net)
    # The bound of keeping r states is twice what goes: the allowed error lies between two such bounds.
    allowed = 1.01 * 2 * max(float(spectrum.energy[16:].sum()) for spectrum in spectra)
    unwritten = copy.deepcopy(net)
    first, _, second = cut_undo_and_cut(net, max_error=allowed, max_reduction=1.0)
    for event, share in ((first, 1.0), (second, 0.5)):
        for layer, spectrum in zip(event.layers, spectra, strict=True):
            least = next(r for r in range(1, 33) if 2 * float(spectrum.energy[r:].sum()) <= share * allowed)
            # A left-over real eigenvalue takes a whole state, and two of them no more than two.
            assert least <= layer["states_after"] <= least + 2
            assert layer["certificate"]["bound"] <= share * allowed * (1 + 1e-9)
    one_shot = compressm.compress(unwritten, max_error=allowed / 2, min_reduction=0.05, max_reduction=1.0).state_dims
    assert {layer["name"]: layer["states_after"] for layer in second.layers} == one_shot
    assert any(layer["certificate"]["bound"] > allowed / 2 for layer in first.layers)


def test_half_of_the_tolerance_is_allowed() -> None:
    net = model(1.0)
    first, _, second = cut_undo_and_cut(net, tolerance=0.2)
    assert all(layer["energy_kept"] >= 0.8 for layer in first.layers)
    assert any(layer["energy_kept"] < 0.9 for layer in first.layers)
    assert all(layer["energy_kept"] >= 0.9 for layer in second.layers)


def test_half_of_the_states_may_go_that_might_have_gone() -> None:
    # Nearly all states carry nothing, so that only the limit on the share of states holds a cut back.
    first, _, second = cut_undo_and_cut(model(1e-4))
    for event, share in ((first, 0.5), (second, 0.25)):
        for layer in event.layers:
            least = 32 - math.floor(share * 32)
            assert least <= layer["states_after"] <= least + 1, share  # one for a left-over real eigenvalue


@pytest.mark.parametrize(("rule", "halfway"), [({"states": 8}, 16), ({"fraction": 0.25}, 16)])
def test_a_size_is_approached_by_half_of_the_way(rule: dict[str, Any], halfway: int) -> None:
    # The first of two cuts goes to the geometric middle of 32 and 8. What follows has one cut's way left, all of it
    # but for the setback, and goes half of that: to the middle again.
    first, _, second = cut_undo_and_cut(model(1.0), **rule)
    for event in (first, second):
        assert max(layer["states_after"] for layer in event.layers) in (halfway - 1, halfway)
