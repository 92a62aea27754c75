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
        kind = self.layer_type
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, self.config_field):
                dims = [self.state_dim(m) for m in module.modules() if _path(m) == kind]
                if dims:
                    setattr(config, self.config_field, max(dims))


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
