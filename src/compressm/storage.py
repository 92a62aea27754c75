"""Tensors and their description in two files, replaced together: a kill leaves the old pair or the new one.

The tensors are in a safetensors file; a JSON file says what they mean and holds the SHA-256 of the tensors' file. Both
are first written beside their final names and flushed to disk. Renaming the JSON file is the instant at which the new
pair counts; the tensors' file follows. Whoever reads between the two renames, or after a kill there, finds by the
checksum that the tensors still lie under their temporary name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressm.errors import CheckpointError, ConfigError

FORMAT = 1
_LARGEST_JSON = 256 << 20  # bytes; a description of a hundred thousand tensors takes some 10 MB


def write_pair(
    folder: Path, tensors_name: str, json_name: str, tensors: dict[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write the pair into a folder, replacing the one that is there; other files are left alone.

    Args:
        folder: created if needed.
        tensors_name, json_name: names of the two files.
        tensors: contiguous tensors on the CPU that share no memory.
        description: plain values; the checksums are added.

    Raises:
        CheckpointError: the folder cannot be written, or the description cannot be expressed in JSON.
    """
    tensors_path, json_path = folder / tensors_name, folder / json_name
    tensors_new, json_new = folder / f"{tensors_name}.new", folder / f"{json_name}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tensors_new.exists():
            # Left by a kill. If the JSON file speaks of this one, it is the only copy of the present checkpoint.
            if json_path.exists() and _expected_sha256(json_path) == _sha256(tensors_new):
                os.replace(tensors_new, tensors_path)
            else:
                tensors_new.unlink()
        save_file(tensors, tensors_new)
        _flush(tensors_new)
        signed = {**description, "sha256": _sha256(tensors_new)}
        text = json.dumps({**signed, "own_sha256": _own_sha256(signed)}, indent=1, allow_nan=False)
        json_new.write_text(text + "\n", encoding="utf-8")
        _flush(json_new)
        _flush(folder)
        os.replace(json_new, json_path)  # from here on the new checkpoint is the one that counts
        _flush(folder)
        os.replace(tensors_new, tensors_path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write a checkpoint to {folder}: {reason}; free space or choose another folder"
        ) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{json_path}: not expressible in JSON ({error}); keep to plain values") from error


def read_pair(folder: Path, tensors_name: str, json_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors, on the CPU.

    Raises:
        CheckpointError: nothing there, unreadable, of another format, or the checksum does not agree.
    """
    json_path = folder / json_name
    description = _description(json_path)
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{json_path}: format {description.get('format')!r}, and this version reads format {FORMAT}; load it with "
            "the version of compressm that wrote it"
        )
    expected, found = description.get("sha256"), False
    for path in (folder / tensors_name, folder / f"{tensors_name}.new"):
        try:
            found = found or path.exists()
            if path.exists() and _sha256(path) == expected:
                # Copies: tensors of a mapped file would lie at addresses of any alignment, and change if the file does.
                return description, {name: tensor.clone() for name, tensor in load_file(path).items()}
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error}); check its permissions"
            ) from error
        except SafetensorError as error:
            raise CheckpointError(f"{path}: no safetensors file ({error}); use an older checkpoint") from error
    state = "is not the file that was saved (SHA-256 differs)" if found else "is missing"
    raise CheckpointError(f"{folder / tensors_name} {state}: copy the folder again, or use an older checkpoint")


def _description(json_path: Path) -> dict[str, Any]:
    try:
        if (size := json_path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(f"{json_path}: {size} bytes are too many for a description; use another checkpoint")
        description = json.loads(json_path.read_text(encoding="utf-8"))
        whole = isinstance(description, dict) and description.pop("own_sha256", None) == _own_sha256(description)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"no checkpoint in {json_path.parent}: {json_path.name} is missing; check the path"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{json_path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise CheckpointError(
            f"{json_path}: damaged ({error}); copy the folder again, or use an older checkpoint"
        ) from error
    if not isinstance(description, dict):
        raise CheckpointError(
            f"{json_path}: an object was expected, not a {type(description).__name__}; use an older checkpoint"
        )
    description = cast("dict[str, Any]", description)
    if not whole:
        raise CheckpointError(
            f"{json_path}: not what was saved (its own SHA-256 differs); copy the folder again, or use an older one"
        )
    return description


def _own_sha256(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _expected_sha256(json_path: Path) -> object:
    try:
        return _description(json_path).get("sha256")
    except CheckpointError:
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power failure."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if path.is_file() and os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinity, and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that is at no instant half written.

    Raises:
        ConfigError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from error
