"""Adapter checkpoints of peft that hold what a cut changes in the base model.

``PeftModel.save_pretrained`` writes the adapter alone, since the base is known. After a cut it is not: some of its
tensors are smaller, and belong to that training alone. So these tensors are added to the adapter's file, under their
names in the model. They are all that a cut changes; the rest of the base is what it was.

peft loads such a file without help: into a base of the same state dimension the values go; a base of another dimension
is refused, because a size does not fit. A base with `fit_any_size` takes the sizes of the file.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.adapters.composed import is_kind
from compressm.adapters.registry import check_plain, resized
from compressm.errors import UnsupportedModelError
from compressm.runtime.files import replacing

PEFT_MODEL = "peft.peft_model.PeftModel"
_FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")


def is_factor(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return _FACTOR.search(f".{name}") is not None


def peft_models(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that save adapters alone: those of peft, and of transformers with ``add_adapter``."""
    inner = [one for one in model.modules() if getattr(one, "_hf_peft_config_loaded", False)]
    return [one for one in model.modules() if is_kind(one, PEFT_MODEL)] or inner


def hold_cut_base(model: nn.Module) -> None:
    """From now on, let adapters that are saved from a model hold the tensors that cuts change in its base."""
    for module in peft_models(model):
        if not isinstance(vars(module).get("save_pretrained"), partial):
            # Of a plain function and the module, so that copies of the model save themselves.
            cast("Any", module).save_pretrained = partial(_save, module)


def cut_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What cuts change in the base of a model with adapters, by name, without what merged adapters have added."""
    found: dict[str, Tensor] = {}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stored = model.state_dict(keep_vars=True)
    for name, (layer, adapter) in find_layers(model).items():
        if not _is_cut(name, layer):
            continue
        change = resized(layer, adapter, adapter.state_dim(layer))
        buffers = [key for key, value in change.attributes.items() if isinstance(value, Tensor)]
        for one in (*change.values(), *buffers):
            full = f"{name}.{one}".lstrip(".")
            if full in stored and not is_factor(full):
                found[full] = _unmerged(model, full, named[full].detach())
    for full in _changed_at_the_start(model):
        found[full] = _unmerged(model, full, named[full].detach())
    return found


def _is_cut(name: str, layer: nn.Module) -> bool:
    """Whether a layer can be cut. One that cannot, such as a quantised one, is left out of cuts."""
    try:
        check_plain({name: layer})
    except UnsupportedModelError:
        return False
    return True


def _changed_at_the_start(model: nn.Module) -> list[str]:
    """Names of the base's weights from which adapters were split off (PiSSA, OLoRA), by the names of these weights.

    peft repeats the split when it loads such an adapter, and would split the smaller weights in another way.
    """
    configs: list[Any] = [config for one in peft_models(model) for config in cast("Any", one).peft_config.values()]
    starts = {getattr(config, "init_lora_weights", True) for config in configs}
    if all(isinstance(start, bool) or start == "gaussian" for start in starts):
        return []
    return [name for name, _ in model.named_parameters() if name.endswith(".base_layer.weight")]


@torch.no_grad()
def _unmerged(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A tensor of the base without the low-rank terms that were merged into it."""
    owner, _, own = name.rpartition(".")
    if not owner.endswith(".base_layer") or own not in ("weight", "bias"):
        return value
    module: Any = model.get_submodule(owner.removesuffix(".base_layer"))
    for adapter in module.merged_adapters:
        if adapter in module.lora_A:
            factor = module.lora_B[adapter]
            if own == "weight":
                value = value - module.get_delta_weight(adapter).to(value)
            elif factor.bias is not None:
                value = value - (factor.bias * module.scaling[adapter]).to(value)
    return value


def _save(model: nn.Module, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of a model with adapters, which then hold the tensors of the base that cuts change."""
    save: Callable[..., Any] = cast("Any", type(model)).save_pretrained
    result = save(model, save_directory, *args, **kwargs)
    given = inspect.signature(save).bind(model, save_directory, *args, **kwargs).arguments
    if given.get("is_main_process", True):
        tensors = {name: value.cpu().contiguous() for name, value in cut_tensors(model).items()}
        prefix = "" if is_kind(model, PEFT_MODEL) else "base_model.model."
        for folder in _folders(model, Path(save_directory), given.get("selected_adapters")):
            _complete(folder, {f"{prefix}{name}": value for name, value in tensors.items()})
    return result


def _folders(model: Any, folder: Path, selected: list[str] | None) -> list[Path]:
    """The folders that peft writes adapters to."""
    if not is_kind(model, PEFT_MODEL):
        return [folder]
    return [folder if name == "default" else folder / name for name in selected or model.peft_config]


def _complete(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Add tensors to an adapter's file."""
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        with replacing(file) as scratch:
            save_file({**tensors, **load_file(file)}, scratch, metadata={"format": "pt"})
        return
    file = folder / "adapter_model.bin"
    if not file.is_file():
        raise UnsupportedModelError(
            f"{folder} has no adapter_model.safetensors after save_pretrained: this version of peft is not known"
        )
    torch.save({**tensors, **torch.load(file, map_location="cpu", weights_only=True)}, file)


__all__ = ["cut_tensors", "hold_cut_base", "is_factor", "peft_models"]
