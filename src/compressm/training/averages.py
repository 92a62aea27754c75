"""Averaged copies of a model that were not passed as followers.

After a cut such a copy has other shapes than the model. Averaging then fails, or broadcasts: a model cut to one state
is averaged into every state of the copy. Nothing in the copy says of which model it is, so copies are found among all
objects: at construction by their values, and after a cut by their layers. Layers that are left out of the cuts count
too, since the copy has them. A copy may also be one of a part of the model.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compressm.adapters import find_layers
from compressm.adapters.left_out import none_left_out
from compressm.adapters.registry import cut_parameters
from compressm.cutting.carry import paired_layers
from compressm.cutting.sizes import state_dims
from compressm.errors import UnsupportedModelError

_NAME = re.compile(r"Averag|SWA|EMA|Ema(?![a-z])")  # AveragedModel of torch, ModelEmaV3 of timm, EMA of ema_pytorch
_UPDATES = ("update_parameters", "update")


def check_averages(model: nn.Module, followers: Sequence[nn.Module]) -> None:
    """Refuse, before training, an averaged copy of the model that is not among its followers.

    Raises:
        UnsupportedModelError: there is one, of the same weights.
    """
    # Only these are asked for their parameters: a layer may have been left out because no cut could be read or written.
    ours = {name: cut_parameters(layer, adapter) for name, (layer, adapter) in find_layers(model).items()}
    with none_left_out():
        copies = _equal_copies(model, followers, ours)
        if copies:
            del copies  # those of an earlier training may be garbage, which must not be kept by this list
            gc.collect()
            copies = _equal_copies(model, followers, ours)
    for average, part in copies.items():
        name = next(name for name, one in model.named_modules() if one is part)
        what = f"the part {name!r} of this model" if name else "this model"
        remedy = "average the whole model, and pass that as followers=[...]" if name else "pass it as followers=[...]"
        raise UnsupportedModelError(
            f"{type(average).__name__} averages {what}, and cuts would not reach it: {remedy}; "
            "if it averages another model of the same weights, create it after the Compressor"
        )


def _equal_copies(
    model: nn.Module, followers: Sequence[nn.Module], ours: Mapping[str, Mapping[str, nn.Parameter]]
) -> dict[nn.Module, nn.Module]:
    """Copies whose layers have the values of the model's, which are given by the layers' names; and of what part of the
    model each is one."""
    values = {id(model.get_submodule(name)): held for name, held in ours.items()}

    def equal(average: nn.Module, part: nn.Module) -> bool:
        theirs = paired_layers(average, part)
        pairs = [
            (a, dict(theirs[name].named_parameters()).get(key))
            for name, (layer, _) in find_layers(part).items()
            for key, a in values.get(id(layer), {}).items()
        ]
        same = all(b is not None and a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in pairs)
        return bool(pairs) and same

    found: dict[nn.Module, nn.Module] = {}
    for average in _strangers(model, followers):
        part = next((one for one in _parts_like(average, model) if equal(average, one)), None)
        if part is not None:
            found[average] = part
    return found


@none_left_out()
def guard_averages(model: nn.Module, followers: Sequence[nn.Module]) -> None:
    """Let averaged copies of other sizes than the model refuse to average it, instead of broadcasting.

    Args:
        model: has just been resized.
        followers: the copies that a cut has reached.
    """
    for average in _strangers(model, followers):
        sizes = [list(state_dims(part).values()) for part in _parts_like(average, model)]
        if list(state_dims(average).values()) not in sizes:
            for name in _UPDATES:
                update = getattr(average, name, None)
                if callable(update) and not isinstance(update, functools.partial):
                    setattr(average, name, functools.partial(_update, average, update))


def _update(average: nn.Module, update: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    model = next((value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)), None)
    if model is not None:
        theirs, ours = state_dims(average), state_dims(model)
        if list(theirs.values()) != list(ours.values()):
            raise UnsupportedModelError(
                f"{type(average).__name__} has {list(theirs.values())} states and the model that it averages "
                f"{list(ours.values())}, since a cut: pass it to Compressor(followers=[...]) before training"
            )
    return update(*args, **kwargs)


def _strangers(model: nn.Module, followers: Sequence[nn.Module]) -> list[nn.Module]:
    """The averaged copies of such a model, or of a part of it, among all objects, that are neither its followers nor
    parts of it."""
    known = {id(part) for one in (model, *followers) for part in one.modules()}
    kinds: dict[type, bool] = {}
    found: list[nn.Module] = []
    for one in gc.get_objects():
        kind = type(one)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, nn.Module) and _NAME.search(kind.__name__) is not None
        if kinds[kind] and id(one) not in known and _is_copy(one, model):
            found.append(one)
    return found


def _is_copy(average: nn.Module, model: nn.Module) -> bool:
    if type(average) is type(model) or not {id(part) for part in model.modules()}.isdisjoint(
        map(id, average.modules())
    ):
        return False
    return bool(_parts_like(average, model))


def _parts_like(average: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The model, and its parts, that have layers of the kinds of an averaged copy, in its order."""
    found = list[nn.Module]()
    for part in model.modules():
        try:
            paired_layers(average, part)
        except UnsupportedModelError:  # other layers, or none
            continue
        found.append(part)
    return found


__all__ = ["check_averages", "guard_averages"]
