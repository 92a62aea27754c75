"""Configurations of the paper's code: what they mean there is what they mean here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compressm.cli import main
from compressm.errors import ConfigError
from compressm.lab.config import load_config
from compressm.lab.runs.migrate import import_config, write_config

PAPER: dict[str, Any] = {
    "dataset": "smnist",
    "model": {"num_blocks": 1, "state_dim": 256, "hidden_dim": 8, "r_min": 0.9, "r_max": 0.999, "drop_rate": 0.1},
    "training": {
        "num_steps": 200_000, "batch_size": 50, "lr": 0.0004, "weight_decay": 0.0, "ssm_lr_factor": 1.0,
        "use_warmup_cosine": False, "eval_steps": 5000,
    },
    "reduction": {
        "mode": "tolerance", "selection": "largest", "tol": 0.98, "red_start": 0, "red_end": 20_000,
        "red_interval": 2000, "hsv_interval": 0, "reduction_fraction": 0.1, "performance_tolerance": 0.02,
        "method": "sqrtm",
    },
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in PAPER.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    path = folder / "paper.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def cut_steps(config: Any) -> list[int]:
    """As `Compressor` places them."""
    compression = config.compression
    distance = max(1, round(compression.window * config.run.steps / compression.cuts))
    return [compression.start + distance * k for k in range(1, compression.cuts + 1)]


def their_steps(start: int, end: int, interval: int, evaluated: int, total: int) -> list[int]:
    """Their loop: a reduction after step index ``step`` is one after ``step + 1`` steps, where they evaluate."""
    return [
        step + 1
        for step in range(total)
        if (step + 1) % evaluated == 0 and start <= step < end and (step + 1) % interval == 0
    ]


def test_the_sequential_mnist_of_the_paper_is_ours(tmp_path: Path) -> None:
    theirs, ours = import_config(written(tmp_path)), load_config("smnist")
    for section in ("data", "optimizer", "schedule"):
        assert getattr(theirs, section) == getattr(ours, section), section
    assert theirs.model == ours.model.model_copy(update={"max_phase": None})  # that code draws phases all around
    assert theirs.compression.tolerance == ours.compression.tolerance == 0.02
    assert theirs.compression.method == "complex"
    assert theirs.run.steps == ours.run.steps
    assert theirs.run.select == ours.run.select == "best"
    assert cut_steps(theirs) == [10_000, 20_000]  # every 2000 steps, but evaluated every 5000


@pytest.mark.parametrize(
    ("start", "end", "interval", "evaluated"),
    [
        (0, 20_000, 2000, 5000),
        (1000, 4000, 100, 1000),
        (0, 8000, 100, 2000),
        (500, 9100, 1000, 300),
        (0, 18_000, 2000, 4500),
    ],
)
def test_cuts_are_made_at_the_same_steps(start: int, end: int, interval: int, evaluated: int, tmp_path: Path) -> None:
    path = written(
        tmp_path, reduction__red_start=start, reduction__red_end=end, reduction__red_interval=interval,
        training__eval_steps=evaluated, training__num_steps=50_000,
    )  # fmt: skip
    assert cut_steps(import_config(path)) == their_steps(start, end, interval, evaluated, 50_000)


def test_modes(tmp_path: Path) -> None:
    assert not import_config(written(tmp_path, reduction__mode="none")).compression.enabled
    fixed = import_config(written(tmp_path, reduction__mode="fixed")).compression
    assert fixed.fraction == pytest.approx(0.9**2)
    assert fixed.max_drop is None
    pragmatic = import_config(written(tmp_path, reduction__mode="pragmatic")).compression
    assert (pragmatic.max_drop, pragmatic.on_setback, pragmatic.check_after) == (0.02, "stop", 10_000)
    assert import_config(written(tmp_path, reduction__selection="random")).compression.selection == "random_modes"
    weights = import_config(written(tmp_path, training__weight_decay=0.05, training__use_warmup_cosine=True))
    assert (weights.optimizer.name, weights.optimizer.weight_decay, weights.schedule.name) == ("adamw", 0.05, "cosine")


def test_the_file_that_is_written_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path), tmp_path / "ours.yaml"
    assert main(["import", str(path), "--output", str(out)]) == 0
    assert f"compressm train {out}" in capsys.readouterr().out
    assert load_config(out) == import_config(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_config(import_config(path), tmp_path / "none/ours.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "pathfinder"}, r"dataset = 'pathfinder': there are smnist"),
        ({"optimizer": {}}, r"optimizer is none of its sections"),
        ({"model__layers": 3}, r"model\.layers: unknown key"),
        ({"model": [1]}, r"model must be a section"),
        ({"reduction__mode": "other"}, r"mode 'other'"),
        ({"reduction__red_interval": 0}, r"red_interval = 0: must be a whole number"),
        ({"reduction__red_end": 100}, r"no step in 0 to 100"),
        ({"reduction__tol": "0.98"}, r"tol = '0\.98': must be a number from 0 to 1"),
        ({"training__lr": -1.0}, r"optimizer\.lr = -1\.0"),
    ],
)
def test_what_cannot_be_brought_over(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        import_config(written(tmp_path, **changes))
