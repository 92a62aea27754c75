"""What a state dict does not say about a model: names that share a tensor, frozen parameters, buffers that it omits.

`describe` turns these into plain values, which a checkpoint holds beside the tensors. The other functions compare a
model with them, or change the model to match them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressm.errors import CheckpointError

Groups = list[list[str]]


@dataclass(frozen=True)
class Structure:
    """What a checkpoint says about a model beside its state dict.

    Attributes:
        shared: groups of names that are one parameter or one buffer.
        shared_modules: groups of names that are one module with tensors; modules inside of them are not named.
        frozen: parameters that need no gradient.
        left_out: buffers that are not in the state dict (``persistent=False``).
    """

    shared: Groups
    shared_modules: Groups
    frozen: list[str]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, values: object) -> Structure | None:
        """From `to_dict`; None where a checkpoint of an earlier version has none.

        Raises:
            ValueError: something else.
        """
        if values is None:
            return None
        fields = cast("dict[str, Any]", values) if isinstance(values, dict) else {}
        if set(fields) != set(cls.__dataclass_fields__):
            raise ValueError(f"structure must have {', '.join(cls.__dataclass_fields__)}")
        groups = [*fields["shared"], *fields["shared_modules"], fields["frozen"], fields["left_out"]]
        if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups):
            raise ValueError("structure must hold lists of names")
        return cls(**fields)


def describe(model: nn.Module) -> Structure:
    """The structure of a model."""
    tensors = named_tensors(model)
    kept = set(model.state_dict(keep_vars=True))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return Structure(
        shared=_alike((name, id(tensor)) for name, tensor in tensors.items()),
        shared_modules=_shared_modules(model),
        frozen=sorted(
            name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad
        ),
        left_out=sorted(name for name in buffers if name not in kept),
    )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def _alike(pairs: Iterable[tuple[str, Any]]) -> Groups:
    groups: dict[Any, list[str]] = {}
    for name, value in pairs:
        groups.setdefault(value, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _shared_modules(model: nn.Module) -> Groups:
    modules = dict(model.named_modules(remove_duplicate=False))
    with_tensors = {name: module for name, module in modules.items() if any(True for _ in module.state_dict())}
    groups = _alike((name, id(module)) for name, module in with_tensors.items())

    def place(name: str) -> tuple[int, str]:
        parent, _, leaf = name.rpartition(".")
        return id(modules[parent]), leaf

    return [names for names in groups if len({place(name) for name in names}) > 1]


def difference(model: nn.Module, twin: nn.Module) -> str | None:
    """The first difference between a model and a twin, built from the model's configuration; None if there is none.

    Compared are the classes of all modules, and names and shapes of all tensors. Different tensors that share memory
    count as a difference too.
    """
    ours, theirs = (
        {name: type(part) for name, part in one.named_modules(remove_duplicate=False)} for one in (model, twin)
    )
    for name in sorted({*ours, *theirs}):
        if ours.get(name) is not theirs.get(name):
            kinds = (getattr(one.get(name), "__name__", "nothing") for one in (ours, theirs))
            return "{} is {}, where its configuration builds {}".format(name or "the model", *kinds)
    shapes, built = ({k: tuple(v.shape) for k, v in named_tensors(one).items()} for one in (model, twin))
    for name in sorted({*shapes, *built}):
        if shapes.get(name) != built.get(name):
            return f"{name} has shape {shapes.get(name)}, where its configuration builds {built.get(name)}"
    if pair := _overlap(named_tensors(model)):
        return f"{pair[0]} and {pair[1]} are different tensors that share memory"
    return None


def _overlap(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two names of different tensors with memory in common."""
    spans: list[tuple[Any, int, int, str]] = []
    for name, value in {id(value): (name, value) for name, value in tensors.items()}.values():
        if value.layout != torch.strided or value.numel() == 0 or value.is_meta:
            continue
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        begin = value.data_ptr()
        spans.append((str(value.device), begin, begin + (last + 1) * value.element_size(), name))
    spans.sort()
    for (device, _, end, name), (other, begin, _, after) in itertools.pairwise(spans):
        if device == other and begin < end:
            return name, after
    return None


def take_over(model: nn.Module, structure: Structure | None, tensors: Mapping[str, Tensor]) -> None:
    """Give a freshly built model the ties, dtypes and frozen parameters that its configuration does not record.

    Raises:
        ValueError: names that the model does not have.
    """
    if structure is not None:
        modules = dict(model.named_modules(remove_duplicate=False))
        _all_known([name for group in structure.shared_modules for name in group], modules)
        for first, *others in structure.shared_modules:
            for name in others:
                if type(modules[name]) is not type(modules[first]) or not name:
                    raise ValueError(f"structure says that {first:.40} and {name:.40} are one module")
                parent, _, leaf = name.rpartition(".")
                modules[parent].add_module(leaf, modules[first])
        named = named_tensors(model)
        _all_known([*(name for group in structure.shared for name in group), *structure.frozen], named)
        for first, *others in structure.shared:
            for name in others:
                _put(model, name, named[first])
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in structure.frozen)
    for name, value in named_tensors(model).items():
        if name in tensors and value.dtype != tensors[name].dtype:
            value.data = value.data.to(tensors[name].dtype)


def _all_known(names: Iterable[str], known: Mapping[str, object]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"structure names {unknown[0]:.40}, which the model does not have")


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, leaf, tensor)


def put_left_out(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's values into buffers that are in no state dict. Dtype and device stay those of the model."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in tensors.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        present = buffers.get(name)
        owner.register_buffer(
            leaf, value if present is None else value.to(present.device, present.dtype), persistent=False
        )


def check_fit(model: nn.Module, structure: Structure | None, tensors: Mapping[str, Tensor]) -> None:
    """Check that a caller's own model can hold a checkpoint's values unchanged.

    Raises:
        CheckpointError: it ties other tensors, has no memory for values, or its dtypes would change them.
    """
    named = named_tensors(model)
    if meta := [name for name, value in named.items() if value.is_meta and name in tensors]:
        raise CheckpointError(
            f"{meta[0]} of this {type(model).__name__} is on the meta device, where no value can be loaded: build the "
            'model on a real device, or call model.to_empty(device="cpu") before load'
        )
    for name, value in named.items():
        if name in tensors and not _holds(value.dtype, tensors[name].dtype):
            raise CheckpointError(
                f"{name} is {tensors[name].dtype} in the checkpoint and {value.dtype} in this {type(model).__name__}, "
                f"which would change its values: load into model.to({tensors[name].dtype}), and convert afterwards"
            )
    if structure is None:
        return
    saved, here = _pairs(structure.shared), _pairs(describe(model).shared)
    if lacking := sorted(saved - here):
        raise CheckpointError(
            f"{' and '.join(lacking[0])} are one tensor in the checkpoint and two in this {type(model).__name__}: tie "
            "them before load, as in the model that was saved"
        )
    if more := sorted(here - saved):
        raise CheckpointError(
            f"{' and '.join(more[0])} are two tensors in the checkpoint and one in this {type(model).__name__}: build "
            "the model without that tie, as the one that was saved"
        )


def _pairs(groups: Groups) -> set[tuple[str, str]]:
    return {(min(group[0], name), max(group[0], name)) for group in map(sorted, groups) for name in group[1:]}


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a dtype holds every value of another one of its kind."""
    if wide == narrow or not (wide.is_floating_point and narrow.is_floating_point):
        return wide == narrow
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny


__all__ = ["Structure", "check_fit", "describe", "difference", "named_tensors", "put_left_out", "take_over"]
