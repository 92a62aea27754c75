"""The input that a model expects, and the conversion of arrays to that form.

An array is converted if its meaning is clear: integers of any type become tokens, numbers of any type get the model's
dtype, channels before time are swapped if the number of channels shows it, and ``(batch, length)`` is read as one
channel. Everything else is refused, in one line.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from compressm.errors import ConfigError
from compressm.layers import LanguageModel, SequenceClassifier, SequenceRegressor
from compressm.layers.padding import blank, checked_lengths, within

_ROLES = {
    "x": ("u", "x", "tokens", "input", "inputs", "input_ids", "sequences", "features"),
    "y": ("y", "label", "labels", "target", "targets"),
    "lengths": ("lengths", "length", "seq_lengths", "sequence_lengths"),
    "mask": ("mask", "attention_mask"),
}


@dataclass(frozen=True)
class Expected:
    """The input that a model expects.

    Attributes:
        model: its class's name, for messages.
        kind: ``"numbers"``, ``(batch, length, channels)``; ``"tokens"``, ``(batch, length)``; ``"anything"`` if
            compressm does not know the model, and passes batches on unchanged.
        own: whether it is one of compressm's models, which take ``lengths``.
        argument: the name of its input in ``forward``; empty for the first argument.
        channels: number of channels of its input sequences.
        vocabulary: number of tokens.
        classes: number of a classifier's classes.
        dtype: of its weights.
        device: of its weights.
        keywords: the argument names of its ``forward``; empty if it takes any.
    """

    model: str
    kind: Literal["numbers", "tokens", "anything"] = "anything"
    own: bool = False
    argument: str = ""
    channels: int = 0
    vocabulary: int = 0
    classes: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    keywords: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> Expected:
        """The expectations of a model, which may be wrapped by `torch.compile` or for several processes."""
        inner = _unwrapped(model)
        weights = [p for p in inner.parameters() if p.is_floating_point()]
        common: dict[str, Any] = {"model": type(inner).__name__}
        if weights:
            common |= {"dtype": weights[0].dtype, "device": weights[0].device}
        if isinstance(inner, SequenceRegressor) and type(inner).forward is SequenceRegressor.forward:
            common |= {"own": True, "argument": "u"}
            if inner.vocabulary is None:
                return cls(kind="numbers", channels=inner.d_input, **common)
            return cls(kind="tokens", vocabulary=inner.vocabulary, **common)
        if isinstance(inner, SequenceClassifier) and type(inner).forward is SequenceClassifier.forward:
            common |= {"own": True, "argument": "u", "classes": inner.n_classes}
            if inner.vocabulary is None:
                return cls(kind="numbers", channels=inner.d_input, **common)
            return cls(kind="tokens", vocabulary=inner.vocabulary, **common)
        if isinstance(inner, LanguageModel) and type(inner).forward is LanguageModel.forward:
            return cls(kind="tokens", own=True, argument="tokens", vocabulary=inner.vocabulary, **common)
        common["keywords"] = _keywords(inner)
        embedding = _embedding(inner)
        if embedding is not None:
            return cls(kind="tokens", argument="input_ids", vocabulary=embedding.num_embeddings, **common)
        return cls(**common)

    @property
    def form(self) -> str:
        """The expected form in words, for messages."""
        if self.kind == "numbers":
            return f"{self.model} takes numbers of shape (batch, length, {self.channels})"
        if self.kind == "tokens":
            return f"{self.model} takes tokens of shape (batch, length), whole numbers from 0 to {self.vocabulary - 1}"
        return f"{self.model} takes batches of shape (batch, length, ...)"


def prepared(expected: Expected, x: Any, where: str, lengths: Tensor | None = None) -> Tensor:
    """A model's input, in the form that it expects.

    Args:
        expected: the model's expectations.
        x: tensor or array.
        where: its name in messages.
        lengths: lengths of the sequences. Values beyond them are not checked, and become zero.

    Raises:
        ConfigError: it cannot be brought into that form.
    """
    tensor = numeric(expected, x, where)
    if 0 in tensor.shape or tensor.ndim == 0:
        raise ConfigError(
            f"{where} is empty, of shape {tuple(tensor.shape)}: {expected.form}; pass at least one sequence"
        )
    shaper = {"numbers": _numbers, "tokens": _tokens, "anything": _anything}[expected.kind]
    tensor = shaper(expected, tensor, where)
    if lengths is not None:
        tensor = blank(tensor, within(_checked(lengths, tensor, where), tensor.shape[1]))
    if expected.kind == "tokens":
        _check_range(expected, tensor, where)
        return tensor.long().to(expected.device)
    return _finite(tensor.to(expected.dtype) if expected.kind == "numbers" else tensor, where).to(expected.device)


def role_of(name: str) -> str | None:
    """The role of an array of this name: ``x``, ``y``, ``lengths`` or ``mask``; None if the name is not known."""
    return next((role for role, known in _ROLES.items() if name.lower() in known), None)


def by_role(batch: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Named arrays by their role: ``x``, ``y``, ``lengths``, ``mask``.

    Raises:
        ConfigError: a name that is not known, or two for one role.
    """
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in batch.items():
        role = role_of(str(key))
        if role is None:
            raise ConfigError(f"{where} has {key!r}: name the inputs x, labels y, lengths of padded sequences lengths")
        if role in found:
            raise ConfigError(f"{where} has both {names[role]!r} and {key!r}: leave one of them out")
        found[role], names[role] = value, str(key)
    return found


def lengths_of(found: Mapping[str, Any], where: str) -> Tensor | None:
    """The sequences' lengths from named arrays, given as lengths or as a mask; None if there are none."""
    if "lengths" in found and "mask" in found:
        raise ConfigError(f"{where} has lengths and a mask: leave one of them out")
    if "mask" in found:
        return ends_of(_counts(found["mask"], f"the mask in {where}"), where)
    if found.get("lengths") is None:
        return None
    lengths = _counts(found["lengths"], f"the lengths in {where}")
    counts = lengths.dtype != torch.bool and not lengths.is_complex()
    return lengths.long() if counts and bool((lengths == lengths.long()).all()) else lengths


def ends_of(mask: Tensor, where: str) -> Tensor:
    """The lengths of sequences from a mask, 1 for tokens and 0 for padding, shape ``(batch, length)``.

    Raises:
        ConfigError: not such a mask, or one with padding elsewhere than at the end.
    """
    on = mask != 0
    if mask.ndim != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        raise ConfigError(f"{where}: the mask must hold 1 (counts) and 0 (padding), shape (batch, length)")
    if bool((on[:, 1:] & ~on[:, :-1]).any()):
        raise ConfigError(f"{where}: the mask has padding before the end of a sequence: pad sequences at their end")
    return on.sum(1)


def _counts(value: Any, where: str) -> Tensor:
    """A tensor from a list, an array or a tensor of numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of unequal length
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"{where} are {described(value)}: pass numbers")
    return _from_numpy(array, where)


def is_array(value: Any) -> bool:
    """Whether it is a tensor or a NumPy array."""
    return isinstance(value, Tensor | np.ndarray)


def described(value: Any) -> str:
    """A description of a value, for messages."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, str | bytes | Path):
        return f"the {type(value).__name__} {value!r:.60}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _embedding(model: nn.Module) -> nn.Embedding | None:
    """The token embedding of a Hugging Face model; None for other models."""
    try:
        found = cast("Any", model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def _keywords(model: nn.Module) -> frozenset[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL)


def _checked(lengths: Tensor, x: Tensor, where: str) -> Tensor:
    try:
        return checked_lengths(lengths.cpu(), *x.shape[:2]).to(x.device)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def numeric(expected: Expected, x: Any, where: str) -> Tensor:
    """A tensor of numbers from a tensor or array. For unknown models, arrays of floats get the model's dtype.

    Raises:
        ConfigError: the values are not numbers.
    """
    if isinstance(x, Tensor):
        if x.is_complex() or x.is_nested or x.is_sparse:
            raise ConfigError(f"{where} is {described(x) if x.is_complex() else 'nested or sparse'}: {expected.form}")
        if x.is_meta:
            raise ConfigError(f"{where} is on the meta device and has no values: {expected.form}")
        return x.detach()
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
        raise ConfigError(f"{where} is {described(x)}: {expected.form}; pass numbers")
    tensor = _from_numpy(x, where)
    foreign = expected.kind == "anything" and tensor.is_floating_point()
    return tensor.to(expected.dtype) if foreign else tensor


def _from_numpy(x: np.ndarray[Any, Any], where: str) -> Tensor:
    """A new tensor from an array of numbers of any byte order; unsigned numbers become signed ones."""
    if x.dtype.kind == "u" and x.dtype.itemsize > 1:
        if int(x.max(initial=0)) > np.iinfo(np.int64).max:
            raise ConfigError(f"{where} holds {x.max()}: pass numbers below 2^63")
        x = x.astype(np.int64)
    native = x.dtype.newbyteorder("=") if x.dtype.itemsize <= 8 else np.dtype(np.float64)
    return torch.from_numpy(np.array(x, native, order="C"))


def _refuse_shape(expected: Expected, x: Tensor, where: str, remedy: str) -> NoReturn:
    raise ConfigError(f"{where} has shape {tuple(x.shape)}: {expected.form}; {remedy}")


def _numbers(expected: Expected, x: Tensor, where: str) -> Tensor:
    channels = expected.channels
    if x.ndim == 2 and channels == 1 and x.shape[1] > 1:
        return x[..., None]
    if x.ndim == 2 and x.shape[1] == channels:
        _refuse_shape(expected, x, where, "for one sequence alone pass x[None], for a data set a DataLoader of it")
    if x.ndim != 3:
        remedy = "pass list(x), if its first axis counts batches" if x.ndim == 4 else "add the axes that are missing"
        _refuse_shape(expected, x, where, remedy)
    if x.shape[2] == channels:
        return x
    if x.shape[1] == channels:  # channels before time
        return x.mT.contiguous()
    _refuse_shape(expected, x, where, f"neither axis after the first has {channels} channels")


def _tokens(expected: Expected, x: Tensor, where: str) -> Tensor:
    if x.ndim == 3 and 1 in x.shape[1:]:
        x = x.squeeze(2) if x.shape[2] == 1 else x.squeeze(1)
    if x.ndim == 1:
        _refuse_shape(expected, x, where, "for one sequence alone pass x[None], for a data set a DataLoader of it")
    if x.ndim != 2:
        _refuse_shape(expected, x, where, "pass list(x), if its first axis counts batches")
    return x


def _anything(expected: Expected, x: Tensor, where: str) -> Tensor:
    if x.ndim < 2:
        _refuse_shape(expected, x, where, "for one sequence alone pass x[None], for a data set a DataLoader of it")
    return x


def _check_range(expected: Expected, x: Tensor, where: str) -> None:
    if x.is_floating_point():
        odd = x[~(x.isfinite() & (x == x.round()))]
        if odd.numel():
            raise ConfigError(f"{where} holds {float(odd[0]):g}: {expected.form}; pass the tokens themselves")
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= expected.vocabulary:
        raise ConfigError(
            f"{where} holds tokens from {low} to {high}: {expected.form}; use the vocabulary that the model was "
            "trained with"
        )


def _finite(x: Tensor, where: str) -> Tensor:
    if x.is_floating_point() and not bool((finite := x.isfinite()).all()):
        place = (~finite).nonzero()[0].tolist()
        raise ConfigError(
            f"{where} holds {float(x[tuple(place)]):g} at {place}: data must be finite in {str(x.dtype)[6:]}; mend or "
            "leave out that sequence"
        )
    return x


def one_hot_rows(values: Any) -> bool:
    """Whether every row of an array or tensor of numbers, shape ``(N, classes)``, has one 1, and 0 elsewhere."""
    return bool(((values == 0) | (values == 1)).all()) and bool((values.sum(1) == 1).all())


__all__ = [
    "Expected",
    "by_role",
    "described",
    "ends_of",
    "is_array",
    "lengths_of",
    "numeric",
    "one_hot_rows",
    "prepared",
    "role_of",
]
