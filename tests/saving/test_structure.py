"""What comes back from `save` and `load` is the model that was saved: dtypes, ties, frozen weights, buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressm
from compressm.errors import CheckpointError
from compressm.layers import LRU, LanguageModel, SequenceClassifier
from compressm.runtime.files import read_pair, write_pair
from compressm.saving.checkpoint import load, save, save_tree

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def classifier(layers: int = 2, **options: Any) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(2, 3, d_model=4, d_state=6, n_layers=layers, **options)


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    """Name by name: bits, dtypes, gradients; and the same names are one tensor."""
    for found, wanted in (
        (dict(got.named_parameters(remove_duplicate=False)), dict(expected.named_parameters(remove_duplicate=False))),
        (dict(got.named_buffers(remove_duplicate=False)), dict(expected.named_buffers(remove_duplicate=False))),
    ):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype, name
            assert found[name].requires_grad == value.requires_grad, name
            assert torch.equal(found[name], value), name
        for one in wanted:
            for other in wanted:
                assert (found[one] is found[other]) == (wanted[one] is wanted[other]), (one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    for index, model in enumerate((classifier().to(dtype), LanguageModel(11, d_model=4, d_state=3).to(dtype))):
        compressm.compress(model, states=2, data=[torch.zeros(1, 4, dtype=torch.long)] if index else None)
        save(model, tmp_path / str(index))
        assert_same(load(tmp_path / str(index)), model)


def test_dtypes_that_differ_from_tensor_to_tensor_come_back(tmp_path: Path) -> None:
    model = classifier().bfloat16()
    for norm in (block.norm for block in model.blocks):
        norm.float()
    model.decoder.double()
    save(model, tmp_path)
    assert_same(load(tmp_path), model)


def test_frozen_weights_come_back_frozen(tmp_path: Path) -> None:
    model = classifier()
    model.encoder.requires_grad_(False)
    model.blocks[0].ssm.requires_grad_(False)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, model)
    assert not loaded.encoder.weight.requires_grad  # type: ignore[union-attr]
    assert loaded.decoder.weight.requires_grad  # type: ignore[union-attr]
    assert not loaded.training


def test_shared_layers_and_tied_weights_come_back_shared(tmp_path: Path) -> None:
    model = classifier(3)
    model.blocks[2] = model.blocks[0]
    model.blocks[1].glu.weight = model.blocks[0].glu.weight  # type: ignore[union-attr]
    compressm.compress(model, states=3)
    save(model, tmp_path)
    loaded: Any = load(tmp_path)
    assert_same(loaded, model)
    assert loaded.blocks[2] is loaded.blocks[0]
    assert loaded.blocks[1] is not loaded.blocks[0]
    u = torch.randn(2, 9, 2)
    assert torch.equal(loaded(u), model.eval()(u))
    loaded(u).sum().backward()  # the tie is one of gradients too
    assert torch.equal(loaded.blocks[1].glu.weight.grad, loaded.blocks[0].glu.weight.grad)
    # Saved and loaded once more, the second is the first.
    save(loaded, tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)


def test_a_changed_model_is_saved_with_a_warning_and_loads_into_one_changed_alike(tmp_path: Path) -> None:
    def changed() -> SequenceClassifier:
        model = classifier()
        torch.nn.utils.parametrizations.weight_norm(model.decoder)
        return model

    model = changed()
    nn.init.normal_(model.decoder.bias)
    with pytest.warns(
        UserWarning, match=r"decoder is ParametrizedLinear, where its configuration builds Linear.*model="
    ):
        save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"changed after it was built \(decoder is.*load\(folder, model"):
        load(tmp_path)
    assert_same(load(tmp_path, changed()), model)


def test_other_changes_are_seen_too(tmp_path: Path) -> None:
    wide, viewed, activated = classifier(), classifier(), classifier()
    wide.decoder = nn.Linear(4, 7)
    viewed.decoder.weight.data = _overlapping(viewed)
    activated.norm = nn.ReLU()
    for model, message in (
        (wide, r"decoder.bias has shape \(7,\), where its configuration builds \(3,\)"),
        (viewed, "are different tensors that share memory"),
        (activated, "norm is ReLU, where its configuration builds Identity"),
    ):
        with pytest.warns(UserWarning, match=message):
            save(model, tmp_path)


def _overlapping(model: SequenceClassifier) -> Tensor:
    memory = torch.randn(20)
    model.encoder.weight.data = memory[:8].view(4, 2)
    return memory[6:18].view(3, 4)


class Own(nn.Module):
    """Of a class that compressm cannot build: a buffer that is in no state dict, and a tie."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.mix, self.a, self.b = LRU(4, 6), nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.b(self.a(self.mix(u) * self.scale))


def test_buffers_outside_of_the_state_dict_come_back(tmp_path: Path) -> None:
    model = Own()
    model.scale *= 3  # type: ignore[operator]
    save(model, tmp_path)
    fresh = Own()
    assert_same(load(tmp_path, fresh), model)
    u = torch.randn(2, 5, 4)
    assert torch.equal(fresh(u), model(u))


def test_ties_of_a_callers_model_are_checked(tmp_path: Path) -> None:
    save(Own(), tmp_path / "tied")
    save(Own(tied=False), tmp_path / "free")
    with pytest.raises(
        CheckpointError, match=r"a.weight and b.weight are one tensor in the checkpoint and two in this"
    ):
        load(tmp_path / "tied", Own(tied=False))
    with pytest.raises(CheckpointError, match=r"a.weight and b.weight are two tensors in the checkpoint and one in"):
        load(tmp_path / "free", Own())


def test_a_callers_model_keeps_its_dtype_where_that_loses_nothing(tmp_path: Path) -> None:
    save(Own().bfloat16(), tmp_path / "half")
    assert_values = load(tmp_path / "half", Own())
    assert {value.dtype for value in assert_values.state_dict().values()} == {torch.float32}
    save(Own().double(), tmp_path / "double")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(CheckpointError, match=rf"torch.float64 in the checkpoint and {dtype} .* change its values"):
            load(tmp_path / "double", Own().to(dtype))
    with pytest.raises(CheckpointError, match=r"torch.bfloat16 in the checkpoint and torch.float16"):
        load(tmp_path / "half", Own().half())


class Sub(Tensor):
    """A tensor of a kind of its own, as sharded and quantised ones are."""


def test_what_has_no_plain_values_is_refused_by_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = classifier()
    lazy, complicated, special = Own(), Own(), Own()
    lazy.b = nn.LazyLinear(4)
    complicated.a.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    special.register_buffer("odd", torch.zeros(3).as_subclass(Sub))
    for model, message in (
        (empty, r"\w.* is on the meta device and has no values: initialise it"),
        (lazy, r"b.weight has no shape yet: run the model on one batch"),
        (complicated, r"a.weight is a tensor of layout torch.strided and dtype torch.complex64.*view_as_real"),
        (special, r"odd is a Sub, and only plain tensors can be stored"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(model, tmp_path / "none")
    with pytest.raises(CheckpointError, match="a is on the meta device"):
        save_tree(tmp_path / "none", {"a": torch.zeros(2, device="meta")})
    assert not (tmp_path / "none").exists()
    save(Own(), tmp_path)
    with torch.device("meta"):
        nowhere = Own()
    with pytest.raises(CheckpointError, match=r"on the meta device, where no value can be loaded: .*to_empty"):
        load(tmp_path, nowhere)


def test_checkpoints_from_before_this_was_recorded_load(tmp_path: Path) -> None:
    model = classifier().double()
    save(model, tmp_path)
    description, tensors = read_pair(tmp_path, "model.safetensors", "compressm.json")
    for key in ("structure", "changed", "sha256"):
        description.pop(key)
    write_pair(tmp_path, "model.safetensors", "compressm.json", tensors, description)
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize(
    "structure",
    [
        [],
        {"shared": []},
        {"shared": [[1]], "shared_modules": [], "frozen": [], "left_out": []},
        {"shared": [["encoder.weight", "os.system"]], "shared_modules": [], "frozen": [], "left_out": []},
        {"shared": [], "shared_modules": [["encoder", "..", ""]], "frozen": [], "left_out": []},
        {"shared": [], "shared_modules": [["", "encoder"]], "frozen": [], "left_out": []},
        {"shared": [], "shared_modules": [["encoder", ""]], "frozen": [], "left_out": []},
        {"shared": [], "shared_modules": [], "frozen": [], "left_out": ["none"]},
        {"shared": [[]], "shared_modules": [[]], "frozen": [], "left_out": []},
        {"shared": 3, "shared_modules": [], "frozen": [], "left_out": []},
        {"shared": [["encoder.weight", "decoder.weight"]], "shared_modules": [], "frozen": [], "left_out": []},
    ],
    ids=str,
)
def test_a_structure_that_says_what_is_not_is_refused(structure: Any, tmp_path: Path) -> None:
    save(classifier(), tmp_path)
    description, tensors = read_pair(tmp_path, "model.safetensors", "compressm.json")
    description.pop("sha256")
    write_pair(tmp_path, "model.safetensors", "compressm.json", tensors, {**description, "structure": structure})
    with pytest.raises(CheckpointError):
        load(tmp_path)
    assert json.loads((tmp_path / "compressm.json").read_text())["structure"] == structure
