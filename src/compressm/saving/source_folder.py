"""Re-saving a checkpoint of transformers without losing anything: tensors that it does not load, files, config entries.

`save_pretrained` writes only what was loaded. A checkpoint's folder often holds more: layers for multi-token prediction
that transformers ignores, a tokenizer, a licence, a card, code. This module copies all of it, and names what it leaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.adapters.registry import resized
from compressm.cutting.ordering import ORDER_FILE
from compressm.errors import CheckpointError
from compressm.runtime.paging import places_in

# The weight files that transformers looks for, in this order. Each is one file, or an index of several.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".h5", ".msgpack", ".npz", ".pkl", ".nemo"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".tflite", ".pte", ".mlmodel"),
}
_OWN_FOLDERS = (".git", ".cache")  # of the tools that fetched the checkpoint
# Tensors of old checkpoints that transformers passes over without a word, whatever the model.
_PASSED_OVER = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of the floating-point types of safetensors


@dataclass(frozen=True)
class Carried:
    """What was copied unchanged from a checkpoint's folder to that of the smaller model.

    Attributes:
        tensors: names of the tensors that transformers does not load.
        files: files, beside weights and config.
        left: files that were not copied, and why.
        extended: files that were copied and completed: the card.
        unextended: why the card was copied as it was; empty where it was not.
        narrowed: names of the tensors that transformers loaded in a narrower dtype than the source's, and that the cut
            or training changed, so that they are written in it.
    """

    tensors: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    left: Mapping[str, str] | None = None
    extended: tuple[str, ...] = ()
    unextended: str = ""
    narrowed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"tensors that transformers does not load, copied: {some(self.tensors)}"] if self.tensors else []
        lines += (
            [f"in fewer bits than before, as transformers loads them: {some(self.narrowed)}"] if self.narrowed else []
        )
        lines += [f"files copied: {some(self.files)}"] if self.files else []
        lines += [f"model card extended: {', '.join(self.extended)}"] if self.extended else []
        lines += [f"model card copied as it was: {self.unextended}"] if self.unextended else []
        lines += [f"not copied: {name} ({reason})" for name, reason in (self.left or {}).items()]
        return "\n".join(lines)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads a model of this folder from.

    Raises:
        CheckpointError: none, or an index that cannot be read or names files that are not there.
    """
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json")
    raise CheckpointError(f"{folder} has no {' or '.join(_SINGLE)}, whole or with an index: check the path")


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged ({error}); copy the folder again") from error
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{missing[0]}: missing, and {index.name} names it; copy the folder again")
    return files


def tensors_of(files: Iterable[Path]) -> dict[str, Path]:
    """The names of all tensors in some files, and where each is."""
    found: dict[str, Path] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        else:
            found |= dict.fromkeys(_pickled(file), file)
    return found


def _pickled(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _tensors(names: Mapping[str, Path]) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        mine = [name for name, where in names.items() if where == file]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                read |= {name: tensors.get_tensor(name) for name in mine}
        else:
            every = _pickled(file)
            read |= {name: every[name].clone(memory_format=torch.contiguous_format) for name in mine}
    return read


def unloaded(model: nn.Module, folder: Path, unexpected: Iterable[str]) -> dict[str, Path]:
    """The tensors of a folder that transformers did not load, and where each is.

    Args:
        model: as it was loaded.
        folder: from where.
        unexpected: names that transformers says it found no place for. It does not say those that a model's class tells
            it to pass over.

    Raises:
        CheckpointError: some of them depend on the state size, and would not fit the smaller model.
    """
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    passed_over = [re.compile(str(one)) for one in (*ignored, *_PASSED_OVER)]
    named = tuple(unexpected)
    found = {
        name: file
        for name, file in tensors_of(weight_files(folder)).items()
        if any(name.endswith(one) or one.endswith(name) for one in named)
        or any(one.search(name) for one in passed_over)
    }
    sized = _sized_by_states(model)
    if stiff := sorted(name for name in found if any(f".{name}".endswith(f".{one}") for one in sized)):
        raise CheckpointError(
            f"{folder}: transformers does not load {some(stiff)}, whose size depends on the state dimension, so that "
            "they cannot be cut with the rest: take these layers out of the checkpoint and its config first"
        )
    return found


def _sized_by_states(model: nn.Module) -> set[str]:
    """Names, relative to their layer, of parameters whose shapes depend on the state dimension."""
    sized: set[str] = set()
    for layer, adapter in {type(layer): (layer, adapter) for layer, adapter in find_layers(model).values()}.values():
        states, unit = adapter.state_dim(layer), adapter.unit(layer)
        if states > unit:
            now = dict(layer.named_parameters())
            smaller = resized(layer, adapter, states - unit).values()
            sized |= {name for name, value in smaller.items() if name in now and now[name].shape != value.shape}
    return sized


def carry(source: Path, target: Path, model: nn.Module, extra: Mapping[str, Path], before: set[bytes]) -> Carried:
    """Add everything else that the source has to what `save_pretrained` wrote.

    Args:
        source: the folder that the model was loaded from.
        target: the folder that `save_pretrained` wrote.
        model: as it was saved.
        extra: from `unloaded`.
        before: from `contents` of the model as it was loaded.

    Raises:
        CheckpointError: a tensor of the source that was neither loaded nor can be copied.
    """
    written = set(tensors_of(weight_files(target)))
    missing = {name: file for name, file in tensors_of(weight_files(source)).items() if name not in written}
    # A missing name is no loss if its values were loaded: the model has them under another name, and wrote that one.
    dtypes = {value.dtype for value in model.state_dict().values()}
    lost = [
        name
        for name in missing
        if name not in extra and _digests(_tensors({name: missing[name]})[name], dtypes).isdisjoint(before)
    ]
    if lost:
        raise CheckpointError(
            f"{source}: {some(lost)} would be lost: transformers writes no tensor of that name, and loads none of "
            "these values; take them out of the checkpoint first, or cut the model in Python with compressm.compress"
        )
    narrowed = _put_back_wide(source, target)
    added = {name: file for name, file in missing.items() if name in extra}
    if added:
        _add_shard(target, _tensors(added))
    complete_config(source / "config.json", target / "config.json", cast("Any", model).config)
    loaded = weight_files(source)
    indices = [source / f"{name}.index.json" for name in _SINGLE[: 1 if loaded[0].suffix == ".safetensors" else 2]]
    files, left = copy_files(source, target, [source / "config.json", *loaded, *indices])
    return Carried(tuple(sorted(added)), files, left, narrowed=narrowed)


def contents(model: nn.Module) -> set[bytes]:
    """A digest of every tensor of a model, whatever its name."""
    return {_digest(value) for value in model.state_dict().values()}


def _digests(value: Tensor, dtypes: Iterable[torch.dtype]) -> set[bytes]:
    """Digests of a tensor, as it is and as a model of these dtypes would load it."""
    return {_digest(value), *(_digest(value.to(dtype)) for dtype in dtypes)}


def _digest(value: Tensor) -> bytes:
    """A digest of shape, dtype and about 65,536 elements from all over the tensor, which is enough to recognise it."""
    flat = value.detach().flatten()
    some = flat[:: max(1, len(flat) >> 16)].cpu().contiguous()
    return hashlib.sha256(
        f"{value.dtype} {tuple(value.shape)} ".encode() + some.view(torch.uint8).numpy().tobytes()
    ).digest()


def _put_back_wide(source: Path, target: Path) -> tuple[str, ...]:
    """Write tensors that were narrowed on loading, and not changed since, as they are in the source.

    Published checkpoints keep ``A_log``, ``dt_bias`` and the like in float32 beside weights in bfloat16. Transformers
    loads all in one dtype, and would write them so.

    Returns:
        names of the tensors that were narrowed and changed.
    """
    sources, narrowed = weight_files(source), list[str]()
    places, widths = tensors_of(sources), _widths(sources)
    for file in weight_files(target):
        wider = [name for name, width in _widths([file]).items() if 0 < width < widths.get(name, 0)]
        if not wider:
            continue
        tensors = _tensors(dict.fromkeys(tensors_of([file]), file))
        wide = _tensors({name: places[name] for name in wider})
        same = {name: one for name, one in wide.items() if torch.equal(one.to(tensors[name].dtype), tensors[name])}
        narrowed += sorted(set(wide) - set(same))
        if same:
            more = sum(one.nbytes - tensors[name].nbytes for name, one in same.items())
            save_file({**tensors, **same}, file, metadata={"format": "pt"})
            _add_to_index(target, {"total_size": more})
    return tuple(narrowed)


def _widths(files: Iterable[Path]) -> dict[str, int]:
    """Bytes per number of the tensors in some files; 0 where they are no floating-point numbers."""
    found: dict[str, int] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found |= {name: _BYTES.get(place.dtype, 0) for name, place in places_in(file).items()}
        else:
            each = _pickled(file).items()
            found |= {name: value.dtype.itemsize if value.is_floating_point() else 0 for name, value in each}
    return found


def _add_to_index(folder: Path, sizes: Mapping[str, int]) -> None:
    """Add to the sizes that the index of a folder's shards tells, if there is one that does."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    metadata = index.get("metadata") or {}
    metadata |= {key: metadata[key] + more for key, more in sizes.items() if key in metadata}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors into a file of their own, as the last of the shards that the index names."""
    old = [path.name for path in weight_files(folder)]
    count = len(old) + 1
    new = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        index: dict[str, Any] = json.loads(index_path.read_text(encoding="utf-8"))
    else:
        names = tensors_of([folder / old[0]])
        total = sum(value.numel() * value.element_size() for value in _tensors(names).values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, old[0])}
    renamed = dict(zip(old, new, strict=False))
    for name in old:
        os.replace(folder / name, folder / renamed[name])
    save_file(tensors, folder / new[-1], metadata={"format": "pt"})
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
    index["weight_map"] |= dict.fromkeys(tensors, new[-1])
    metadata = index.setdefault("metadata", {})
    sizes = {"total_size": sum(value.numel() * value.element_size() for value in tensors.values())}
    sizes["total_parameters"] = sum(value.numel() for value in tensors.values())
    for key, more in sizes.items():
        if key in metadata:
            metadata[key] += more
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def complete_config(source: Path, target: Path, config: Any) -> None:
    """Put back entries that transformers leaves out when it writes a config, unless they have another value now."""
    before = json.loads(source.read_text(encoding="utf-8"))
    after = json.loads(target.read_text(encoding="utf-8"))
    nothing = object()
    lost = {
        key: value
        for key, value in before.items()
        if key not in after and getattr(config, key, nothing) in (nothing, value)
    }
    if lost:
        target.write_text(json.dumps({**after, **lost}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, replaced: Iterable[Path]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Copy the files of a folder and of all folders in it, except weights and files that were replaced.

    Returns:
        the names of the copied ones; those that were left, with the reason.
    """
    done, copied, left = set(replaced), list[str](), dict[str, str]()
    for name, folders, names in os.walk(source):
        here = Path(name)
        for folder in [one for one in folders if one in _OWN_FOLDERS or (here / one).is_symlink()]:
            folders.remove(folder)
            why = "of the tool that fetched the checkpoint" if folder in _OWN_FOLDERS else "a link to another folder"
            left[(here / folder).relative_to(source).as_posix()] = why
        for path in sorted(here / one for one in names):
            relative = path.relative_to(source)
            kinds = {path.suffix.lower(), Path(path.name.removesuffix(".index.json")).suffix.lower()}
            if path in done:
                continue
            if not path.is_file():
                left[relative.as_posix()] = "not a file"
            elif relative.as_posix() == ORDER_FILE:
                left[ORDER_FILE] = "the order of the states from before the cut"
            elif not kinds.isdisjoint(_WEIGHTS):
                left[relative.as_posix()] = "weights from before the cut"
            else:
                (target / relative).parent.mkdir(exist_ok=True, parents=True)
                shutil.copyfile(path, target / relative)
                copied.append(relative.as_posix())
    return tuple(sorted(copied)), left


@contextlib.contextmanager
def new_folder(target: Path) -> Generator[Path]:
    """A folder to write into. It is renamed to ``target``, which may be an empty folder, when it is complete.

    Raises:
        CheckpointError: it cannot be written.
    """
    scratch = target.absolute().with_name(f"{target.absolute().name}.{uuid.uuid4().hex[:8]}.new")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
    except OSError as error:
        raise CheckpointError(
            f"output {target}: cannot be written ({error.strerror or error}); choose another"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def some(names: Iterable[str]) -> str:
    """The first names of many, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


__all__ = [
    "Carried",
    "carry",
    "complete_config",
    "contents",
    "copy_files",
    "new_folder",
    "some",
    "tensors_of",
    "unloaded",
    "weight_files",
]
