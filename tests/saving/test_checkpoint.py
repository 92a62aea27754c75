from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressm.cutting import compress, state_dims
from compressm.errors import CheckpointError
from compressm.layers import LRU, SequenceClassifier
from compressm.runtime import files as storage
from compressm.runtime.random_state import rng_state, set_rng_state
from compressm.saving.checkpoint import load, load_tree, save, save_tree


class OwnModel(nn.Module):
    """A model of a class that compressm does not know how to build."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mix = LRU(width, 12)
        self.out = nn.Linear(width, 2)

    def forward(self, u: Tensor) -> Tensor:
        return self.out(self.mix(u).mean(1))


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def test_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tree = {
        "a": base,
        "view": base.T,
        "same memory": base,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "complex": torch.randn(3, dtype=torch.complex128).conj(),
        "half": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False]),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "complex array": np.array([1 + 2j]),
        0: {1: "one", None: 2, False: 3, 1.5: 4},
        "tuple": (1, (2.0, "x"), [None, True], ()),
        "$tensor": {"$dict": []},
        "floats": [0.1, 1e-320, -0.0, 1.0, math.inf, -math.inf, math.nan],
        "complex number": 1 - 2j,
        "big": 2**200,
        "text": "Ukrainian ґ, a \x00 byte\n",
        "nothing": {},
    }
    save_tree(tmp_path / "new" / "folder", tree, metadata={"step": 7})
    assert same(load_tree(tmp_path / "new" / "folder"), tree)
    assert math.copysign(1, load_tree(tmp_path / "new" / "folder")["floats"][2]) == -1
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["state.json", "state.safetensors"]
    assert json.loads((tmp_path / "new" / "folder" / "state.json").read_text())["metadata"] == {"step": 7}


def test_numpy_scalars_and_ordered_dicts_become_plain(tmp_path: Path) -> None:
    save_tree(tmp_path, OrderedDict(a=np.int64(3), b=np.float64(0.5), c=np.bool_(True)))
    assert same(load_tree(tmp_path), {"a": 3, "b": 0.5, "c": True})


def test_random_state_survives(tmp_path: Path) -> None:
    save_tree(tmp_path, rng_state())
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    set_rng_state(load_tree(tmp_path))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"optimizer": {"hook": [print]}}, "optimizer.hook[0] is a builtins.builtin_function_or_method"),
        ({"a": {b"x": 1}}, "a key of a is a builtins.bytes"),
        ({"a": np.array([None])}, "a is a numpy.ndarray"),
        (torch.eye(2).to_sparse(), "the tree is a tensor of layout torch.sparse_coo"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, tree: Any, names: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_tree(tmp_path, tree)
    assert names in str(caught.value)
    assert os.listdir(tmp_path) == []


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it, and nothing is cleaned up."""


def test_a_kill_at_any_instant_leaves_the_old_or_the_new_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that touches the disk is killed once, before and after it acted; then the next save is killed too."""
    old, new, newest = ({"x": torch.full((3,), float(value)), "n": value} for value in (1, 2, 3))
    targets = [(storage, "save_file"), (storage.os, "replace"), (storage, "_flush"), (storage.Path, "write_text")]

    def save_and_kill_at(folder: Path, tree: Any, count: int, after: bool) -> bool:
        calls = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == count and not after:
                    raise Killed
                result = real(*args, **kwargs)
                if calls == count:
                    raise Killed
                return result

            return wrapper

        with monkeypatch.context() as patch:
            for owner, name in targets:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save_tree(folder, tree)
            except Killed:
                return True
        return False

    outcomes: set[int] = set()
    for after in (False, True):
        for count in range(1, 100):
            folder = tmp_path / f"{after}-{count}"
            save_tree(folder, old)
            killed = save_and_kill_at(folder, new, count, after)
            found = load_tree(folder)
            assert same(found, old) or same(found, new)
            outcomes.add(found["n"])
            # The next save, after such a kill, must not destroy what there is either.
            again = 1
            while save_and_kill_at(folder, newest, again, after):
                assert any(same(load_tree(folder), tree) for tree in (found, newest))
                again += 1
            assert same(load_tree(folder), newest)
            assert sorted(os.listdir(folder)) == ["state.json", "state.safetensors"]
            if not killed:
                break
        assert count > 8
    assert outcomes == {1, 2}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    save_tree(tmp_path, {"x": torch.randn(50), "s": "text"})
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "flip":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_tree(tmp_path)


def test_missing_and_foreign_formats(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*state.json is missing; check the path"):
        load_tree(tmp_path / "nowhere")
    storage.write_pair(tmp_path, "state.safetensors", "state.json", {}, {"format": 9})
    with pytest.raises(CheckpointError, match="format 9, and this version reads format 1"):
        load_tree(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write a checkpoint"):
        save_tree(tmp_path / "file", [1])


def test_own_class_is_rebuilt_with_its_present_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 3, d_model=4, d_state=16, n_layers=2)
    compress(model, states=5)
    u = torch.randn(2, 9, 2)
    model(u)  # moves the running statistics of the norms
    save(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["compressm.json", "model.safetensors"]
    state = torch.get_rng_state()
    loaded = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert state_dims(loaded) == state_dims(model)
    assert max(state_dims(loaded).values()) <= 5
    assert torch.equal(loaded(u), model.eval()(u))


def test_other_classes_are_loaded_into_a_fresh_model(tmp_path: Path) -> None:
    model = OwnModel()
    compress(model, states=5)
    save(model, tmp_path)
    fresh = OwnModel()
    parameters = list(fresh.parameters())
    assert load(tmp_path, fresh) is fresh
    assert all(a is b for a, b in zip(parameters, fresh.parameters(), strict=True))
    u = torch.randn(2, 9, 4)
    assert torch.equal(fresh(u), model(u))


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save(OwnModel(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a OwnModel, .* load\(folder, model=OwnModel"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="on one side only"):
        load(tmp_path, SequenceClassifier(2, 3, d_model=4, d_state=16))
    with pytest.raises(CheckpointError, match="size mismatch"):
        load(tmp_path, OwnModel(width=3))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "nowhere")


def test_a_subclass_is_not_mistaken_for_our_class(tmp_path: Path) -> None:
    class Special(SequenceClassifier):
        pass

    Special.__name__ = "SequenceClassifier"
    save(Special(2, 3, d_model=4, d_state=8), tmp_path)
    assert json.loads((tmp_path / "compressm.json").read_text())["config"] is None
    with pytest.raises(CheckpointError, match="cannot be built from this config"):
        load(tmp_path)
