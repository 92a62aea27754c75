"""Push the folder that `compressm.save` writes, with a model card, to a model hub, and load it from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from compressm.errors import MissingExtraError
from compressm.saving.checkpoint import load, save
from compressm.training.compressor import Compressor

try:
    from huggingface_hub import ModelHubMixin, snapshot_download
except ImportError as error:
    raise MissingExtraError('this needs huggingface_hub: pip install "compressm[transformers]"') from error


class HubModel(ModelHubMixin, library_name="compressm", tags=["state-space-model", "compressed"]):
    """A model with the methods of `huggingface_hub.ModelHubMixin`.

        HubModel(model, compressor).push_to_hub("me/small-model")
        model = HubModel.from_pretrained("me/small-model").model

    ``save_pretrained(folder)`` writes what is pushed. Models of transformers have these methods themselves.

    Args:
        model: any model with a layer that compressm knows; on loading, see `compressm.load`.
        compressor: its history goes into the model card.
    """

    def __init__(self, model: nn.Module, compressor: Compressor | None = None) -> None:
        self.model, self.compressor = model, compressor

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.model, save_directory, self.compressor, card=True)

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, model: nn.Module | None = None, **options: Any
    ) -> HubModel:
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        folder = Path(model_id)
        if not folder.is_dir():
            known = {name: options[name] for name in names if name in options}
            wanted = ["*.safetensors", "compressm.json", "README.md"]
            folder = Path(snapshot_download(model_id, allow_patterns=wanted, **known))
        return cls(load(folder, model))


__all__ = ["HubModel"]
