from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import compressm
from compressm import __version__
from compressm.cli import main
from compressm.layers import SequenceClassifier
from helpers import newest_checkpoint

CONFIGS = Path(__file__).parents[2] / "src/compressm/lab/configs"
SHORT = ["run.steps=20", "run.eval_every=10", "run.checkpoint_every=5", "run.tensorboard=false", "run.device=cpu"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error that a mistake is answered with."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def edited(name: str, old: str, new: str) -> Callable[[Path], list[str]]:
    """Arguments that train a committed configuration after an edit."""

    def arguments(tmp_path: Path) -> list[str]:
        text = (CONFIGS / name).read_text(encoding="utf-8")
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
        return [str(tmp_path / name)]

    return arguments


def damaged_mnist(tmp_path: Path) -> list[str]:
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(b"not the original")
    return [str(CONFIGS / "smnist.yaml"), f"data.root={tmp_path}"]


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str, str]] = {
    # what is wrong: (arguments, the key, the remedy)
    "no such file": (lambda tmp: [str(tmp / "digit.yaml")], "digit.yaml", "check the path, or choose one of byte-lm,"),
    "not YAML": (edited("digits.yaml", "data:", "data: {"), "digits.yaml, line", "mend that line"),
    "misspelt key": (
        edited("digits.yaml", "  lr: 4e-3", "  learning_rte: 1"),
        "optimizer.learning_rte = 1",
        "known here are",
    ),
    "nearly right key": (edited("digits.yaml", "d_state:", "d_stat:"), "model.d_stat", "did you mean d_state?"),
    "misspelt section": (edited("digits.yaml", "schedule:", "scheduler:"), "scheduler", "did you mean schedule?"),
    "missing key": (edited("digits.yaml", "  steps: 4000\n", ""), "run.steps: missing", "run.steps=<value>"),
    "key given twice": (
        edited("digits.yaml", "run:\n", "run:\n  steps: 1\n"),
        "steps is given twice",
        "mend that line",
    ),
    "wrong type": (
        edited("digits.yaml", "steps: 4000", "steps: many"),
        "run.steps = 'many'",
        "must be a valid integer",
    ),
    "out of range": (
        edited("digits.yaml", "dropout: 0.1", "dropout: 1.5"),
        "model.dropout = 1.5",
        "must be less than 1",
    ),
    "unknown choice": (edited("digits.yaml", "name: adamw", "name: adamx"), "optimizer.name = 'adamx'", "did you mean"),
    "two size rules": (
        edited("digits.yaml", "tolerance: 0.05", "tolerance: 0.05\n  states: 8"),
        "compression: needs exactly one of",
        "got tolerance, states",
    ),
    "cuts after the end": (edited("digits.yaml", "window: 0.1", "window: 1\n  start: 9"), "compression.cuts", "lower"),
    "batch too large": (lambda tmp: [str(CONFIGS / "digits.yaml"), "run.batch_size=9999"], "run.batch_size", "at most"),
    "bad override": (lambda tmp: [str(CONFIGS / "digits.yaml"), "run.steps"], "'run.steps'", "write section.key=value"),
    "no data directory named": (lambda tmp: [str(CONFIGS / "smnist.yaml")], "data.root: missing", "set data.root"),
    "no such directory": (
        lambda tmp: [str(CONFIGS / "smnist.yaml"), f"data.root={tmp}/none"],
        "data.root = ",
        "name the one that holds train-images-idx3-ubyte.gz",
    ),
    "no files there": (
        lambda tmp: [str(CONFIGS / "scifar.yaml"), f"data.root={tmp}"],
        "data.root: neither",
        "put the archive there",
    ),
    "damaged files": (damaged_mnist, "data.root: ", "fetch the original file again"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPRESSM_DATA", raising=False)
    arguments, key, remedy = MISTAKES[mistake]
    assert main(["train", *arguments(tmp_path), "--output", str(tmp_path / "run")]) == 2
    line = one_line(capsys)
    assert key in line
    assert remedy in line
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "CONFIG: missing"),
        (["train", "x.yaml", "--resum"], "No such option: --resum"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in one_line(capsys)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"compressm {__version__}\n"
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out


def test_train_writes_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", str(CONFIGS / "digits.yaml"), *SHORT, "run.seed=3", "--json", "result.json"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "validation" in err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((tmp_path / "runs" / "digits-seed3" / "result.json").read_text())
    assert result["command"].startswith("compressm train ")
    assert result["command"].endswith("run.seed=3 --json result.json")
    assert main(arguments) == 2
    assert "already holds a run; resume it with --resume" in one_line(capsys)
    assert main([*arguments[:-1], "-", "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_probe_answers_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["probe", str(CONFIGS / "digits.yaml"), "run.steps=1000", "run.device=cpu", "--steps", "4"]
    arguments += ["--states", "8,2", "--output", "parts", "--json", "result.json", "--plot", "picture.svg"]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["answer"] in capsys.readouterr().out.lower()
    assert [size["states"] for size in result["sizes"]] == [8, 2]
    assert result["steps"] == 4
    assert result["command"].startswith("compressm probe ")
    assert (tmp_path / "picture.svg").stat().st_size > 1000
    monkeypatch.setattr("compressm.lab.probing._Bench.train", None)  # nothing is trained again
    assert main(arguments) == 0
    again = json.loads((tmp_path / "result.json").read_text())
    assert again == result
    capsys.readouterr()
    assert main([*arguments, "optimizer.lr=0.5"]) == 2
    assert "optimizer.lr = 0.5: the run in parts was started with" in one_line(capsys)
    for wrong, message in (("8", "two different sizes"), ("8,x", "--states 8,x: numbers separated by commas")):
        assert main(["probe", str(CONFIGS / "digits.yaml"), "--states", wrong]) == 2
        assert message in one_line(capsys)


def test_values_that_json_has_no_word_for_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SequenceClassifier(2, 3, d_model=4, d_state=8)
    torch.nn.init.constant_(model.decoder.bias, math.nan)
    compressm.save(model, tmp_path / "model")
    np.savez(tmp_path / "data.npz", x=np.ones((16, 5, 2), np.float32), y=np.zeros(16, np.int64))
    arguments = ["compress", str(tmp_path / "model"), "--states", "4", "--data", str(tmp_path / "data.npz")]
    for number, file in enumerate(("loss.json", "-")):
        output = ["--output", str(tmp_path / f"small{number}"), "--sequences", "8", "--json"]
        assert main([*arguments, *output, file if file == "-" else str(tmp_path / file)]) == 0
    out = capsys.readouterr().out
    printed = json.loads(out[out.index("{") :])
    assert printed["loss_after"] is None
    assert json.loads((tmp_path / "loss.json").read_text())["loss_after"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", str(CONFIGS / "digits.yaml"), "--json", "no/folder.json"], "no/folder.json: its folder does not"),
        (["demo", "--picture", "demo.xyz"], "demo.xyz: the name must end with .png or .svg or .pdf"),
        (["demo", "--json", "no/demo.json"], "no/demo.json: its folder does not"),
        (["reproduce", "speed", "--picture", "speed.gif"], "speed.gif: the name must end with"),
        (["reproduce", "speed", "--markdown", "no/speed.md"], "no/speed.md: its folder does not"),
    ],
)
def test_where_a_result_cannot_go_is_said_before_the_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "compressm.cli", *arguments]


@pytest.mark.slow
def test_killed_from_outside_and_resumed(tmp_path: Path) -> None:
    """As a user meets it: the command is killed at some instant, and given again with --resume."""
    settings = ["run.steps=400", "run.eval_every=50", *SHORT[2:]]
    arguments = ["train", str(CONFIGS / "digits.yaml"), *settings, "--output"]
    assert main([*arguments, str(tmp_path / "unbroken")]) == 0
    process = subprocess.Popen(command(*arguments, str(tmp_path / "killed")), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while (
        not list(tmp_path.glob("killed/checkpoints/*/state.json"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main([*arguments, str(tmp_path / "killed"), "--resume"]) == 0
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    checkpoints = [newest_checkpoint(folder) / "state.safetensors" for folder in (killed, unbroken)]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()
    assert (killed / "model/model.safetensors").read_bytes() == (unbroken / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "hidden", ["typer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("accelerate", "sklearn"))]
)
def test_missing_extra_is_named(hidden: str) -> None:
    code = (
        f"import sys; sys.modules[{hidden!r}] = None\n"  # as if it were not installed
        "from compressm.cli import main\n"
        f"sys.exit(main(['train', {str(CONFIGS / 'digits.yaml')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "compressm[train]"' in done.stderr


def test_import_stays_light() -> None:
    """`import compressm` loads none of the extras, and not scipy, which few calls need."""
    extras = ["accelerate", "matplotlib", "PIL", "pydantic", "yaml", "rich", "scipy", "sklearn", "tensorboard", "typer"]
    code = f"import sys, compressm; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
