"""What the state space layers of Hugging Face transformers have in common: a config that must stay true."""

from __future__ import annotations

from typing import Any

from torch import nn

from compressm.adapters.base import SelectiveAdapter


class HuggingFaceAdapter(SelectiveAdapter):
    """A layer of transformers, found by its class's name, so that transformers is not imported.

    A config holds one state dimension for all layers. They are therefore cut alike, unless asked otherwise, and
    ``save_pretrained`` writes a checkpoint that transformers loads by itself.

    Attributes:
        config_field: where the config has the state dimension.
    """

    uniform = True
    config_field = "state_size"

    def __init__(self, layer_type: str) -> None:
        self.layer_type = layer_type

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
