"""Checkpoints and configurations made to harm: refused by name, before anything is allocated, imported or run."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Record
from hypothesis import given, settings
from hypothesis import strategies as st

from compressm import load, save
from compressm.cli import main
from compressm.errors import CheckpointError, ConfigError
from compressm.lab.config import load_config
from compressm.layers import SequenceClassifier
from compressm.runtime.files import _own_sha256
from compressm.saving.checkpoint import load_tree, save_tree


def model() -> SequenceClassifier:
    return SequenceClassifier(1, 3, d_model=4, d_state=6, n_layers=2)


def rewrite(path: Path, **changes: Any) -> None:
    """Change a description and sign it anew, as whoever makes a hostile file would."""
    description = {**json.loads(path.read_text()), **changes}
    description.pop("own_sha256")
    path.write_text(json.dumps({**description, "own_sha256": _own_sha256(description)}))


GREEDY: list[dict[str, Any]] = [
    {"d_model": 10**6},
    {"d_model": 10**12},
    {"d_state": [10**9, 10**9]},
    {"d_state": 10**30},
    {"n_layers": 10**9},
    {"n_layers": 2.5},
    {"n_layers": [2]},
    {"n_classes": 10**11},
    {"n_classes": -1},
    {"layer": "os.system"},
    {"layer": "mamba", "dt_rank": 10**11},
    {"__class__": "posix.system"},
    {"dropout": "import os"},
]


@pytest.mark.parametrize("change", GREEDY, ids=str)
def test_declared_sizes_are_held_against_the_file_before_anything_is_allocated(
    tmp_path: Path, tried: Record, change: dict[str, Any]
) -> None:
    save(model(), tmp_path)
    described = json.loads((tmp_path / "compressm.json").read_text())
    rewrite(tmp_path / "compressm.json", config={**described["config"], **change})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"compressm\.json"):
        load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    tried("checkpoint that asks for too much", stopped=True)


@pytest.mark.parametrize("dims", [None, [], {"blocks.0.ssm": 1e9}, {"../x": 3}, {"blocks.0.ssm": 10**12}], ids=str)
def test_state_dims_are_checked(tmp_path: Path, tried: Record, dims: Any) -> None:
    save(model(), tmp_path)
    rewrite(tmp_path / "compressm.json", state_dims=dims)
    with pytest.raises(CheckpointError):
        load(tmp_path)
    tried("checkpoint that asks for too much", stopped=True)


class Bomb:
    def __reduce__(self) -> Any:
        return open, ("pickled.was.here", "w")


def test_a_pickle_is_never_opened(tmp_path: Path, tried: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "compressm.json"):
        save(model(), tmp_path)
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            load(tmp_path)
    torch.save(Bomb(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        load(tmp_path / "model.pt")
    assert not (tmp_path / "pickled.was.here").exists()
    tried("pickle in place of a checkpoint", 3, stopped=True)


NESTED = {
    "lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": "9" * 100_000,
}


@pytest.mark.parametrize("text", NESTED.values(), ids=NESTED)
def test_json_without_end(tmp_path: Path, tried: Record, text: str) -> None:
    save_tree(tmp_path, {"weight": torch.ones(2)})
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_tree(tmp_path)
    tried("text nested without end", stopped=True)


@pytest.mark.parametrize(
    "structure",
    [
        {"$array": ["0", "O", [1]]},
        {"$array": ["0", "V999999999999", [1]]},
        {"$array": ["0", "u1", [10**12]]},
        {"$array": ["0", "u1", [-5, 3]]},
        {"$array": ["0", ",i8", [1]]},
        {"$array": ["0", "(2,)u1", [1]]},
        {"$array": ["0", [["a", "u1"]], [1]]},
        {"$tensor": "none"},
        {"$tensor": ["0"]},
        {"$complex_tensor": "0"},
        {"$dict": [[{"$tensor": "0"}, 1], 2]},
        {"$dict": [[[1], 1]]},
        {"$float": "1e"},
        {"$call": "os.system"},
    ],
    ids=str,
)
def test_structures_that_say_what_is_not(tmp_path: Path, tried: Record, structure: Any) -> None:
    save_tree(tmp_path, {"weight": torch.ones(3)})
    rewrite(tmp_path / "state.json", structure=structure)
    with pytest.raises(CheckpointError):
        load_tree(tmp_path)
    tried("structure that says what is not", stopped=True)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
YAML = {
    "billion laughs": LAUGHS,
    "python object": "data: !!python/object/apply:os.system ['touch pickled.was.here']\n",
    "python name": "data: !!python/name:os.system\n",
    "nested": "[" * 5_000,
    "bad date": "data: 2026-99-99\n",
    "bad number": "data: !!int abc\n",
    "binary": "data: !!binary '*'\n",
    "itself": "data: &a [*a]\n",
    "long": "data: " + "x" * (2 << 20),
    "terminal": 'data: {"\\e]0;title\\a": 1}\n',
    "infinite": "data: {name: digits, validation: .inf}\nmodel: {}\n",
    "null byte": "data: \0\n",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_hostile_yaml(
    tmp_path: Path, tried: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value)) < 1500
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
    assert not (tmp_path / "pickled.was.here").exists()
    tried("hostile configuration", stopped=True)


def test_loading_imports_nothing_of_a_checkpoints_choosing(tmp_path: Path, tried: Record) -> None:
    """In a fresh process: loading a hostile checkpoint imports nothing that a plain one has not."""
    save(model(), tmp_path / "plain")
    save(model(), tmp_path / "hostile")
    rewrite(tmp_path / "hostile" / "compressm.json", **{"class": "antigravity.Model"})
    script = (
        "import sys, compressm, compressm.errors\n"
        "compressm.load(sys.argv[1])\n"
        "before = set(sys.modules)\n"
        "try: compressm.load(sys.argv[2])\n"
        "except compressm.errors.CheckpointError: print('refused', *set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "plain"), str(tmp_path / "hostile")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["refused"]
    tried("checkpoint that names code", stopped=True)


COMMANDS = ("train", "resume", "compress", "analyze", "export", "reproduce", "bench", "demo")
WORDS = st.one_of(
    st.sampled_from(["--help", "--states", "--json", "-", "--", "--steps", "0", "-1", "nan", "/", "..", "~", ""]),
    st.text(max_size=12),
    st.builds("{}={}".format, st.sampled_from(["run.steps", "model", "data.name", "=", "."]), st.text(max_size=8)),
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(("train", "compress", "analyze", "export")), st.lists(WORDS, max_size=5))
def test_any_arguments_get_help_or_one_line(command: str, words: list[str]) -> None:
    """Nothing here is a valid call: there is no such configuration or checkpoint."""
    assert main([command, "/nowhere/at/all", *words]) in (0, 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(WORDS, max_size=3))
def test_any_command_gets_help_or_one_line(words: list[str]) -> None:
    assert main([word for word in words if word not in COMMANDS]) in (0, 2)
