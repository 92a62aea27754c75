"""From a configuration of the CompreSSM paper's published code (camail-official/compressm) to one of ours.

That code writes no weights, so only a configuration can be brought over. Its settings differ from ours:

- ``tol`` is the share of the Hankel energy to keep, ours is the one to discard;
- it cuts after every ``red_interval``-th step from ``red_start`` to ``red_end``, ours makes ``cuts`` in a ``window``;
- ``fixed`` and ``pragmatic`` take ``reduction_fraction`` of the states each time; ours name the final ``fraction``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from compressm.errors import ConfigError
from compressm.lab.config import Config, parse_config, read_yaml
from compressm.runtime.files import write_text

_SELECTIONS = {"largest": "hankel", "smallest": "smallest", "random": "random_modes"}
_DATA = ("smnist", "scifar", "imdb", "listops")
# The defaults of that code, where a file leaves a key out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "num_blocks": 6, "state_dim": 512, "hidden_dim": 256, "r_min": 0.9, "r_max": 0.999, "drop_rate": 0.1,
    },
    "training": {
        "num_steps": 100_000, "batch_size": 64, "lr": 0.004, "weight_decay": 0.01, "ssm_lr_factor": 0.5,
        "use_warmup_cosine": True, "eval_steps": 1000, "seed": 42,
    },
    "reduction": {
        "mode": "none", "selection": "largest", "tol": 0.99, "red_start": 0, "red_end": 100_000, "red_interval": 2000,
        "hsv_interval": 0, "reduction_fraction": 0.1, "performance_tolerance": 0.02, "method": "sqrtm",
    },
}  # fmt: skip


def import_config(path: Path) -> Config:
    """Read a configuration of the paper's code.

    Args:
        path: its YAML file.

    Raises:
        ConfigError: not such a file, or something that this library does not have.
    """
    tree = read_yaml(path)
    unknown = sorted(tree.keys() - {"dataset", "data_dir", *_DEFAULTS})
    if unknown or "dataset" not in tree:
        what = f"{unknown[0]} is none of its sections" if unknown else "dataset is missing"
        raise ConfigError(f"{path}: not a configuration of the paper's code ({what})")
    if tree["dataset"] not in _DATA:
        raise ConfigError(f"{path}: dataset = {tree['dataset']!r}: there are {', '.join(_DATA)} here")
    model, training, reduction = (_section(tree, name, path) for name in _DEFAULTS)
    steps = _whole(training, "num_steps", path)
    config: dict[str, Any] = {
        "data": {"name": tree["dataset"]},
        "model": {
            "d_model": model["hidden_dim"],
            "d_state": model["state_dim"],
            "n_layers": model["num_blocks"],
            "dropout": model["drop_rate"],
            "r_min": model["r_min"],
            "r_max": model["r_max"],
        },
        "optimizer": {
            "name": "adamw" if training["weight_decay"] else "adam",
            "lr": training["lr"],
            "ssm_lr_factor": training["ssm_lr_factor"],
            "weight_decay": training["weight_decay"],
        },
        "schedule": {"name": "cosine" if training["use_warmup_cosine"] else "constant"},
        "compression": _compression(reduction, steps, _whole(training, "eval_steps", path), path),
        "run": {
            "steps": steps,
            "batch_size": training["batch_size"],
            "seed": training["seed"],
            "eval_every": training["eval_steps"],
            "checkpoint_every": training["eval_steps"],
            "spectrum_every": reduction["hsv_interval"],
            "select": "best",  # that code reports the test accuracy at the best validation accuracy
        },
    }
    return parse_config(config, str(path))


def _section(tree: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    given, defaults = tree.get(name) or {}, _DEFAULTS[name]
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {name} must be a section")
    given = cast("dict[str, Any]", given)
    for key in given:
        if key not in defaults:
            raise ConfigError(f"{path}: {name}.{key}: unknown key; known are {', '.join(defaults)}")
    return {**defaults, **given}


def _whole(section: Mapping[str, Any], key: str, path: Path, least: int = 1) -> int:
    value = section[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{path}: {key} = {value!r}: must be a whole number, at least {least}")
    return value


def _share(section: Mapping[str, Any], key: str, path: Path) -> float:
    value = section[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"{path}: {key} = {value!r}: must be a number from 0 to 1")
    return float(value)


def _compression(reduction: Mapping[str, Any], steps: int, evaluated: int, path: Path) -> dict[str, Any]:
    """The section, for a run that is evaluated every so many steps."""
    mode, selection = reduction["mode"], reduction["selection"]
    if mode not in ("none", "tolerance", "fixed", "pragmatic") or selection not in _SELECTIONS:
        raise ConfigError(
            f"{path}: reduction: mode {mode!r} with selection {selection!r} is unknown to the paper's code"
        )
    if mode == "none":
        return {"enabled": False}
    asked, start = _whole(reduction, "red_interval", path), _whole(reduction, "red_start", path, 0)
    interval = math.lcm(asked, evaluated)  # that code reduces only at steps at which it evaluates
    end = min(_whole(reduction, "red_end", path), steps)
    before = start // interval  # intervals until the window opens
    cuts = end // interval - before
    if cuts < 1:
        raise ConfigError(
            f"{path}: reduction: no step in {start} to {end} is a multiple of red_interval = {asked} and of "
            f"training.eval_steps = {evaluated}; the paper's code would never reduce"
        )
    made: dict[str, Any] = {
        "start": before * interval,
        "cuts": cuts,
        "window": cuts * interval / steps,
        "method": "complex",
        "selection": _SELECTIONS[selection],
    }
    if mode == "tolerance":
        return {**made, "tolerance": round(1 - _share(reduction, "tol", path), 12), "max_reduction": 1.0}
    made["fraction"] = (1 - _share(reduction, "reduction_fraction", path)) ** cuts
    if mode == "pragmatic":
        allowed = _share(reduction, "performance_tolerance", path)
        made |= {"max_drop": allowed, "check_after": interval, "on_setback": "stop"}
    return made


def write_config(config: Config, path: Path) -> None:
    """Write a configuration as YAML: what differs from the defaults, and what has none.

    Raises:
        ConfigError: the file cannot be written.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    write_text(path, yaml.safe_dump(tree, sort_keys=False))


__all__ = ["import_config", "write_config"]
