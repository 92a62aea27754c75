"""Find what keeps a cut from reading or writing a layer's tensors: weights that are computed from others at every call,
values that are not there, packed or sharded, and wrappers around whole layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from compressm.adapters.composed import TUNER, composed_tensors, is_kind
from compressm.errors import UnsupportedModelError

_PACKED_MODULES = ("torch.ao.nn.quantized", "torch.nn.quantized")  # whose weights are no parameters
_TRAINED_COPY = "peft.utils.other.AuxiliaryTrainingWrapper"
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
_INSTEAD_OF_SHARDS = (
    "and cannot be resized in place: shard with fully_shard (FSDP2) and cut between two steps with "
    "compressm.integrations.sharding.compress_sharded, or train with DistributedDataParallel"
)


def computed_tensors(layer: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Tensors of a layer that are computed from parameters, and cannot be cut in these: their names, what computes
    them, and how to undo it."""
    composed = composed_tensors(layer)
    for path, module in layer.named_modules():
        for name, how in _computed_in(module):
            if (full := _join(path, name)) not in composed:
                yield full, how


def _computed_in(module: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    if parametrize.is_parametrized(module):
        for name in cast("nn.ModuleDict", module.parametrizations):
            kinds = ", ".join(type(one).__name__ for one in cast("Any", module.parametrizations)[name])
            advice = f"call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
            yield name, (f"parametrization {kinds}", advice)
    for hook in module._forward_pre_hooks.values():  # pyright: ignore[reportPrivateUsage]
        kind = type(hook).__name__
        if kind in ("WeightNorm", "SpectralNorm"):
            name: str = cast("Any", hook).name
            remover = "remove_weight_norm" if kind == "WeightNorm" else "remove_spectral_norm"
            yield name, (kind, f"call torch.nn.utils.{remover}(module, {name!r})")
        elif isinstance(hook, BasePruningMethod):
            name = cast("Any", hook)._tensor_name
            yield name, (f"pruning {kind}", f"call torch.nn.utils.prune.remove(module, {name!r})")
    if is_kind(module, TUNER) or is_kind(module, _TRAINED_COPY):
        advice = "merge and unload it (model.merge_and_unload()), or adapt this module by plain LoRA"
        inside = getattr(module, "base_layer", getattr(module, "original_module", module))
        for name in ("weight", "bias"):
            if getattr(inside, name, None) is not None:
                yield name, (_adapter_kind(module), advice)


def _adapter_kind(module: Any) -> str:
    """What an adapter of the package peft is, in words."""
    variants = getattr(module, "lora_variant", None) or {}
    kind = "modules_to_save" if is_kind(module, _TRAINED_COPY) else type(module).__name__
    names = sorted({type(one).__name__.removesuffix("Variant") for one in variants.values()})
    return f"the adapter {', '.join(names) or kind} of peft"


def check_readable(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose parameters have no values here, packed ones, or a process's share of them.

    Args:
        layers: by their names in the model.

    Raises:
        UnsupportedModelError: names the parameter, and what to do.
    """
    for layer_name, layer in layers.items():
        for path, module in layer.named_modules():
            for name, value in module.named_parameters(recurse=False):
                full = _join(layer_name, _join(path, name))
                _refuse_shards(full, value)
                if value.is_meta:
                    _refuse_meta(full, module)
                if _is_packed(value):
                    raise UnsupportedModelError(
                        f"{full} is quantised ({type(value).__name__} of {value.dtype}), and a cut needs its real "
                        "values: cut the model first and quantise the smaller one, leave this layer out of the "
                        "quantisation (llm_int8_skip_modules, modules_to_not_convert), or out of the cut (exclude=)"
                    )
            if type(module).__module__.startswith(_PACKED_MODULES):
                raise UnsupportedModelError(
                    f"{_join(layer_name, path)} is quantised ({type(module).__name__}), and a cut needs its real "
                    "values: cut the model first and quantise the smaller one, or leave this layer out of the cut "
                    "(exclude=)"
                )


def _refuse_shards(full: str, value: Tensor) -> None:
    if any(kind.__name__ == "DTensor" for kind in type(value).__mro__):  # by name, since importing it takes time
        raise UnsupportedModelError(
            f"{full} is a DTensor, which several processes hold together (fully_shard, tensor parallelism), "
            f"{_INSTEAD_OF_SHARDS}"
        )
    if getattr(value, "_fsdp_flattened", False):
        raise UnsupportedModelError(f"{full} is held by FullyShardedDataParallel (FSDP1), {_INSTEAD_OF_SHARDS}")


def _refuse_meta(full: str, module: nn.Module) -> None:
    if hasattr(module, "_hf_hook"):
        raise UnsupportedModelError(
            f"{full} is offloaded by accelerate and has no values outside of a forward pass: load the model without "
            "offloading (device_map=None, or one that names devices only), in bfloat16 if it is too large"
        )
    raise UnsupportedModelError(
        f"{full} is on the meta device and has no values: give it some first (model.to_empty(device=...) and "
        "load_state_dict, or from_pretrained without torch.device('meta'))"
    )


def _is_packed(value: Tensor) -> bool:
    """Whether a parameter holds packed numbers, as those of bitsandbytes and torchao do."""
    plain = type(value.data) in (Tensor, nn.Parameter) and type(value) in (Tensor, nn.Parameter)
    quantised = not (value.is_floating_point() or value.is_complex()) or value.is_quantized
    return quantised or (not plain and "quant" in f"{type(value).__module__}.{type(value).__qualname__}".lower())


def check_wrappers(model: nn.Module, layers: Mapping[str, nn.Module], observed: Collection[str] | None = None) -> None:
    """Refuse wrappers around whole layers that copy or replace their parameters during a call.

    Args:
        model: the model.
        layers: its layers, by name.
        observed: the names of those that will be observed while the model runs; by default all.

    Raises:
        UnsupportedModelError: `torch.nn.DataParallel`, FSDP of the first kind, or an adapter of peft around a whole
            layer.
    """
    for name, module in model.named_modules():
        inside = [one for one in layers if name == "" or one == name or one.startswith(f"{name}.")]
        if isinstance(module, nn.DataParallel) and any(
            one in inside for one in (layers if observed is None else observed)
        ):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a torch.nn.DataParallel, which runs copies of the layers that cannot be "
                "observed: pass its .module, and train with torch.nn.parallel.DistributedDataParallel"
            )
        if inside and is_kind(module, _FSDP1):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a FullyShardedDataParallel (FSDP1), whose parameters are shards "
                f"{_INSTEAD_OF_SHARDS}"
            )
        around = [one for one in inside if one != name] if name else []
        if around and (is_kind(module, TUNER) or is_kind(module, _TRAINED_COPY)):
            what = f"{_adapter_kind(module)}, which wraps the whole layer {around[0]}"
            raise UnsupportedModelError(
                f"{name} is {what}, and a cut of the layer does not reach it: let target_modules name the layer's "
                "projections instead (in_proj, x_proj), without target_parameters or modules_to_save for this layer"
            )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


__all__ = ["check_readable", "check_wrappers", "computed_tensors"]
