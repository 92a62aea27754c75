"""The base of the adapters of Hugging Face transformers' layers, whose config must agree with the layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.composed import is_kind

# The entry of a config that lists the state dimensions of layers that differ, by the layers' names.
DIMS_BY_LAYER = "state_sizes_by_layer"


@dataclass(frozen=True)
class Carried:
    """The content of a layer's cache before a call, for the layer's own forward. Writes to it are ignored.

    Attributes:
        conv: the convolution's last inputs, shape ``(batch, channels, taps)``.
        recurrent: the recurrence's state.
        recording: the cache's answer to ``is_recording_past``.
    """

    conv: Tensor
    recurrent: Tensor | None
    recording: bool

    def first(self, sequences: int) -> Carried:
        """A copy with the first sequences of the batch only."""
        recurrent = None if self.recurrent is None else self.recurrent[:sequences].clone()
        return Carried(self.conv[:sequences].clone(), recurrent, self.recording)

    def get_conv_state(self, *_: Any, **__: Any) -> Tensor:
        return self.conv

    def get_recurrent_state(self, *_: Any, **__: Any) -> Tensor | None:
        return self.recurrent

    def update_conv_state(self, conv_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.cat([self.conv, conv_states], -1)

    def update_recurrent_state(self, *_: Any, **__: Any) -> None:
        """Nothing is stored."""

    def is_recording_past(self, *_: Any) -> bool:
        return self.recording


class HuggingFaceAdapter(SelectiveAdapter):
    """A layer of transformers, found by its class's name, so that transformers is not imported.

    A config holds one state dimension for all layers. By default all layers are therefore cut to the same one, and
    ``save_pretrained`` writes a checkpoint that transformers loads by itself.

    Attributes:
        config_field: the config's name for the state dimension.
    """

    uniform = True
    config_field = "state_size"
    keeps_last = True
    state_dtype = torch.float32

    def __init__(self, layer_type: str) -> None:
        self.layer_type = layer_type

    def carried(self, layer: nn.Module, arguments: Mapping[str, Any]) -> Any:
        cache: Any = arguments.get("cache_params")
        if not hasattr(cache, "get_conv_state"):
            return super().carried(layer, arguments)
        index: Any = layer.layer_idx
        conv: Tensor | None = cache.get_conv_state(index)
        if conv is None:  # an empty cache
            return None
        return Carried(conv.detach(), _detached(cache.get_recurrent_state(index)), bool(cache.is_recording_past(index)))

    def written(self, model: nn.Module) -> None:
        """Write the state dimension into the configs of the models in ``model`` that have layers of this type.

        A config holds one number for all layers. Where layers differ it keeps its number, which then belongs to none of
        them, and lists the true ones under `DIMS_BY_LAYER`. Models that were built from one config share it, so a whole
        model gets a copy. A backbone may be part of a larger model, which shares its config too, and is not copied for.
        Smaller parts do not know the other layers, and tell nothing.
        """
        for owner in _owners(model):
            dims = self.dims_by_layer(owner)
            if not dims or not self.has_field(owner.config):
                continue
            numbers = set(dims.values())
            told = {DIMS_BY_LAYER: dims} if len(numbers) > 1 else {}
            if self.told(owner.config, *(numbers if len(numbers) == 1 else ())) == told:
                continue
            config = _own_config(model, owner)
            if len(numbers) == 1:
                self.tell_config(config, *numbers)
            if hasattr(config, DIMS_BY_LAYER):
                delattr(config, DIMS_BY_LAYER)
            for name, value in told.items():
                setattr(config, name, value)

    def has_field(self, config: Any) -> bool:
        """Whether a config is of a kind that holds this adapter's state dimension."""
        return hasattr(config, self.config_field)

    def tell_config(self, config: Any, states: int) -> None:
        """Write a state dimension into a model's config."""
        setattr(config, self.config_field, states)

    def told(self, config: Any, states: int | None = None) -> dict[str, Any] | None:
        """What a config says of layers that differ; None if it says another state dimension than ``states``."""
        if states is not None:
            other = copy.deepcopy(config)
            self.tell_config(other, states)
            if self.fields(other) != self.fields(config):
                return None
        by_layer = getattr(config, DIMS_BY_LAYER, None)
        return {} if by_layer is None else {DIMS_BY_LAYER: by_layer}

    def fields(self, config: Any) -> Any:
        """What `tell_config` changes in a config."""
        return getattr(config, self.config_field)

    def untold(self, model: nn.Module) -> str | None:
        """A warning if layers of this type are parts of a model that is not in ``model``, so that its config will not
        be true any more; None if there are none."""
        inside = {id(layer) for owner in _owners(model) for layer in owner.modules()}
        for name, layer in self._layers(model).items():
            parts = [one for one in model.modules() if one is layer or layer in one.children()]
            config = next((vars(one)["config"] for one in parts if "config" in vars(one)), None)
            if id(layer) not in inside and config is not None and self.has_field(config):
                return (
                    f"{name or type(layer).__name__} has a {type(config).__name__} that does not learn of its cut: if "
                    "it is a part of a model of transformers, cut the whole model, or save that by compressm.save"
                )
        return None

    def dims_by_layer(self, module: nn.Module) -> dict[str, int]:
        """What a config would say of each layer of this type in a module, by the layer's name."""
        return {name: self.state_dim(layer) for name, layer in self._layers(module).items()}

    def _layers(self, module: nn.Module) -> dict[str, nn.Module]:
        kind = str(self.layer_type)
        return {name: layer for name, layer in module.named_modules() if is_kind(layer, kind)}


def _owners(model: nn.Module) -> list[Any]:
    """The outermost modules of a model that are saved with a config."""
    found: list[Any] = []
    known: set[int] = set()
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and hasattr(type(module), "save_pretrained") and id(config) not in known:
            known.add(id(config))
            found.append(module)
    return found


def _own_config(model: nn.Module, owner: Any) -> Any:
    """Give a model a copy of an owner's config, in all its modules; returns the copy.

    The config may be a part of that of a larger model, such as ``config.text_config``, which is then copied too. A
    backbone without a head keeps its own.
    """
    if getattr(owner, "base_model", None) is owner:
        return owner.config
    holders = [(one, vars(one)["config"]) for one in model.modules() if vars(one).get("config") is not None]
    copies: dict[int, Any] = {}
    for _, config in holders:  # outermost first
        if id(config) not in copies and not isinstance(config, dict):
            copy.deepcopy(config, copies)
    for module, config in holders:
        if id(config) in copies:
            module.config = copies[id(config)]
    return owner.config


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


__all__ = ["DIMS_BY_LAYER", "Carried", "HuggingFaceAdapter"]
