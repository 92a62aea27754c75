"""Recovery after a cut: towards the teacher, resumable to the last bit, and nothing left behind."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.cutting import state_dims
from compressm.errors import CheckpointError, ConfigError, MissingExtraError, UnsupportedModelError
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.observing.inputs import calls
from compressm.observing.perplexity import perplexity

STEPS = 12


def batches(count: int = 5, first: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(first)
    return [torch.randint(0, 20, (2, 16), generator=generator) for _ in range(count)]


def pair() -> tuple[LanguageModel, LanguageModel]:
    """A teacher, and a copy that was cut."""
    torch.manual_seed(0)
    teacher = LanguageModel(20, 12, 8, layer="mamba2", head_dim=8).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.6 * torch.randn_like(parameter))
    model = copy.deepcopy(teacher)
    compressm.compress(model, states=2, data=batches())
    return teacher, model


class Killed(Exception):
    pass


class Mortal(nn.Module):
    """A teacher that fails at a call."""

    def __init__(self, teacher: nn.Module, calls: int) -> None:
        super().__init__()
        self.teacher, self.left = teacher, calls

    def present(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def forward(self, tokens: Tensor) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return self.teacher(tokens)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_cut_model_comes_nearer_to_the_uncut_one(rank: int | None) -> None:
    if rank is not None:
        pytest.importorskip("peft")
    teacher, model = pair()
    names, objects = list(model.state_dict()), {id(parameter) for parameter in model.parameters()}
    untouched = copy.deepcopy(teacher.state_dict())
    found = compressm.recover(
        model, teacher, batches(), steps=60, lr=5e-3, lora_rank=rank, held_out=batches(2, 9), quiet=True
    )
    assert found.divergence_last < 0.6 * found.divergence_first
    assert found.perplexity_recovered == pytest.approx(perplexity(model, calls(model, batches(2, 9))))
    x = torch.cat(batches(2, 9))
    with torch.no_grad():
        wanted = F.cross_entropy(teacher(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert found.perplexity_before == pytest.approx(float(wanted.exp()), rel=1e-5)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    if rank is None:
        assert {id(parameter) for parameter in model.parameters()} == objects
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert set(state_dims(model).values()) == {2}
    torch.testing.assert_close(teacher.state_dict(), untouched, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_killed_run_goes_on_as_if_it_had_not_been(rank: int | None, tmp_path: Path) -> None:
    if rank is not None:
        pytest.importorskip("peft")
    teacher, whole = pair()
    options: dict[str, Any] = {"steps": STEPS, "lora_rank": rank, "save_every": 3, "quiet": True}
    expected = compressm.recover(whole, teacher, batches(), **options)
    _, model = pair()
    with pytest.raises(Killed):
        compressm.recover(model, Mortal(teacher, 8), batches(), folder=tmp_path, **options)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((tmp_path / "recovery.json").read_text())["step"] == 6
    _, again = pair()
    found = compressm.recover(again, Mortal(teacher, STEPS - 6), batches(), folder=tmp_path, **options)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert (found.divergence_first, found.divergence_last) == (expected.divergence_first, expected.divergence_last)
    with pytest.raises(CheckpointError, match="a recovery with seed = 0, not 1"):
        compressm.recover(again, teacher, batches(), folder=tmp_path, seed=1, **options)


def test_a_recovery_of_other_weights_is_not_taken_up(tmp_path: Path) -> None:
    """Of another model of the same sizes, or of another cut to as many states, on the same data."""
    teacher, model = pair()
    with pytest.raises(Killed):
        compressm.recover(
            copy.deepcopy(model), Mortal(teacher, 5), batches(), steps=STEPS, folder=tmp_path, save_every=4, quiet=True
        )
    otherwise = copy.deepcopy(teacher)
    compressm.compress(otherwise, states=2, data=batches(), selection="random")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    for one in (otherwise, other):
        before = copy.deepcopy(one.state_dict())
        with pytest.raises(CheckpointError, match="began with other weights"):
            compressm.recover(one, teacher, batches(), steps=STEPS, folder=tmp_path, quiet=True)
        torch.testing.assert_close(one.state_dict(), before, rtol=0, atol=0)
    assert compressm.recover(model, teacher, batches(), steps=STEPS, folder=tmp_path, quiet=True).steps == STEPS


@pytest.mark.parametrize("place", [slice(0, 5), slice(3, 8)])
def test_padding_before_or_behind_does_not_change_the_perplexity(place: slice) -> None:
    """The first token is predicted by none: what a model says at padding is no prediction."""
    torch.manual_seed(0)
    table, tokens = 3 * torch.randn(20, 20), torch.randint(20, (4, 5))

    class Bigrams(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return table[input_ids]

    nats = F.cross_entropy(table[tokens[:, :-1]].flatten(0, 1), tokens[:, 1:].flatten())
    padded, mask = torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long)
    padded[:, place], mask[:, place] = tokens, 1
    model, batch = Bigrams(), {"input_ids": padded, "attention_mask": mask}
    assert perplexity(model, calls(model, [batch])) == pytest.approx(float(nats.exp()), rel=1e-5)


def test_half_precision_is_trained_in_float32_and_given_back(tmp_path: Path) -> None:
    teacher, model = pair()
    model.bfloat16()
    before = copy.deepcopy(model.state_dict())
    model.embedding.weight.requires_grad_(False)
    compressm.recover(model, teacher, batches(), steps=2, lr=1e-2, quiet=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.embedding.weight.requires_grad
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_recovered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model = pair()
    before = copy.deepcopy(model.state_dict())
    for options, message in (({"steps": 0}, "at least 1 step"), ({"lora_rank": 0}, "lora_rank must be at least 1"),
                             ({"save_every": 0}, "save_every must be")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            compressm.recover(model, teacher, batches(), quiet=True, **options)
    classifier = SequenceClassifier(1, 3, d_model=4, d_state=4).eval()
    with pytest.raises(UnsupportedModelError, match="it is for language models"):
        compressm.recover(classifier, classifier, [torch.zeros(2, 5, 1)], quiet=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"compressm\[peft\]"):
        compressm.recover(model, teacher, batches(), lora_rank=2, quiet=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
