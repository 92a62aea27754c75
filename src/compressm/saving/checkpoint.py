"""Saving models and training states as safetensors and JSON. Nothing is pickled, and nothing is ever half written."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from compressm.cutting import resize_states, state_dims
from compressm.errors import CheckpointError, ConfigError
from compressm.layers import LanguageModel, SequenceClassifier, SequenceRegressor
from compressm.runtime.files import FORMAT, finite, read_pair, write_pair, write_text
from compressm.runtime.warned import warn
from compressm.saving.arguments import arguments_of, remember_arguments
from compressm.saving.card import loading, model_card
from compressm.saving.structure import Structure, check_fit, describe, difference, put_left_out, take_over
from compressm.training.compressor import Compressor

# The dtypes that safetensors can hold, without complex numbers, which its older versions cannot hold.
_STORED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
}

# The classes that `load` can build by itself. No other class is imported or called because a checkpoint names it.
_OWN_CLASSES: dict[str, type[nn.Module]] = {
    "SequenceClassifier": SequenceClassifier,
    "LanguageModel": LanguageModel,
    "SequenceRegressor": SequenceRegressor,
}


def save(
    model: nn.Module, folder: str | os.PathLike[str], compressor: Compressor | None = None, card: bool = False
) -> None:
    """Save a model, compressed or not, as ``model.safetensors`` and ``compressm.json`` in a folder.

    The folder is created if needed. A model that is already there is replaced; other files are left alone. If this
    process is killed, the folder holds the old model or the new one. Another process that loads meanwhile gets one of
    the two.

    All parameters and buffers are saved with their dtypes, and with the record of which are one tensor and which need
    no gradient. A model of one of compressm's classes that was changed after it was built (a layer replaced, a weight
    parametrised) is saved with a warning: it can only be loaded into a model that was changed in the same way.

    Args:
        model: any model with a layer that compressm knows.
        folder: where to.
        compressor: what compressed it; its history is saved too, under ``history`` in ``compressm.json``.
        card: write a model card, ``README.md``, as well: sizes, history, how to load it.

    Raises:
        CheckpointError: the folder cannot be written, or a tensor cannot be stored: it is named.
        UnsupportedModelError: the model has no state space layer that compressm knows.
    """
    events = [] if compressor is None else [event.to_dict() for event in compressor.history]
    own = save_with_history(model, folder, events)
    if card:
        expression = loading(model, Path(folder).name, own)
        history, saved = ([], None) if compressor is None else (compressor.history, compressor.savings())
        try:
            write_text(Path(folder) / "README.md", model_card(model, history, saved, expression))
        except ConfigError as error:
            raise CheckpointError(str(error)) from error


def save_with_history(model: nn.Module, folder: str | os.PathLike[str], history: Sequence[Mapping[str, Any]]) -> bool:
    """As `save`, with the events of a history as plain values; returns whether `load` can build the model by itself."""
    from compressm import __version__  # not at the top: the package imports this module

    tensors = _model_tensors(model)
    own = _OWN_CLASSES.get(type(model).__name__) is type(model)
    if changed := _changed(model) if own else None:
        own = False
        warn(
            f"this {type(model).__name__} was changed after it was built ({changed}), so that compressm.load cannot "
            "build it by itself: load it with load(folder, model=...), a model changed in the same way",
        )
    description = {
        "format": FORMAT,
        "compressm": __version__,
        "class": type(model).__name__,
        "config": model.config if own else None,
        "changed": changed,
        "arguments": arguments_of(model),
        "structure": describe(model).to_dict(),
        "state_dims": state_dims(model),
        "history": finite(list(history)),
    }
    write_pair(Path(folder), "model.safetensors", "compressm.json", tensors, description)
    return own


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, also of those buffers that a state dict leaves out."""
    tensors: dict[str, Tensor] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in {**buffers, **model.state_dict(keep_vars=True)}.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} in the model's state dict is a {type(value).__name__}; only tensors can be saved: keep it out "
                "of the state dict, and set it again after load"
            )
        tensors[name] = _storable(value, name)
    return tensors


def _changed(model: nn.Module) -> str | None:
    """How a model of one of our classes differs from what its configuration builds, None if it does not."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return difference(model, type(model)(**cast("Any", model).config))


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load what `save` wrote.

    Args:
        folder: where it was saved.
        model: for a model of a class of your own, a fresh one built as the saved one was before compression; its layers
            are given the saved state dimensions, in place. Its dtypes, devices, training modes and ``requires_grad``
            stay as you made them; dtypes that cannot hold the saved values are refused. Not needed for compressm's own
            classes.

    Returns:
        ``model``, or a new one on the CPU in evaluation mode, with the saved model's dtypes, shared tensors and
        ``requires_grad``.

    Raises:
        CheckpointError: nothing there, damaged, of another format, or of a model that does not fit.
    """
    folder = Path(folder)
    description, tensors = read_pair(folder, "model.safetensors", "compressm.json")
    name, dims = str(description.get("class")), description.get("state_dims")
    if not isinstance(dims, dict) or not all(isinstance(states, int) for states in dims.values()):
        raise CheckpointError(
            f"{folder / 'compressm.json'}: state_dims must map layer names to numbers; save the model again"
        )
    try:
        structure = Structure.read(description.get("structure"))
        left_out = {key: tensors.pop(key) for key in (structure.left_out if structure else ())}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'compressm.json'}: {error}; save the model again") from error
    if model is None:
        if description.get("changed") is not None:
            raise CheckpointError(
                f"{folder} holds a {name} that was changed after it was built ({description['changed']!s:.200}): pass "
                "one that was changed in the same way, load(folder, model=...)"
            )
        model = _build(folder, name, description.get("config"), structure, tensors)
    names = set(model.state_dict())
    if names != set(tensors):
        odd = sorted(names.symmetric_difference(tensors))
        raise CheckpointError(
            f"{folder} holds a {name} whose tensors are not those of this {type(model).__name__}: {', '.join(odd[:3])}"
            f"{' and more' if len(odd) > 3 else ''} on one side only; build the model as it was built when saved"
        )
    if isinstance(arguments := description.get("arguments"), dict):
        remember_arguments(model, cast("dict[str, Any]", arguments))
    check_fit(model, structure, tensors)
    resize_states(model, dims)
    try:
        model.load_state_dict(tensors)
        put_left_out(model, left_out)
    except (AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: {reason}; build the model as it was built when saved") from error
    return model


def _build(
    folder: Path, name: str, config: object, structure: Structure | None, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A model of one of our own classes, no larger than the tensors that are to be loaded into it.

    The sizes that a file claims are first tried on the meta device, which allocates no memory.
    """
    own = _OWN_CLASSES.get(name)
    if own is None:
        raise CheckpointError(
            f"{folder} holds a {name}, which compressm cannot build by itself: pass a fresh one, "
            f"load(folder, model={name}(...)), or to a command --model package.module:function"
        )
    bad = f"{folder / 'compressm.json'}: {name} cannot be built from this config"
    if not isinstance(config, dict):
        raise CheckpointError(f"{bad} (an object was expected, not {config!r:.40}); save the model again")
    config = cast("dict[str, Any]", config)
    layers = config.get("n_layers", 1)
    if not isinstance(layers, int) or layers > len(tensors):
        raise CheckpointError(f"{bad} (n_layers={layers!r:.40} with {len(tensors)} tensors); save the model again")
    try:
        with torch.random.fork_rng(devices=[]):  # loading a model leaves the random state alone
            with torch.device("meta"):
                claimed = {key: tuple(value.shape) for key, value in own(**config).state_dict().items()}
            stored = {key: tuple(value.shape) for key, value in tensors.items()}
            if claimed != stored:
                odd = sorted(key for key in {*claimed, *stored} if claimed.get(key) != stored.get(key))[0]
                raise ValueError(f"{odd} would be {claimed.get(odd)}, and is {stored.get(odd)}")
            model = own(**config).eval()
            take_over(model, structure, tensors)
            return model
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{bad} ({reason}); save the model again") from error


def save_tree(folder: str | os.PathLike[str], tree: Any, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Save nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans and None.

    Written are ``state.safetensors`` and ``state.json`` in the folder, which is created if needed. What was saved there
    before is replaced. If this process is killed, the folder holds the old state or the new one.

    Args:
        folder: where to.
        tree: what to save. Dict keys may be strings, numbers, booleans or None.
        metadata: plain values for readers of the JSON file.

    Raises:
        CheckpointError: something of another type in the tree, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, "", tensors)
    description = {"format": FORMAT, "metadata": dict(metadata or {}), "structure": structure}
    write_pair(Path(folder), "state.safetensors", "state.json", tensors, description)


def load_tree(folder: str | os.PathLike[str]) -> Any:
    """Load what `save_tree` wrote; tensors are on the CPU.

    Raises:
        CheckpointError: nothing there, damaged, or of another format.
    """
    folder = Path(folder)
    description, tensors = read_pair(folder, "state.safetensors", "state.json")
    try:
        return _decode(description["structure"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'}: damaged structure ({error!r}); use an older checkpoint"
        ) from error


# A value that JSON cannot express becomes an object with one key, which starts with "$".

# What `numpy.dtype.str` says of a plain type, such as "<f8" or "<M8[ns]".
_ARRAY_TYPE = re.compile(r"[<>|=]?[A-Za-z?]\d*(\[\d*[A-Za-z]+\])?")


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, complex):
        return {"$complex": [_encode(value.real, path, tensors), _encode(value.imag, path, tensors)]}
    if isinstance(value, Tensor):
        kind = "$complex_tensor" if value.is_complex() else "$tensor"
        tensors[key := str(len(tensors))] = _storable(
            torch.view_as_real(value.resolve_conj()) if value.is_complex() else value, path
        )
        return {kind: key}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        raw = np.frombuffer(value.tobytes(), np.uint8).copy()
        tensors[key := str(len(tensors))] = torch.from_numpy(raw)
        return {"$array": [key, value.dtype.str, list(value.shape)]}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}[{index}]", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        items = [(k, _encode(v, f"{path}.{k}".lstrip("."), tensors)) for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith("$") for k, _ in items):
            return dict(items)
        if all(k is None or isinstance(k, bool | int | float | str) for k, _ in items):
            return {"$dict": [[_encode(k, path, tensors), v] for k, v in items]}
        value = next(k for k in value if not (k is None or isinstance(k, bool | int | float | str)))
        path = f"a key of {path or 'the tree'}"
    raise CheckpointError(
        f"{path or 'the tree'} is a {type(value).__module__}.{type(value).__qualname__}, and a checkpoint holds only "
        "dicts, lists, tuples, tensors, numeric arrays, numbers, strings, booleans and None"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: _decode(item, tensors) for key, item in value.items()}
    ((tag, content),) = cast("dict[str, Any]", value).items()
    if tag == "$float":
        return float(content)
    if tag == "$complex":
        return complex(*_decode(content, tensors))
    if tag == "$tensor":
        return tensors[content]
    if tag == "$complex_tensor":
        return torch.view_as_complex(tensors[content])
    if tag == "$array":
        key, dtype, shape = content
        if any(size < 0 for size in shape):
            raise ValueError(f"array of shape {shape}")
        if not (isinstance(dtype, str) and _ARRAY_TYPE.fullmatch(dtype)):  # NumPy evaluates the text of other types
            raise ValueError(f"array of type {dtype!r}")
        return np.frombuffer(tensors[key].numpy().tobytes(), dtype).reshape(shape).copy()
    if tag == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "$dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown tag {tag}")


def _storable(value: Tensor, path: str) -> Tensor:
    """A contiguous copy on the CPU, since safetensors refuses tensors that share memory."""
    path = path or "the tree"
    if nn.parameter.is_lazy(value):
        raise CheckpointError(f"{path} has no shape yet: run the model on one batch before it is saved")
    value = value.detach()
    if value.is_meta:
        raise CheckpointError(
            f"{path} is on the meta device and has no values: initialise it or load its weights before it is saved"
        )
    if type(value) is not Tensor:
        raise CheckpointError(
            f"{path} is a {type(value).__name__}, and only plain tensors can be stored: gather it if it is sharded "
            "(full_tensor()), dequantise it if it is quantised"
        )
    if value.layout != torch.strided or value.dtype not in _STORED:
        raise CheckpointError(
            f"{path} is a tensor of layout {value.layout} and dtype {value.dtype}, which cannot be stored; convert it "
            "to a dense one of real numbers (to_dense(), view_as_real())"
        )
    return value.to("cpu").clone(memory_format=torch.contiguous_format)


__all__ = ["load", "load_tree", "save", "save_tree"]
