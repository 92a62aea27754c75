"""Training on sequences of unequal length: what stands behind a sequence has no say in anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from compressm.lab.config import LossConfig, parse_config
from compressm.lab.data.sequences import SequenceData, Split
from compressm.lab.runs import loop
from compressm.lab.runs.objective import Objective
from compressm.lab.runs.tasks import learning_of, scores_on
from compressm.layers import SequenceClassifier
from compressm.saving.checkpoint import load


def data(fill: int = 0, longer: int = 0, count: int = 60) -> SequenceData:
    """Random bytes, whose class is the sign of a slope, in rows that end with ``fill``."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 13, (count,), generator=generator)
    y = torch.arange(count) % 2
    slope = torch.where(y == 1, 9, -9)[:, None] * torch.arange(12) + 100
    x = (slope[..., None] + torch.randint(0, 40, (count, 12, 2), generator=generator)).clamp(0, 255)
    x = x.masked_fill((torch.arange(12) >= lengths[:, None])[..., None], fill).to(torch.uint8)
    x = torch.cat([x, x.new_full((count, longer, 2), fill)], 1)
    split = Split(x, y, lengths)
    return SequenceData("slopes", split, split, split, torch.full((2,), 110.0), torch.full((2,), 60.0), 2)


def test_batches_are_as_long_as_their_longest_sequence() -> None:
    some, indices = data(7, longer=5), torch.tensor([0, 3, 5])
    u, _ = some.batch(some.train, indices)
    lengths = some.lengths(some.train, indices)
    assert lengths is not None
    assert u.shape[1] == int(lengths.max())
    moved = some.to(torch.device("cpu")).lengths(some.train, indices)
    assert moved is not None
    assert torch.equal(moved, lengths)


@pytest.mark.parametrize("layer", ["lru", "mamba"])
def test_loss_and_accuracy_are_those_of_the_sequences_alone(layer: str) -> None:
    torch.manual_seed(0)
    some, model = data(200, longer=3), SequenceClassifier(2, 2, 4, 4, dropout=0.0, layer=layer).eval()
    u, y = some.batch(some.train, torch.arange(60))
    lengths = some.lengths(some.train, torch.arange(60))
    assert lengths is not None
    with torch.no_grad():
        alone = torch.cat([model(u[i : i + 1, : int(n)]) for i, n in enumerate(lengths)])
        loss = Objective(LossConfig(), torch.device("cpu"))(model, u, y, 0, lengths)
    torch.testing.assert_close(loss, F.cross_entropy(alone, y), rtol=1e-5, atol=1e-6)
    right = scores_on(learning_of("classification", None), model, some, some.test, 7)
    assert torch.equal(right.bool(), alone.argmax(-1) == y)


@pytest.mark.parametrize("layer", ["lru", "mamba"])
def test_a_run_learns_the_same_whatever_pads(layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse_config({
        "data": {"name": "digits"},
        "model": {"d_model": 4, "d_state": 8, "layer": layer},
        "optimizer": {"lr": 0.01},
        "compression": {"states": 4, "cuts": 1},
        "run": {"steps": 16, "batch_size": 10, "device": "cpu", "tensorboard": False},
    })  # fmt: skip
    for name, some in (("zeros", data(0)), ("noise", data(255, longer=9))):
        monkeypatch.setattr(loop, "load_data", lambda _, some=some: some)
        result = loop.train(settings, output=tmp_path / name, quiet=True)
        assert result.state_dims == [4]
    one, other = (load(tmp_path / name / "model").state_dict() for name in ("zeros", "noise"))
    for key, value in one.items():
        assert torch.equal(value, other[key])


def test_tokens_of_which_none_is_padding() -> None:
    tokens = torch.tensor([[3, 0, 0], [0, 1, 0]], dtype=torch.uint8)[..., None]
    split, indices = Split(tokens, torch.tensor([0, 1])), torch.arange(2)
    every = SequenceData("t", split, split, split, torch.zeros(1), torch.ones(1), 2, vocabulary=4, padding=None)
    some = SequenceData("t", split, split, split, torch.zeros(1), torch.ones(1), 2, vocabulary=4)
    assert every.batch(split, indices)[0].tolist() == [[3, 0, 0], [0, 1, 0]]
    assert some.batch(split, indices)[0].tolist() == [[3, 0], [0, 1]]
