"""Numbers per sequence and per step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compressm
from compressm.layers import SequenceRegressor


def model(per_step: bool, layer: str = "lru") -> SequenceRegressor:
    torch.manual_seed(0)
    return SequenceRegressor(2, 3, d_model=4, d_state=6, layer=layer, per_step=per_step, norm="layer").eval()


@pytest.mark.parametrize("layer", ["lru", "mamba"])
@pytest.mark.parametrize("per_step", [False, True])
def test_steps_give_what_the_whole_sequence_gives(per_step: bool, layer: str) -> None:
    regressor, u = model(per_step, layer), torch.randn(5, 7, 2)
    whole, state, outputs = regressor(u), regressor.initial_state(5), []
    for now in u.unbind(1):
        output, state = regressor.step(now, state)
        outputs.append(output)
    assert whole.shape == ((5, 7, 3) if per_step else (5, 3))
    torch.testing.assert_close(torch.stack(outputs, 1) if per_step else outputs[-1], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("per_step", [False, True])
def test_padding_has_no_influence(per_step: bool) -> None:
    regressor, u = model(per_step), torch.randn(2, 7, 2)
    short = regressor(u[:1, :4])
    padded = regressor(u, torch.tensor([4, 7]))[:1]
    torch.testing.assert_close(padded[:, :4] if per_step else padded, short, atol=1e-5, rtol=1e-4)


def test_cut_save_and_load(tmp_path: Path) -> None:
    regressor, u = model(True), torch.randn(2, 7, 2)
    report = compressm.compress(regressor, states=3, data=u)
    assert report.layers[0].states_after == 3
    compressm.save(regressor, tmp_path)
    loaded = compressm.load(tmp_path)
    assert isinstance(loaded, SequenceRegressor)
    torch.testing.assert_close(loaded(u), regressor(u))
