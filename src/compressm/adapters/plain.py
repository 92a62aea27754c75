"""Find the tensors of a layer that are computed from others at every call, which a cut cannot write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod


def computed_tensors(layer: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Tensors of a layer that are computed from parameters: their names, what computes them, and how to undo it."""
    for path, module in layer.named_modules():
        if parametrize.is_parametrized(module):
            for name in cast("nn.ModuleDict", module.parametrizations):
                full = f"{path}.{name}".lstrip(".")
                kinds = ", ".join(type(one).__name__ for one in cast("Any", module.parametrizations)[name])
                advice = f"call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
                yield full, (f"parametrization {kinds}", advice)
        for hook in module._forward_pre_hooks.values():  # pyright: ignore[reportPrivateUsage]
            kind = type(hook).__name__
            if kind in ("WeightNorm", "SpectralNorm"):
                name: str = cast("Any", hook).name
                remover = "remove_weight_norm" if kind == "WeightNorm" else "remove_spectral_norm"
                yield f"{path}.{name}".lstrip("."), (kind, f"call torch.nn.utils.{remover}(module, {name!r})")
            elif isinstance(hook, BasePruningMethod):
                name = cast("Any", hook)._tensor_name
                yield (
                    f"{path}.{name}".lstrip("."),
                    (f"pruning {kind}", f"call torch.nn.utils.prune.remove(module, {name!r})"),
                )


__all__ = ["computed_tensors"]
