"""How a configuration is read: from a YAML file, with overrides, or from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from compressm.errors import ConfigError
from compressm.lab.config.messages import explained, shown
from compressm.lab.config.schema import Config
from compressm.lab.config.yaml import parsed
from compressm.training.options import SIZE_RULES

_LARGEST_FILE = 1 << 20  # bytes
_HERE = Path(__file__).parents[1]
# The configuration around a model and data of the user's, which must be given with it.
OWN = _HERE / "own.yaml"


def builtin_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted((_HERE / "configs").glob("*.yaml"))}


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    build: str | None = None,
    source: str | None = None,
    how_far: Mapping[str, float] | None = None,
) -> Config:
    """Read a configuration from a YAML file.

    Args:
        path: the file; or the name of one that comes with the package, ``"smnist"`` for example.
        overrides: ``"section.key=value"``, the value in YAML; they win over the file.
        build: takes the place of the section ``model``, as its key of that name.
        source: takes the place of what the section ``data`` says about where data come from.
        how_far: takes the place of the rules in the section ``compression`` that say how far to cut.

    Raises:
        ConfigError: no such file, not YAML, or an unknown key or unfit value, named by its dotted name with a remedy.
    """
    source_name = OWN.stem if path == OWN else str(path)
    if source_name in (built_in := builtin_configs()):
        path = built_in[source_name]
    tree = read_yaml(Path(path))
    if build is not None:
        tree["model"] = {"build": build}
    if source is not None:
        section = tree.get("data")
        kept = cast("dict[str, Any]", section) if isinstance(section, dict) else {}
        kept = {key: kept[key] for key in ("validation", "max_length", "task") if key in kept}
        tree["data"] = {**kept, "source": source}
    if how_far:
        section = tree.get("compression")
        kept = cast("dict[str, Any]", section) if isinstance(section, dict) else {}
        rest = {key: value for key, value in kept.items() if key not in (*SIZE_RULES, "max_drop")}
        tree["compression"] = {**rest, "enabled": True, **how_far}
    for override in overrides:
        _override(tree, override)
    return parse_config(tree, source_name)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, plain values only.

    Raises:
        ConfigError: no such file, not YAML, or no sections.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise ConfigError(f"{path}: {size} bytes are too many for a configuration; check the path")
        tree = parsed(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file, nor one of the built-in configurations; check the path, or choose one of "
            f"{', '.join(builtin_configs())}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a YAML file was expected") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8; a YAML file was expected") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: sections such as 'data:' and 'run:' were expected, not {shown(tree)}")
    return cast("dict[str, Any]", tree)


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Check a nested dict and turn it into a `Config`.

    Args:
        tree: the sections.
        source: where it comes from, for messages.

    Raises:
        ConfigError: an unknown key or unfit value, named by its dotted name with a remedy.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # Unknown keys first: a misspelt required key is also missing, and the misspelling says more.
        errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(f"{source}: {explained(cast('dict[str, Any]', errors[0]), tree)}{more}") from None


def present_form(saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A stored configuration with the keys that have come since, at the defaults by which it was made.

    A rule about sizes is not limited to half of the states: no ``max_reduction`` and one of 1 are the same to it.
    """
    tree = {section: dict(values) for section, values in saved.items()}
    made = tree.get("compression", {})
    sized = any(made.get(name) is not None for name in ("states", "fraction", "total_states"))
    if sized and made.get("max_reduction") is None:
        made["max_reduction"] = 1.0
    if any(made.get(name) is not None for name in ("tolerance", "max_error")):
        made.setdefault("max_reduction", 1.0)  # one cut was not limited to half of the states
    for section, field in Config.model_fields.items():
        keys: Any = field.annotation
        for key, value in keys.model_fields.items():
            if not value.is_required():
                tree.setdefault(section, {}).setdefault(key, value.get_default(call_default_factory=True))
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: not an override; write section.key=value, for example optimizer.lr=0.001")
    section = tree
    for part in parts[:-1]:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {part} holds {shown(inner)} and has no keys; set {part} itself")
        section = cast("dict[str, Any]", inner)
    section[parts[-1]] = parsed(text, f"override {override!r}")


__all__ = ["OWN", "builtin_configs", "load_config", "parse_config", "present_form", "read_yaml"]
