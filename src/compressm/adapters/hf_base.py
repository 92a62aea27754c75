"""The base of the adapters of Hugging Face transformers' layers, whose config must agree with the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.base import SelectiveAdapter


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
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, self.config_field) and (dims := self.dims_in(module)):
                setattr(config, self.config_field, max(dims))

    def dims_in(self, module: nn.Module) -> list[int]:
        """State dimensions of the layers of this type in a module."""
        return [
            self.state_dim(layer)
            for layer in module.modules()
            if self.layer_type in [f"{kind.__module__}.{kind.__qualname__}" for kind in type(layer).__mro__]
        ]


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


__all__ = ["Carried", "HuggingFaceAdapter"]
