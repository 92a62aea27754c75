"""Tensors and their description in two files that are replaced together: a kill leaves the old pair or the new one.

The tensors are in a safetensors file. A JSON file describes them and holds the SHA-256 of the tensors' file. Both are
first written under temporary names and flushed to disk. Renaming the JSON file makes the new pair valid; the tensors'
file is renamed next. A reader between the two renames, or after a kill there, finds by the checksum that the tensors
still have their temporary name.

Other processes may read at the same time. A reader opens the description and every file that may hold its tensors, and
then uses only these open files, not their names. An open file keeps its content when it is renamed or deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressm.errors import CheckpointError, ConfigError

FORMAT = 1
_LARGEST_JSON = 256 << 20  # bytes; a description of a hundred thousand tensors takes some 10 MB
_ATTEMPTS = 1000  # to read a pair, if it is replaced between two calls to open each time


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
            # Left by a kill. If the JSON file refers to it, it is the only copy of the present checkpoint.
            if json_path.exists() and _expected_sha256(json_path) == sha256_of(tensors_new):
                os.replace(tensors_new, tensors_path)
            else:
                tensors_new.unlink()
        save_file(tensors, tensors_new)
        _flush(tensors_new)
        signed = {**description, "sha256": sha256_of(tensors_new)}
        text = json.dumps({**signed, "own_sha256": _own_sha256(signed)}, indent=1, allow_nan=False)
        json_new.write_text(text + "\n", encoding="utf-8")
        _flush(json_new)
        _flush(folder)
        os.replace(json_new, json_path)  # from here on the new checkpoint is valid
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
    """The description and the tensors of the same save, on the CPU.

    Another process may write the pair at the same time. The result is then the old pair or the new one.

    Raises:
        CheckpointError: the pair is missing, unreadable or of another format, or the checksum does not agree.
    """
    json_path = folder / json_name
    for _ in range(_ATTEMPTS):
        with _opened_description(json_path) as file:
            description = _description(json_path, file)
            if description.get("format") != FORMAT:
                raise CheckpointError(
                    f"{json_path}: format {description.get('format')!r}, and this version reads format {FORMAT}; load "
                    "it with the version of compressm that wrote it"
                )
            tensors = _tensors(folder / tensors_name, description.get("sha256"))
            if isinstance(tensors, dict):
                return description, tensors
            # If the description has not been replaced, its tensors are in one of the opened files.
            if tensors is not None and _is_at(file, json_path):
                raise CheckpointError(
                    f"{folder / tensors_name} {tensors}: copy the folder again, or use an older checkpoint"
                )
    raise CheckpointError(
        f"{folder} was written anew {_ATTEMPTS} times while it was being read; read it when its writer pauses"
    )


def _tensors(path: Path, sha256: object) -> dict[str, Tensor] | str | None:
    """The tensors with this checksum, from the file or its successor beside it; a message if both are wrong; None if
    they were replaced in the meantime.

    The last name repeats the first one, since the writer may rename the second file to the first name between the two
    attempts to open them.
    """
    successor = path.with_name(f"{path.name}.new")
    with contextlib.ExitStack() as stack:
        files: list[tuple[Path, BinaryIO]] = []
        for name in (path, successor, path):
            try:
                files.append((name, stack.enter_context(name.open("rb"))))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _unreadable(name, error) from error
        for name, file in files:
            try:
                if _sha256(file) == sha256:
                    return _loaded(file, name)
            except OSError as error:
                raise _unreadable(name, error) from error
            except SafetensorError as error:
                raise CheckpointError(f"{name}: no safetensors file ({error}); use an older checkpoint") from error
    return "is not the file that was saved (SHA-256 differs)" if files else "is missing"


def _loaded(file: BinaryIO, path: Path) -> dict[str, Tensor] | None:
    """The tensors of an open file; None if they can only be read by its name, and that now names another file."""
    descriptor = Path(f"/dev/fd/{file.fileno()}")
    name = descriptor if _is_at(file, descriptor) else path
    try:
        # Copies, since tensors of a mapped file may be unaligned, and change with the file.
        tensors = {key: tensor.clone() for key, tensor in load_file(name).items()}
    except FileNotFoundError:
        return None
    return tensors if name is descriptor or _is_at(file, path) else None


def _is_at(file: IO[Any], path: Path) -> bool:
    """Whether a path names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check its permissions")


def _opened_description(json_path: Path) -> BinaryIO:
    try:
        return json_path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"no checkpoint in {json_path.parent}: {json_path.name} is missing; check the path"
        ) from None
    except OSError as error:
        raise _unreadable(json_path, error) from error


def _description(json_path: Path, file: BinaryIO) -> dict[str, Any]:
    try:
        if (size := os.fstat(file.fileno()).st_size) > _LARGEST_JSON:
            raise CheckpointError(f"{json_path}: {size} bytes are too many for a description; use another checkpoint")
        description = json.loads(file.read().decode("utf-8"))
        whole = isinstance(description, dict) and description.pop("own_sha256", None) == _own_sha256(description)
    except OSError as error:
        raise _unreadable(json_path, error) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
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
        with _opened_description(json_path) as file:
            return _description(json_path, file).get("sha256")
    except CheckpointError:
        return None


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return _sha256(file)


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


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A temporary name beside a path for a new file, which replaces the path once it is complete.

    A reader finds the old file or the new one, also after a kill.
    """
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")  # unique to this writer
    try:
        yield new
        _flush(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: no reader finds it half written.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; see `write_text`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
