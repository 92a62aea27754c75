"""Spectra over the course of real, short runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from compressm.cutting.spectrum import SpectrumChange
from compressm.lab.config import parse_config
from compressm.lab.runs.loop import _Run, train
from compressm.lab.runs.spectra import settled_at

# Accuracies of so few digits cannot resolve a max_drop of 0, and setbacks end the cutting.
pytestmark = pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")


def config(**compression: Any) -> Any:
    return parse_config(
        {
            "data": {"name": "digits"},
            "model": {"d_model": 4, "d_state": 10, "n_layers": 2},
            "optimizer": {"lr": 0.01},
            "compression": compression or {"enabled": False},
            "run": {
                "steps": 20, "batch_size": 20, "eval_every": 0, "checkpoint_every": 3, "spectrum_every": 4,
                "device": "cpu", "tensorboard": False,
            },
        }
    )  # fmt: skip


def test_every_layer_at_every_look(tmp_path: Path) -> None:
    spectra = train(config(states=4, cuts=1, window=0.5), output=tmp_path / "run", quiet=True).spectra or []
    assert [entry["step"] for entry in spectra] == [0, 4, 8, 12, 16, 20]
    for entry in spectra:
        sizes = [len(layer["hsv"]) for layer in entry["layers"].values()]
        assert sizes == ([20, 20] if entry["step"] < 10 else [8, 8])
        assert [2 * layer["states"] for layer in entry["layers"].values()] == sizes
        compared = [layer["change"] is not None for layer in entry["layers"].values()]
        assert all(compared) == any(compared) == (entry["step"] not in (0, 12))
    first = spectra[1]["layers"]["blocks.0.ssm"]["change"]
    assert 0 < first["largest_move"] <= first["weyl_bound"]
    stored = json.loads((tmp_path / "run/result.json").read_text())
    assert stored["spectra"] == spectra


def test_a_resumed_run_has_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config(), output=tmp_path / "whole", quiet=True)
    step = _Run._train_step

    def interrupted(self: _Run) -> None:
        if self.step == 14:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config(), output=tmp_path / "broken", quiet=True)
    assert train(config(), output=tmp_path / "broken", resume=True, quiet=True).spectra == whole.spectra


def test_what_a_roll_back_undoes_is_not_in_the_record(tmp_path: Path) -> None:
    tree = config().model_dump(mode="json")
    tree["compression"] = {
        "states": 1, "cuts": 1, "start": 51, "window": 0.1, "max_drop": 0.0, "check_after": 6, "on_setback": "stop",
    }  # fmt: skip
    tree["model"] |= {"d_model": 6, "n_layers": 1, "r_min": 0.9, "max_phase": 0.6}  # learns something within 60 steps
    tree["optimizer"]["lr"] = 0.03
    tree["run"] |= {"steps": 90, "spectrum_every": 15}
    result = train(parse_config(tree), output=tmp_path / "run", quiet=True)
    assert [event["kind"] for event in result.history][-4:] == ["rolled_back", "stopped", "fell_short", "ended"]
    entries = result.spectra or []
    assert [entry["step"] for entry in entries] == [0, 15, 30, 45, 60, 75, 90]
    assert all(len(entry["layers"]["blocks.0.ssm"]["hsv"]) == 20 for entry in entries)


def test_when_it_settled() -> None:
    def entry(step: int, moved: float | None) -> dict[str, Any]:
        change = None if moved is None else asdict(SpectrumChange(0, 0, 1, moved, 0, 0, 0))
        return {"step": step, "layers": {"a": {"change": change}}}

    still = [entry(0, None), entry(10, 0.5), entry(20, 0.01), entry(30, 0.001)]
    assert settled_at(still, "a") == 10
    assert settled_at([*still, entry(40, 0.3)], "a") is None
    assert settled_at([*still, entry(40, None), entry(50, 0.01)], "a") == 10
    assert settled_at(still, "a", 0.6) == 0
