"""Checkpoints in the format of the package ``mamba_ssm``: read into transformers' classes, and written back alike.

Their config has no ``model_type``; it holds the arguments of ``mamba_ssm``'s own ``MambaConfig``, with those of its
layers in ``ssm_cfg``. The tensors are those of transformers' Mamba and Mamba-2 under the same names but one. Models
with Mamba-3 layers, which transformers does not have, are read into `MixerLanguageModel`, with their own names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressm.cutting.sizes import state_dims
from compressm.errors import CheckpointError
from compressm.saving import mamba_ssm_model
from compressm.saving.mamba_ssm_model import MixerLanguageModel

_THEIRS, _OURS = "backbone.embedding.weight", "backbone.embeddings.weight"
_FILES = ("model.safetensors", "pytorch_model.bin")
# Arguments of their layers that change what a trained layer computes, with the only value that transformers' have; and
# those that only say how a new layer begins, or how it is run.
_FIXED: dict[str, Any] = {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
_NO_MATTER = {
    "A_init_range", "conv_init", "dt_init", "dt_init_floor", "dt_max", "dt_min", "dt_scale", "use_fast_path",
    "use_mem_eff_path",
}  # fmt: skip


_ELSEWHERE = "load it with mamba_ssm and cut it with compressm.compress"


def is_mamba_ssm(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in this format."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" not in config and {"d_model", "n_layer"} <= set(config)


def weights_of(folder: Path) -> Path:
    """The file that holds the weights.

    Raises:
        CheckpointError: there is none.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no {' or '.join(_FILES)}: check the path")


def load(folder: Path) -> nn.Module:
    """Load a checkpoint into ``MambaForCausalLM`` or ``Mamba2ForCausalLM`` of transformers, or `MixerLanguageModel`
    for Mamba-3, in its own dtype.

    Raises:
        CheckpointError: layers that none of them has, or tensors that are missing or left over.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors, embedding = _read(weights_of(folder)), _THEIRS
    with torch.device("meta"):
        if (config.get("ssm_cfg") or {}).get("layer") == "Mamba3":
            model = _with_mamba3(config, tensors, folder)
        else:
            tensors, embedding = {(_OURS if n == _THEIRS else n): value for n, value in tensors.items()}, _OURS
            model = _built(config, tensors, folder)
    if config.get("tie_embeddings", True):
        tensors.setdefault("lm_head.weight", tensors.get(embedding, torch.empty(0)))
    wanted = set(model.state_dict())
    if wanted != set(tensors):
        wrong = sorted(wanted ^ set(tensors))
        raise CheckpointError(f"{folder}: {wrong[0]} is not what its config promises; copy the folder again")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: {str(error).strip().splitlines()[-1].strip()}") from error
    model.tie_weights()
    return model.eval()


def save(model: nn.Module, source: Path, target: Path) -> tuple[Path, ...]:
    """Write a model as its source was written.

    Args:
        model: from `load`, cut to one state dimension.
        source: the folder that it was loaded from.
        target: an existing folder.

    Returns:
        the files of the source that were replaced.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (states,) = set(state_dims(model).values())
    config["ssm_cfg"] = {**(config.get("ssm_cfg") or {}), "d_state": states}
    (target / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    file = weights_of(source)
    known = set(_read(file))
    values = {(_THEIRS if name == _OURS else name): value for name, value in model.state_dict().items()}
    values = {name: value.detach().clone() for name, value in values.items() if name in known}
    if file.suffix == ".safetensors":
        save_file(values, target / file.name, metadata={"format": "pt"})
    else:
        torch.save(values, target / file.name)
    return source / "config.json", file


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _built(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The model of transformers that has the layers of a config."""
    import transformers

    layers: dict[str, Any] = dict(config.get("ssm_cfg") or {})
    kind = layers.pop("layer", "Mamba1")
    if kind not in ("Mamba1", "Mamba2") or config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise CheckpointError(
            f"{folder} is a model of mamba_ssm with {kind}, attention or MLPs; expected Mamba1 or Mamba2 layers alone, "
            f"or Mamba3: {_ELSEWHERE}"
        )
    if not config.get("rms_norm", True):
        raise CheckpointError(f"{folder} has LayerNorm (rms_norm=false), which transformers' Mamba has not")
    width, dtype = config["d_model"], tensors[_OURS].dtype if _OURS in tensors else torch.float32
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
    common: dict[str, Any] = {
        "vocab_size": tensors[_OURS].shape[0] if _OURS in tensors else config.get("vocab_size", 0),
        "hidden_size": width,
        "num_hidden_layers": config["n_layer"],
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "layer_norm_epsilon": 1e-5,
        "use_bias": layers.get("bias", False),
        "use_conv_bias": layers.get("conv_bias", True),
        "dtype": dtype,
        "state_size": 16 if kind == "Mamba1" else 128,
    }
    if kind == "Mamba2":
        head = layers.get("headdim", 64)
        names |= {
            "headdim": "head_dim",
            "ngroups": "n_groups",
            "chunk_size": "chunk_size",
            "dt_limit": "time_step_limit",
        }
        names.pop("dt_rank")
        common |= {"head_dim": head, "num_heads": layers.get("expand", 2) * width // head, "n_groups": 1}
    _check_layers(layers, {*names, "bias", "conv_bias"}, folder)
    given = {names[name]: value for name, value in layers.items() if name in names}
    name = "Mamba" if kind == "Mamba1" else "Mamba2"
    settings = getattr(transformers, f"{name}Config")(**{**common, **given})
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    return model.to(dtype)


def _with_mamba3(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> MixerLanguageModel:
    """The model that has the layers of a config with Mamba-3."""
    layers: dict[str, Any] = {name: value for name, value in config["ssm_cfg"].items() if name != "layer"}
    if config.get("attn_layer_idx"):
        raise CheckpointError(f"{folder} has layers of attention (attn_layer_idx): {_ELSEWHERE}")
    if layers.get("is_mimo") and layers.get("mimo_rank", 4) < 2:
        raise CheckpointError(f"{folder} has ssm_cfg.mimo_rank = {layers['mimo_rank']!r} with is_mimo: {_ELSEWHERE}")
    known = {*mamba_ssm_model.OPTIONS, *mamba_ssm_model.NO_MATTER, "is_mimo", "mimo_rank"}
    _check_layers(layers, known, folder, mamba_ssm_model.FIXED)
    vocabulary = tensors[_THEIRS].shape[0] if _THEIRS in tensors else config.get("vocab_size", 0)
    try:
        return MixerLanguageModel(config, vocabulary)
    except ValueError as error:
        raise CheckpointError(f"{folder}: ssm_cfg: {error}") from error


def _check_layers(layers: Mapping[str, Any], known: set[str], folder: Path, fixed: Mapping[str, Any] = _FIXED) -> None:
    """Refuse layers that compute what those that they are read into do not.

    Raises:
        CheckpointError: the argument and its value.
    """
    for name, value in layers.items():
        if name in known or name in _NO_MATTER or (name in fixed and value == fixed[name]):
            continue
        expected = f"expected {fixed[name]}" if name in fixed else "an argument that is not known"
        raise CheckpointError(f"{folder} has ssm_cfg.{name} = {value!r}: {expected}; {_ELSEWHERE}")


__all__ = ["is_mamba_ssm", "load", "save", "weights_of"]
