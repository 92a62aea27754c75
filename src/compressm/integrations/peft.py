"""Adapters of peft on a base model that a cut has made smaller: save both together, and load them.

LoRA needs nothing of this to train: pass the ``PeftModel`` to `Compressor`, `compress` or the Trainer's callback as any
other model. A cut goes through the factors of the adapters; see `compressm.adapters.composed`.

``PeftModel.save_pretrained`` then writes what cuts change in the base beside the adapter, see
`compressm.cutting.held_base`. `save` writes the whole base too, so that peft loads both without compressm.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressm.adapters.composed import is_kind
from compressm.adapters.registry import find_layers
from compressm.cutting.fitting import fit_any_size
from compressm.cutting.held_base import PEFT_MODEL, hold_cut_base
from compressm.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from compressm.runtime.files import sha256_of, write_text

try:
    import transformers
    from peft import PeftModel
except ImportError as error:
    raise MissingExtraError('this needs peft: pip install "compressm[peft]"') from error

_RECORD = "compressm.json"


def save(model: nn.Module, folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
    """Save a model with adapters and its base, so that peft loads both without compressm.

    Written are the adapters, as by ``save_pretrained``; the base, without the adapters, as a checkpoint of
    transformers; the path of the base in ``adapter_config.json``; and its name and hash in ``compressm.json``. Then

        AutoPeftModelForCausalLM.from_pretrained(folder)

    gives the same model. After the folder was moved, use `load`, or pass the path of the base yourself.

    Args:
        model: a ``peft.PeftModel`` around a model of transformers.
        folder: where to.
        base: folder for the base, by default ``base`` in the folder. If it holds this base already, from another call
            of `save`, it is not written again.

    Raises:
        UnsupportedModelError: not such a model, or layers of several state dimensions, which transformers cannot build.
        CheckpointError: the base is of another kind, or its folder holds another one.
    """
    inner = _base_of(model)
    folder = Path(folder)
    where = folder / "base" if base is None else Path(base)
    hold_cut_base(model)
    cast("Any", model).save_pretrained(folder)
    _save_base(inner, where)
    record = {"format": 1, "base": os.path.relpath(where.absolute(), folder.absolute()), "sha256": _digests(where)}
    write_text(folder / _RECORD, json.dumps(record, indent=2) + "\n")
    for name in cast("Any", model).peft_config:
        file = (folder if name == "default" else folder / name) / "adapter_config.json"
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        # The base is what it is now; a start that changes the base (PiSSA, OLoRA) must not be repeated on it.
        config |= {"base_model_name_or_path": str(where.absolute()), "init_lora_weights": True}
        write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: str | os.PathLike[str], model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Load a model with adapters that were trained through cuts.

    Args:
        folder: from `save`, or from the ``save_pretrained`` of such a model (for example a checkpoint of the Trainer).
        model: the base from before the cuts, as transformers loads it. It takes the state dimensions of the folder, in
            place, and the values that cuts changed. Not needed if the folder is from `save`.
        **options: of ``PeftModel.from_pretrained``, such as ``is_trainable=True``.

    Returns:
        a ``peft.PeftModel``.

    Raises:
        CheckpointError: the folder holds no base and none is given, or its base is not the one it was saved with.
    """
    folder = Path(folder)
    base: Any = fit_any_size(_saved_base(folder) if model is None else model)
    loaded: nn.Module = PeftModel.from_pretrained(base, folder, **options)
    return fit_any_size(loaded)


def _base_of(model: nn.Module) -> Any:
    """The base of a model with adapters.

    Raises:
        UnsupportedModelError: it cannot be saved for transformers.
    """
    if not is_kind(model, PEFT_MODEL):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}; expected a peft.PeftModel: save a model without adapters by "
            "save_pretrained or compressm.save"
        )
    inner: Any = cast("Any", model).get_base_model()
    if not isinstance(inner, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"the base is a {type(inner).__name__}, which transformers does not save: merge the adapters "
            "(merge_and_unload()) and use compressm.save"
        )
    merged = next((name for name, one in inner.named_modules() if getattr(one, "merged_adapters", None)), None)
    if merged is not None:
        raise UnsupportedModelError(
            f"the adapters of {merged} are merged into the base: call unmerge_adapter() first; or save the merged "
            "model alone, merge_and_unload().save_pretrained(folder)"
        )
    dims = {adapter.state_dim(layer) for layer, adapter in find_layers(inner).values() if adapter.uniform}
    if len(dims) > 1:
        raise UnsupportedModelError(
            f"the layers have {sorted(dims)} states, and a config of transformers holds one number for all: cut "
            "without per_layer=True, or merge the adapters (merge_and_unload()) and use compressm.save"
        )
    return inner


def _save_base(inner: Any, where: Path) -> None:
    """Write the base without its adapters, unless it is there already."""
    tensors = _without_adapters(inner)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        names = set(type(inner)(inner.config).state_dict())
    if names != set(tensors):
        odd = sorted(names.symmetric_difference(tensors))
        raise CheckpointError(
            f"without its adapters the base has other tensors than a {type(inner).__name__}: {', '.join(odd[:3])}; "
            "merge the adapters (merge_and_unload()) and save the plain model"
        )
    if where.is_dir() and any(where.iterdir()):
        _check_same(where, tensors)
        return
    inner.save_pretrained(where, state_dict=tensors)


def _without_adapters(inner: nn.Module) -> dict[str, Tensor]:
    """The state dict of a base as it was before adapters were put around parts of it."""
    tensors: dict[str, Tensor] = {}
    for name, value in inner.state_dict().items():
        parts = name.split(".")
        if not any(part.startswith(("lora_", "modules_to_save", "token_adapter")) for part in parts):
            tensors[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = value
    return tensors


def _check_same(where: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse a folder that holds another base."""
    held: dict[str, Tensor] = _type_of(where).from_pretrained(where).state_dict()
    for name, value in tensors.items():
        if name not in held or not torch.equal(held[name], value.cpu().to(held[name].dtype)):
            raise CheckpointError(
                f"{where} holds another base: its {name} is not that of this model; choose another folder"
            )


def _type_of(where: Path) -> Any:
    """The class of transformers whose model a folder holds."""
    try:
        (name,) = json.loads((where / "config.json").read_text(encoding="utf-8"))["architectures"]
        return getattr(transformers, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: no model of transformers ({error}); check the path") from error


def _saved_base(folder: Path) -> nn.Module:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        where, digests = folder / record["base"], dict(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no base ({error}): pass the one from before the cuts, load(folder, model=...)"
        ) from error
    if _digests(where) != digests:
        raise CheckpointError(
            f"{where} is not the base that {folder} was saved with (its hash differs): copy both again, or pass the "
            "base from before the cuts, load(folder, model=...)"
        )
    return _type_of(where).from_pretrained(where)


def _digests(where: Path) -> dict[str, str]:
    """Hashes of the files with a base's weights, and of its config, by name."""
    return {file.name: sha256_of(file) for file in sorted((*where.glob("*.safetensors"), *where.glob("config.json")))}


__all__ = ["load", "save"]
