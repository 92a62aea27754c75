"""Files that one process writes while others read them: real processes, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from compressm.errors import CheckpointError, CompressmError, ConfigError
from compressm.lab.runs.checkpoints import Checkpoints
from compressm.layers import SequenceClassifier
from compressm.runtime import files as storage
from compressm.saving.checkpoint import load, load_tree, save, save_tree
from helpers import forkserver

SIZE = 1 << 16  # numbers in a tensor: large enough that a reader is often in the middle of it


def write_tree(folder: Path, generation: int) -> None:
    values = torch.full((SIZE,), float(generation))
    save_tree(folder, {"n": generation, "x": values, "y": values[: generation % 7 + 1]})


def tree_is_one(folder: Path) -> bool:
    tree = load_tree(folder)
    n = tree["n"]
    return bool((tree["x"] == n).all() and (tree["y"] == n).all()) and len(tree["y"]) == n % 7 + 1


def write_model(folder: Path, generation: int) -> None:
    model = SequenceClassifier(2, 3, d_model=32, d_state=5 + generation % 7)
    for value in model.state_dict().values():
        value.fill_(generation)
    save(model, folder, card=True)


def model_is_one(folder: Path) -> bool:
    states = load(folder).state_dict()
    first = next(iter(states.values())).flatten()[0]
    card = (folder / "README.md").read_text(encoding="utf-8")
    alike = all(bool((value == first).all()) for value in states.values())
    return alike and int(first) % 7 + 5 == states["blocks.0.ssm.nu_log"].shape[0] and card.endswith("```\n")


def write_checkpoint(folder: Path, generation: int) -> None:
    Checkpoints(folder, keep=1).write(generation, {"n": generation, "x": torch.full((SIZE,), float(generation))})


def checkpoint_is_one(folder: Path) -> bool:
    tree, damaged = Checkpoints(folder, keep=1).read()
    return bool((tree["x"] == tree["n"]).all()) and not damaged


def write_result(folder: Path, generation: int) -> None:
    storage.write_json(folder / "result.json", {"n": generation, "x": [generation] * (1000 + 7 * generation % 1000)})


def result_is_one(folder: Path) -> bool:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return set(result["x"]) == {result["n"]}


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], bool]]] = {
    "tree": (write_tree, tree_is_one),
    "model": (write_model, model_is_one),
    "checkpoints": (write_checkpoint, checkpoint_is_one),
    "result": (write_result, result_is_one),
}


def _write(kinds: Sequence[str], folder: Path, seconds: float, together: Any, counted: Any) -> None:
    generation = 1  # the first is there before the readers begin
    together.wait(60)
    until = time.monotonic() + seconds
    while time.monotonic() < until or generation < 10:
        generation += 1
        for kind in kinds:
            KINDS[kind][0](folder / kind, generation)
    counted.put((0, generation, []))


def _read(kinds: Sequence[str], folder: Path, seconds: float, together: Any, counted: Any) -> None:
    rounds, wrong = 0, list[str]()
    together.wait(60)
    until = time.monotonic() + seconds
    while time.monotonic() < until or rounds < 10:
        rounds += 1
        for kind in kinds:
            try:
                if not KINDS[kind][1](folder / kind):
                    wrong.append(f"{kind}: mixed")
            except (CompressmError, OSError, ValueError) as error:
                wrong.append(f"{kind}: {error}")
    counted.put((rounds, 0, wrong))


def beside_each_other(kinds: Sequence[str], folder: Path, seconds: float) -> None:
    """One writer and two readers for some seconds: nothing is read that was not written."""
    for kind in kinds:
        (folder / kind).mkdir()
        KINDS[kind][0](folder / kind, 1)
    context = forkserver()
    together, counted = context.Barrier(3), context.Queue()
    arguments = (kinds, folder, seconds, together, counted)
    made = [context.Process(target=how, args=arguments) for how in (_write, _read, _read)]
    for process in made:
        process.start()
    reads, writes, wrong = zip(*[counted.get(timeout=seconds + 120) for _ in made], strict=True)
    for process in made:
        process.join(60)
        assert process.exitcode == 0
    lines = [line for of_one in wrong for line in of_one]
    assert not lines, f"{len(lines)} wrong reads of {sum(reads)}, with {sum(writes)} writes; the first: {lines[0]}"


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    beside_each_other(list(KINDS), tmp_path, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_readers_beside_a_writer_for_long(kind: str, tmp_path: Path) -> None:
    beside_each_other([kind], tmp_path, 20.0)


def interleavings(folder: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any]) -> list[Any]:
    """What a reader gets if a whole save happens just before its n-th call that opens, looks or loads, for every n."""
    got = list[Any]()
    for at in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        write_tree(folder, 1)
        calls, busy = 0, False

        def before(real: Callable[..., Any], at: int = at) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls, busy
                if not busy:
                    calls += 1
                    if calls == at:
                        busy = True
                        write_tree(folder, 2)
                        busy = False
                return real(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            for owner, name in (
                (storage.Path, "open"),
                (storage.Path, "stat"),
                (storage, "load_file"),
                (storage, "_sha256"),
            ):
                patch.setattr(owner, name, before(getattr(owner, name)))
            got.append(read())
        if calls < at:
            return got
    raise AssertionError("it never ends")


@pytest.mark.parametrize("by_name", [False, True])
def test_a_save_between_any_two_looks(by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where open files have no names of their own, as on other systems than Linux."""
    if by_name:
        real: Any = getattr(storage, "_is_at")  # noqa: B009
        monkeypatch.setattr(
            storage, "_is_at", lambda file, path: not str(path).startswith("/dev/") and real(file, path)
        )
    got = interleavings(tmp_path / "pair", monkeypatch, lambda: load_tree(tmp_path / "pair"))
    assert len(got) > 4
    for tree in got:
        assert (tree["x"] == tree["n"]).all()
        assert len(tree["y"]) == tree["n"] % 7 + 1
    assert {tree["n"] for tree in got} == {1, 2}


def test_a_pair_of_the_two_names_of_before_still_loads(tmp_path: Path) -> None:
    """As a kill between the two renames leaves it: the new description, the old tensors, the new ones beside them."""
    write_tree(tmp_path / "old", 1)
    write_tree(tmp_path / "new", 2)
    shutil.copy(tmp_path / "new" / "state.json", tmp_path / "old")
    shutil.copy(tmp_path / "new" / "state.safetensors", tmp_path / "old" / "state.safetensors.new")
    assert load_tree(tmp_path / "old")["n"] == 2
    (tmp_path / "old" / "state.safetensors.new").unlink()
    with pytest.raises(CheckpointError, match=r"state\.safetensors is not the file that was saved"):
        load_tree(tmp_path / "old")


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(path, {"a": float("nan")})
    with pytest.raises(ConfigError, match="cannot be written"):
        storage.write_json(tmp_path / "none" / "a.json", {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_flush", full)
    with pytest.raises(ConfigError, match="No space left"):
        storage.write_json(path, {"a": 2})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_checkpoint_that_its_run_deletes_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on between a reader's look at the folder and its opening of the newest checkpoint."""
    write_checkpoint(tmp_path, 1)
    from compressm.lab.runs import checkpoints as module

    def late(path: Path) -> Any:
        if path.name.endswith("1"):
            with suppress(CheckpointError):
                write_checkpoint(tmp_path, 2)
        return load_tree(path)

    monkeypatch.setattr(module, "load_tree", late)
    tree, damaged = Checkpoints(tmp_path, keep=1).read()
    assert (tree["n"], damaged) == (2, [])
