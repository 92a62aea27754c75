"""Saving models and training states as safetensors and JSON. Nothing is pickled, and nothing is ever half written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from compressm.card import model_card
from compressm.compressor import Compressor
from compressm.errors import CheckpointError
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.reduce import resize_states, state_dims
from compressm.storage import FORMAT, finite, read_pair, write_pair

# The classes that `load` can build by itself. Nothing else is ever imported or called on a checkpoint's word.
_OWN_CLASSES: dict[str, type[nn.Module]] = {
    "SequenceClassifier": SequenceClassifier,
    "LanguageModel": LanguageModel,
}


def save(
    model: nn.Module, folder: str | os.PathLike[str], compressor: Compressor | None = None, card: bool = False
) -> None:
    """Save a model, compressed or not, as ``model.safetensors`` and ``compressm.json`` in a folder.

    The folder is created if needed; a model that is already there is replaced, other files are left alone. A kill at
    any instant leaves the old model or the new one.

    Args:
        model: any model with a layer that compressm knows.
        folder: where to.
        compressor: what compressed it; its history is saved too, under ``history`` in ``compressm.json``.
        card: write a model card, ``README.md``, as well: sizes, history, how to load it.

    Raises:
        CheckpointError: the folder cannot be written.
        UnsupportedModelError: the model has no state space layer that compressm knows.
    """
    from compressm import __version__  # not at the top: the package imports this module

    own = _OWN_CLASSES.get(type(model).__name__) is type(model)
    description = {
        "format": FORMAT,
        "compressm": __version__,
        "class": type(model).__name__,
        "config": model.config if own else None,
        "state_dims": state_dims(model),
        "history": [] if compressor is None else finite([event.to_dict() for event in compressor.history]),
    }
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} in the model's state dict is a {type(value).__name__}; only tensors can be saved"
            )
        tensors[name] = _storable(value, name)
    write_pair(Path(folder), "model.safetensors", "compressm.json", tensors, description)
    if card:
        name = Path(folder).name
        expression = (
            f'compressm.load("{name}")' if own else f'compressm.load("{name}", model={type(model).__name__}(...))'
        )
        history, saved = ([], None) if compressor is None else (compressor.history, compressor.savings())
        (Path(folder) / "README.md").write_text(model_card(model, history, saved, expression), encoding="utf-8")


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load what `save` wrote.

    Args:
        folder: where it was saved.
        model: for a model of a class of your own, a fresh one built as the saved one was before compression; its layers
            are given the saved state dimensions, in place. Not needed for compressm's own classes.

    Returns:
        ``model``, or a new one on the CPU in evaluation mode.

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
    if model is None:
        model = _build(folder, name, description.get("config"), tensors)
    names = set(model.state_dict())
    if names != set(tensors):
        odd = sorted(names.symmetric_difference(tensors))
        raise CheckpointError(
            f"{folder} holds a {name} whose tensors are not those of this {type(model).__name__}: {', '.join(odd[:3])}"
            f"{' and more' if len(odd) > 3 else ''} on one side only; build the model as it was built when saved"
        )
    resize_states(model, dims)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: {reason}; build the model as it was built when saved") from error
    return model


def _build(folder: Path, name: str, config: object, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of one of our own classes, no larger than the tensors that are to be loaded into it.

    What a file claims about sizes is tried on the meta device first, which allocates nothing.
    """
    own = _OWN_CLASSES.get(name)
    if own is None:
        raise CheckpointError(
            f"{folder} holds a {name}, which compressm cannot build by itself: pass a fresh one, "
            f"load(folder, model={name}(...))"
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
            return own(**config).eval()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{bad} ({reason}); save the model again") from error


def save_tree(folder: str | os.PathLike[str], tree: Any, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Save nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans and None.

    Written are ``state.safetensors`` and ``state.json`` in the folder, which is created if needed. What was saved there
    before is replaced; a kill at any instant leaves the old state or the new one.

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


# What JSON has no word for is an object with one key that starts with "$".


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
        return np.frombuffer(tensors[key].numpy().tobytes(), dtype).reshape(shape).copy()
    if tag == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "$dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown tag {tag}")


def _storable(value: Tensor, path: str) -> Tensor:
    """An own, contiguous copy on the CPU: safetensors refuses tensors that share memory."""
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise CheckpointError(
            f"{path or 'the tree'} is a tensor of layout {value.layout} and dtype {value.dtype}, which cannot be stored"
        )
    return value.detach().to("cpu").clone(memory_format=torch.contiguous_format)


__all__ = ["load", "load_tree", "save", "save_tree"]
