"""Models and data of the user's own, from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import compressm
from compressm.cli import main
from compressm.errors import ConfigError
from compressm.lab.data.class_names import guessed
from compressm.lab.data.files import read_content
from compressm.lab.data.own import content_of, own_data
from compressm.lab.named import call_named
from compressm.lab.one_shot import compress_checkpoint
from compressm.layers import S5, SequenceRegressor

MODULE = """
import numpy as np
from torch import nn
from compressm.lab.named import call_named
from compressm.layers import S5


class Mine(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.inp, self.s5, self.out = nn.Linear(channels, 4), S5(4, 16), nn.Linear(4, classes)

    def forward(self, u):
        return self.out(self.s5(self.inp(u)).mean(1))


def build(d_input=1, n_classes=2):
    return Mine(d_input, n_classes)


def data():
    random = np.random.default_rng(0)
    y = np.arange(60) % 3
    return (random.normal(size=(60, 20, 1)) + y[:, None, None]).astype("float32"), y
"""
SHORT = ["run.steps=8", "run.batch_size=8", "run.eval_every=4", "run.device=cpu", "compression.enabled=false"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with a module of the user's."""
    (tmp_path / "ownmodel.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ownmodel", raising=False)
    return tmp_path


def arrays(count: int = 30) -> dict[str, Any]:
    random = np.random.default_rng(1)
    return {"x": random.normal(size=(count, 10, 1)).astype(np.float32), "y": np.arange(count) % 3}


def test_train_cut_and_load_a_model_and_data_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--model", "ownmodel:build", "--data", "ownmodel:data"]
    assert main(["train", *own, *SHORT, "--output", "run"]) == 0
    result = json.loads((here / "run" / "result.json").read_text())
    assert result["state_dims"] == [16]
    capsys.readouterr()
    command = ["compress", "run/model", *own, "--states", "4", "--sequences", "8", "--output", "small"]
    assert main([*command, "--json", "loss.json"]) == 0
    assert "16 → 4" in capsys.readouterr().out
    loss = json.loads((here / "loss.json").read_text())
    assert loss["loss_after"] == pytest.approx(loss["loss_before"], rel=0.5)
    assert main(["analyze", "small", "--model", "ownmodel:build"]) == 0  # also that one knows the three classes
    module = sys.modules["ownmodel"]
    assert compressm.load("small", model=module.build(n_classes=3)).s5.d_state == 4


def test_a_linear_model_is_cut_from_its_weights_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "ownmodel:build", "--data", "ownmodel:data", *SHORT, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "Mine: " in plan
    assert "s5 16" in plan
    assert "20 steps, 1 channel, 3 classes" in plan
    assert not (here / "runs").exists()
    save_file(sys.modules["ownmodel"].build().state_dict(), "weights.safetensors")
    assert main(["compress", "weights.safetensors", "--model", "ownmodel:build", "--states", "4", "--dry-run"]) == 0
    assert "the loss was not measured" in capsys.readouterr().out
    assert main(["analyze", "weights.safetensors", "--model", "ownmodel:build", "--quiet", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["layers"]["s5"]
    assert err == ""
    assert sorted(path.name for path in here.iterdir() if path.is_dir() and path.name != "__pycache__") == []


def test_the_card_of_a_small_model_of_ones_own_says_how_to_load_it_and_what_it_does(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = pytest.importorskip("huggingface_hub")
    model = ["--model", "ownmodel:build", "--data", "ownmodel:data"]
    assert main(["train", *model, *SHORT, "--output", "run"]) == 0
    assert main(["compress", "run/model", *model, "--states", "4", "--output", "small", "--sequences", "16"]) == 0
    out = capsys.readouterr().out
    for word in ("token", "prefix", "taken by", "tensor parallelism"):  # it generates no text
        assert word not in out
    card = cards.ModelCard.load("small/README.md")
    assert 'model = compressm.load("FOLDER", model=Mine(...))' in card.text
    assert "| 1 | 16 | 4 |" in card.text
    assert "`s5`: H-infinity error" in card.text
    assert "made by `compressm compress run/model" in card.text
    assert {one.metric_type for one in card.data.eval_results} == {"loss", "accuracy"}
    assert "compressed" in card.data.tags


def test_quiet_says_nothing_and_verbose_says_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"lonely": torch.zeros(1)}, "weights.safetensors")
    arguments = ["analyze", "weights.safetensors", "--model", "ownmodel:build"]
    assert main([*arguments, "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, "--verbose"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "torch 2." in said


@pytest.mark.parametrize("form", ["npz", "splits", "npy folder", "csv", "class folders"])
def test_the_same_data_are_read_from_every_kind_of_file(form: str, tmp_path: Path) -> None:
    made = arrays()
    x, y = made["x"], made["y"]
    path = tmp_path / "data"
    if form in ("npz", "splits"):
        path = tmp_path / "data.npz"
        parts = {"x_train": x[:20], "y_train": y[:20], "x_test": x[20:], "y_test": y[20:]}
        np.savez(path, **(made if form == "npz" else parts))
    elif form == "npy folder":
        path.mkdir()
        for name, value in made.items():
            np.save(path / f"{name}.npy", value)
    elif form == "csv":
        path = tmp_path / "data.csv"
        rows = [",".join([*(f"{v:.9g}" for v in row[:, 0]), "abc"[label]]) for row, label in zip(x, y, strict=True)]
        path.write_text("\n".join([",".join([*(f"t{i}" for i in range(10)), "label"]), *rows]), encoding="utf-8")
    else:
        for index, (row, label) in enumerate(zip(x, y, strict=True)):
            (path / "abc"[label]).mkdir(parents=True, exist_ok=True)
            np.save(path / "abc"[label] / f"{index:02}.npy", row)
    data = own_data(str(path), 0.2)
    assert (data.n_classes, data.channels, data.vocabulary) == (3, 1, None)
    found = torch.cat([split.x for split in (data.train, data.validation, data.test)])
    labels = torch.cat([split.y for split in (data.train, data.validation, data.test)])
    assert len(data.test) == (10 if form == "splits" else 6)
    order, truth = found[:, 0, 0].argsort(), torch.from_numpy(x)
    expected = truth[:, 0, 0].argsort()
    torch.testing.assert_close(found[order], truth[expected])
    torch.testing.assert_close(labels[order], torch.from_numpy(y)[expected])


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    x, y = arrays()["x"][:, :, 0], arrays()["y"]
    columns = {f"t{i}": x[:, i] for i in range(10)}
    parquet.write_table(pyarrow.table({**columns, "label": y}), tmp_path / "data.parquet")
    content = read_content(tmp_path / "data.parquet")
    np.testing.assert_array_equal(content["x"], x)
    np.testing.assert_array_equal(content["y"], y)


def test_sequences_of_unequal_length_are_padded_and_their_lengths_told(tmp_path: Path) -> None:
    for index, length in enumerate((5, 3)):
        np.save(tmp_path / f"{index}.npy", np.full((length, 2), float(index + 1)))
    content = read_content(tmp_path)
    assert content["lengths"].tolist() == [5, 3]
    assert content["x"].shape == (2, 5, 2)
    assert content["x"][1, 3:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


class Items(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 1), float(index)), index % 2


@pytest.mark.parametrize("form", ["pair", "mapping", "dataset", "loader"])
def test_what_a_function_may_return(form: str) -> None:
    x, y = torch.arange(4.0)[:, None, None].expand(4, 3, 1), torch.arange(4) % 2
    loader: Any = torch.utils.data.DataLoader(Items(), batch_size=3)
    value = {"pair": (x, y), "mapping": {"x": x, "y": y}, "dataset": Items(), "loader": loader}[form]
    content = content_of(value, "here")
    torch.testing.assert_close(torch.as_tensor(content["x"]), x)
    torch.testing.assert_close(torch.as_tensor(content["y"]), y)


def test_what_a_function_may_not_return() -> None:
    for value in ("text", 7, [], [("a", "b")]):
        with pytest.raises(ConfigError, match="here returned"):
            content_of(value, "here")


def test_tokens_and_measurements_are_told_apart(tmp_path: Path) -> None:
    y = np.arange(20) % 2
    np.savez(tmp_path / "tokens.npz", x=np.arange(100).reshape(20, 5) % 7, y=y)
    np.savez(tmp_path / "signed.npz", x=np.arange(100).reshape(20, 5) % 7 - 3, y=y)
    assert own_data(str(tmp_path / "tokens.npz"), 0.2).vocabulary == 7
    assert own_data(str(tmp_path / "signed.npz"), 0.2).vocabulary is None


def in_splits(path: Path, train: dict[str, Any], test: dict[str, Any]) -> str:
    np.savez(path, **{f"{k}_train": v for k, v in train.items()}, **{f"{k}_test": v for k, v in test.items()})
    return str(path)


def test_a_name_is_the_same_class_in_every_split(tmp_path: Path) -> None:
    x, names = arrays()["x"], np.array(["ant", "bee", "cat"])
    test = {"x": x[:4], "y": names[[1, 2, 1, 2]]}  # no ant here
    data = own_data(in_splits(tmp_path / "data.npz", {"x": x, "y": names[np.arange(30) % 3]}, test), 0.2)
    assert data.test.y.tolist() == [1, 2, 1, 2]
    assert data.n_classes == 3
    with pytest.raises(ConfigError, match="to predict numbers give finite ones"):
        own_data(str(tmp_path / "data.npz"), 0.2, "regression")


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.bool_])
def test_one_hot_rows_are_classes(tmp_path: Path, kind: Any) -> None:
    y = np.arange(30) % 3
    np.savez(tmp_path / "data.npz", x=arrays()["x"], y=np.eye(3, dtype=kind)[y])
    data = own_data(str(tmp_path / "data.npz"), 0.2)
    assert (data.task, data.n_classes) == ("classification", 3)
    labels = torch.cat([split.y for split in (data.train, data.validation, data.test)])
    assert labels.bincount().tolist() == [10, 10, 10]
    assert own_data(str(tmp_path / "data.npz"), 0.2, "regression").train.y.shape[1:] == (3,)


def test_labels_that_are_missing_are_no_class(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("t0,t1,label\n1,2,a\n3,4,\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="column label, line 3: there is no value"):
        own_data(str(tmp_path / "data.csv"), 0.2)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"t0": [1.0, 2.0], "label": ["a", None]}), tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match="y has no label for sequence 1"):
        own_data(str(tmp_path / "data.parquet"), 0.2)


def test_hidden_files_are_no_class_and_an_empty_sequence_is_named(tmp_path: Path) -> None:
    for folder in (".ipynb_checkpoints", "a", "b"):
        (tmp_path / folder).mkdir()
        for index in range(2):
            np.save(tmp_path / folder / f"{index}.npy", np.ones((4, 1)))
    (tmp_path / "a" / "._0.npy").write_bytes(b"left by a file system")
    assert read_content(tmp_path)["y"].tolist() == ["a", "b", "a", "b"]
    np.save(tmp_path / "b" / "2.npy", np.ones((0, 1)))
    with pytest.raises(ConfigError, match=r"2\.npy holds a sequence of no steps"):
        read_content(tmp_path)


def test_a_class_without_sequences_is_named_wherever_it_stands(tmp_path: Path) -> None:
    for folder in "abc":
        (tmp_path / folder).mkdir()
    for empty in "abc":
        for folder in "abc":
            np.save(tmp_path / folder / "0.npy", np.ones((4, 1)))
        (tmp_path / empty / "0.npy").unlink()
        with pytest.raises(ConfigError, match=f"the subfolder {empty} holds no .npz.* put its sequences there, or del"):
            read_content(tmp_path)
    (tmp_path / "0.csv").write_text("u\n1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"both in itself \(0.csv\) and in the subfolder a"):
        read_content(tmp_path)


def class_folders(path: Path, names: Sequence[str], count: int = 16) -> Path:
    """A folder per class, whose sequences lie at the height of the name's number."""
    random = np.random.default_rng(2)
    for name in names:
        (path / name).mkdir(parents=True)
        for index in range(count):
            np.save(path / name / f"{index:02}.npy", random.normal(size=(10, 1)).astype(np.float32) + 3 * int(name))
    return path


def test_names_are_the_same_classes_in_every_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = class_folders(here / "all", ["2", "10", "7"])  # by turns they would stand in another order as text
    train = ["--data", str(everything), *SHORT, "run.steps=30", "optimizer.lr=0.02"]
    assert main(["train", "--model", "ownmodel:build", *train, "--output", "run"]) == 0
    some = class_folders(here / "some", ["10", "7"])
    cut = ["--model", "ownmodel:build", "--states", "16", "--sequences", "16", "--json", "r.json"]
    for checkpoint, output in (("run/model", "small"), ("small", "smaller")):  # the names go on with the model
        assert main(["compress", checkpoint, *cut, "--data", str(some), "--output", output]) == 0
        model = compressm.load(checkpoint, sys.modules["ownmodel"].build(n_classes=3)).eval()
        sequences = [(number, np.load(some / name / f"{8 + i:02}.npy")) for i in range(8) for name, number in CLASSES]
        right = [int(model(torch.from_numpy(u)[None]).argmax()) == number for number, u in sequences]
        assert json.loads((here / "r.json").read_text())["score_before"] == pytest.approx(np.mean(right))
    capsys.readouterr()
    assert main(["analyze", "small", "--model", "ownmodel:build", "--data", str(some), "--sequences", "8"]) == 0
    class_folders(here / "strange", ["2", "8"])
    assert main(["compress", "small", *cut, "--data", "strange", "--output", "no"]) == 2
    assert "holds the class '8': the model was trained with 2, 7, 10" in capsys.readouterr().err


CLASSES = (("10", 2), ("7", 1))  # in alphabetical order, as folders are read


def test_a_model_without_names_takes_them_in_alphabetical_order_and_says_so(tmp_path: Path) -> None:
    names = np.array(["dog", "ant", "bee"])
    with pytest.warns(UserWarning, match="ant = 0, bee = 1, dog = 2; if it was trained with another order"):
        assert guessed(names, 3, "y").tolist() == [2, 0, 1]
    assert guessed(np.array(["2", "0"]), 3, "y").tolist() == [2, 0]
    with pytest.raises(ConfigError, match=r"holds names \('ant', 'bee', 'dog'\), 3 of them"):
        guessed(names, 4, "y")


def test_labels_beyond_the_classes_of_a_model_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressm.save(call_named("ownmodel:build", "--model"), here / "saved")
    np.savez(here / "data.npz", x=arrays()["x"], y=arrays()["y"])
    command = ["compress", "saved", "--model", "ownmodel:build", "--states", "4", "--sequences", "8", "--data"]
    assert main([*command, "data.npz", "--output", "small"]) == 2
    assert "holds labels up to 2: Mine knows 2 classes, 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("per_step", [False, True])
def test_the_numbers_of_a_file_are_what_a_regressor_is_held_against(per_step: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceRegressor(1, 1, 4, 8, per_step=per_step).eval()
    compressm.save(model, tmp_path / "big")
    x = arrays()["x"]
    y = np.arange(300).reshape(30, 10) % 7 if per_step else np.arange(30)  # whole numbers, and no classes
    np.savez(tmp_path / "data.npz", x=x, y=y)
    loss = compress_checkpoint(tmp_path / "big", None, tmp_path / "data.npz", states=8, sequences=12)
    with torch.no_grad():
        wrong = model(torch.from_numpy(x[12:24])).reshape(12, -1) - torch.from_numpy(y[12:24]).reshape(12, -1)
    assert loss.loss_before == pytest.approx(float(wrong.square().mean()), rel=1e-5)
    np.savez(tmp_path / "data.npz", x=x, y=np.ones((30, 3)))
    with pytest.raises(ConfigError, match=r"has shape \(30, 3\): .* was expected"):
        compress_checkpoint(tmp_path / "big", None, tmp_path / "data.npz", states=8, sequences=12)


def test_what_data_are_is_told_by_all_splits(tmp_path: Path) -> None:
    x, y = np.arange(150).reshape(30, 5) % 7, np.arange(30) % 2
    tokens = own_data(in_splits(tmp_path / "tokens.npz", {"x": x, "y": y}, {"x": x - 3, "y": y}), 0.2)
    assert (tokens.vocabulary, tokens.train.x.dtype, tokens.test.x.dtype) == (None, torch.float32, torch.float32)
    numbers = own_data(in_splits(tmp_path / "y.npz", {"x": x, "y": y * 1.0}, {"x": x, "y": y + 0.5}), 0.2)
    assert (numbers.task, numbers.train.y.shape[1:], numbers.test.y.shape[1:]) == ("regression", (1,), (1,))
    wide = {"x": np.ones((30, 5, 2), np.float32), "y": y}
    with pytest.raises(ConfigError, match=r"different channels of x \(1, 2\)"):
        own_data(in_splits(tmp_path / "wide.npz", {"x": np.ones((30, 5, 1), np.float32), "y": y}, wide), 0.2)
    several = {"x": x, "y": np.ones((30, 2)) / 2}
    with pytest.raises(ConfigError, match=r"different numbers to predict \(1, 2\)"):
        own_data(in_splits(tmp_path / "several.npz", {"x": x, "y": y / 2}, several), 0.2)


def test_the_layer_of_these_tests_is_linear() -> None:
    assert compressm.analyze(S5(4, 16))[""].states == 16


def test_a_newcomers_mistakes_are_answered_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "ownmodel:build"]
    save_file({**_built().state_dict()}, "weights.safetensors")
    np.savez("wide.npz", x=np.zeros((80, 20, 2), np.float32), y=np.arange(80) % 2)
    np.savez("alike.npz", x=np.zeros((80, 20, 1), np.float32), y=np.zeros(80, int))
    compressm.save(_built(), "run/model")
    cut = ["--states", "4", "--dry-run"]
    for command, said in (
        (
            ["compress", "weights.safetensors", *model, *cut, "--data", "wide.npz"],
            "cannot be called with u, float32",
        ),
        (["compress", "run", *model, *cut], "run is the folder of a run: name the model in it, run/model"),
        (["compress", "run/model", *cut], "or to a command --model"),
        (["compress", "run/model", *model, "--dry-run"], "max_loss, max_drop; got none"),
        (["train", *model, "--data", "alike.npz", "--dry-run"], "is 0 in every sequence"),
    ):
        assert main(command) == 2
        line = capsys.readouterr().err
        assert said in line
        assert line.count("\n") == 1
    assert main(["train", *model, "--data", "ownmodel:data", "--states", "16", "--dry-run"]) == 0
    assert "none: states 16, and no layer has more than 16" in capsys.readouterr().out


def _built() -> torch.nn.Module:
    return call_named("ownmodel:build", "--model")
