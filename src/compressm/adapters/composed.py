"""Weights of a layer that are computed from several parameters, so that a cut of the weight is a cut of these.

LoRA computes ``W = W_0 + s B A``. A linear map M of the rows of W is the same map of the rows of ``W_0`` and of B:
``M W = M W_0 + s (M B) A``. A map of the columns is a map of the columns of ``W_0`` and of A. Both are exact.

Weight normalisation computes ``W = g v / |v|`` row by row. Keeping some rows of W keeps these rows of g and v. Other
maps change the norms, and are not possible.

A layer's adapter knows none of this. It reads the weights under their own names (``"x_proj.weight"``), and
`compressm.adapters.changes.in_parameters` translates its change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_LORA_LINEAR = "peft.tuners.lora.layer.Linear"
TUNER = "peft.tuners.tuners_utils.BaseTunerLayer"


@dataclass(frozen=True)
class Composed:
    """A tensor of a layer that is computed from parameters.

    Attributes:
        value: what it is now, detached.
        parts: the parameters, by name in the layer; with the axes that they share with the tensor, as a map from the
            tensor's axis to the parameter's.
        linear: whether a linear map of the tensor along an axis is the same map of the parts that have this axis.
            Otherwise only a selection of entries along it is.
        kind: what computes it.
        undo: how to make it a plain parameter again.
        sizes: names of attributes, relative to the layer, that must be written with ``in_features`` or
            ``out_features``.
    """

    value: Tensor
    parts: Mapping[str, Mapping[int, int]]
    linear: bool
    kind: str
    undo: str
    sizes: Mapping[str, tuple[str, ...]]

    def along(self, axis: int) -> dict[str, int]:
        """The parts that a cut along an axis changes, with their own axis; empty if it cannot be made in the parts."""
        return {name: axes[axis] for name, axes in self.parts.items() if axis in axes}


def is_kind(module: nn.Module, full_name: str) -> bool:
    """Whether a module is of a class with this full name, without importing its package."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == full_name for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, with or without adapters around it."""
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


@torch.no_grad()
def composed_tensors(layer: nn.Module) -> dict[str, Composed]:
    """The tensors of a layer that are computed from parameters in which a cut can be made, by their plain names."""
    return {name: one for path, module in layer.named_modules() for name, one in _in_module(path, module)}


@torch.no_grad()
def effective_weight(module: nn.Module) -> Tensor:
    """The weight that a module computes with, with its active low-rank terms."""
    return next((one.value for name, one in _in_module("", module) if name == "weight"), cast("Any", module).weight)


def _in_module(path: str, module: nn.Module) -> Iterator[tuple[str, Composed]]:
    if _is_plain_lora(module):
        yield from _lora(path, module)
    elif parametrize.is_parametrized(module):
        parametrized: Any = module.parametrizations
        for name, steps in parametrized.items():
            if len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm" and steps[0].dim == 0:
                full, inside = _join(path, name), _join(path, f"parametrizations.{name}")
                yield (
                    full,
                    Composed(
                        getattr(module, name).detach(),
                        {f"{inside}.original0": {0: 0}, f"{inside}.original1": {0: 0}},
                        False,
                        "weight normalisation",
                        f"call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})",
                        {},
                    ),
                )


def _is_plain_lora(module: Any) -> bool:
    """Whether a module is LoRA around a linear layer with a weight of its own, and nothing beyond the two factors."""
    if not is_kind(module, _LORA_LINEAR) or module.lora_variant or module.fan_in_fan_out:
        return False
    base = module.base_layer
    return isinstance(base, nn.Linear) and "weight" in dict(base.named_parameters(recurse=False))


def _lora(path: str, module: Any) -> Iterator[tuple[str, Composed]]:
    """The weight of ``peft``'s LoRA around a linear layer, and its bias if there is one.

    Every adapter has its factors, active or not, so all are parts. Merged ones are in the base's weight already, and
    stay there: the base's weight is cut in the same way.
    """
    adapters: list[str] = list(module.lora_A)
    weight, base = module.base_layer.weight.detach(), _join(path, "base_layer")
    rows, columns = (_join(path, f"lora_{factor}.") for factor in "BA")
    shown = [] if module.disable_adapters else [one for one in module.active_adapters if one in adapters]
    for adapter in shown:
        if adapter not in module.merged_adapters and not module.lora_B[adapter].weight.is_meta:
            weight = weight + module.get_delta_weight(adapter).detach().to(weight)
    parts: dict[str, Mapping[int, int]] = {f"{base}.weight": {0: 0, 1: 1}}
    for adapter in adapters:
        parts |= {f"{rows}{adapter}.weight": {0: 0}, f"{columns}{adapter}.weight": {1: 1}}
        if module.lora_B[adapter].bias is not None:
            parts[f"{rows}{adapter}.bias"] = {0: 0}
    kind = f"LoRA {', '.join(repr(one) for one in adapters)}"
    undo = "merge and unload the adapters (model.merge_and_unload())"
    own = (path, base)
    sizes = {
        "out_features": tuple(_join(one, "out_features") for one in (*own, *(f"{rows}{a}" for a in adapters))),
        "in_features": tuple(_join(one, "in_features") for one in (*own, *(f"{columns}{a}" for a in adapters))),
    }
    yield _join(path, "weight"), Composed(weight, parts, True, kind, undo, sizes)
    if module.base_layer.bias is not None:
        value: Tensor = module.base_layer.bias.detach()
        yield _join(path, "bias"), Composed(value, {f"{base}.bias": {0: 0}}, True, kind, undo, {})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


__all__ = ["TUNER", "Composed", "composed_tensors", "effective_weight", "is_kind", "is_linear"]
