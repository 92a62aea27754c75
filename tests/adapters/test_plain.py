"""Tensors that are computed at every call: found, named, and refused before a cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from compressm.adapters.plain import computed_tensors
from compressm.adapters.registry import check_plain
from compressm.errors import UnsupportedModelError
from compressm.layers import LRU, Mamba


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer.get_submodule("x_proj"))  # type: ignore[no-untyped-call]


def twice(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer.get_submodule("x_proj"), "weight", Doubled())
    parametrize.register_parametrization(layer.get_submodule("x_proj"), "weight", Doubled())


# What was done to a Mamba layer: the tensor, what computes it, and how to undo it.
DONE: dict[str, tuple[Callable[[nn.Module], object], tuple[str, str, str]]] = {
    "spectral norm": (
        lambda layer: parametrizations.spectral_norm(layer.get_submodule("x_proj")),
        ("x_proj.weight", "parametrization _SpectralNorm", "parametrize.remove_parametrizations(module, 'weight')"),
    ),
    "weight norm of old": (
        old_weight_norm,
        ("x_proj.weight", "WeightNorm", "utils.remove_weight_norm(module, 'weight')"),
    ),
    "spectral norm of old": (
        lambda layer: nn.utils.spectral_norm(layer.get_submodule("x_proj")),
        ("x_proj.weight", "SpectralNorm", "utils.remove_spectral_norm(module, 'weight')"),
    ),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer.get_submodule("x_proj"), "weight", 0.5),
        ("x_proj.weight", "pruning L1Unstructured", "utils.prune.remove(module, 'weight')"),
    ),
    "twice": (
        twice,
        ("x_proj.weight", "parametrization Doubled, Doubled", "parametrize.remove_parametrizations(module, 'weight')"),
    ),
    "of the layer itself": (
        lambda layer: parametrize.register_parametrization(layer, "A_log", Doubled()),
        ("A_log", "parametrization Doubled", "parametrize.remove_parametrizations(module, 'A_log')"),
    ),
}


@pytest.mark.parametrize("kind", DONE)
def test_what_is_computed_is_named_with_the_way_back(kind: str) -> None:
    do, (name, what, advice) = DONE[kind]
    layer = Mamba(4, 4)
    assert list(computed_tensors(layer)) == []
    check_plain({"blocks.0": layer})
    do(layer)
    ((found, (computed_by, undo)),) = computed_tensors(layer)
    assert (found, computed_by) == (name, what)
    assert undo.startswith("call torch.nn.utils.")
    assert undo.endswith(advice)
    with pytest.raises(UnsupportedModelError) as caught:
        check_plain({"0": LRU(4, 4), "blocks.0": layer})
    text = str(caught.value)
    assert text.startswith(f"blocks.0.{name} is computed from other parameters at every call ({what}), and a cut has")
    assert text.endswith(f"{undo} first, and build the optimizer after that")


def test_what_no_cut_writes_may_be_computed() -> None:
    layer = Mamba(4, 4)
    parametrizations.spectral_norm(layer.get_submodule("out_proj"))
    assert [name for name, _ in computed_tensors(layer)] == ["out_proj.weight"]
    check_plain({"": layer})


def test_a_linear_layers_parameters_are_named_without_a_prefix_of_their_own() -> None:
    layer = LRU(4, 4)
    parametrize.register_parametrization(layer, "B_re", Doubled())
    with pytest.raises(UnsupportedModelError, match=r"^B_re is computed from other parameters"):
        check_plain({"": layer})


def test_a_parameter_that_is_gone_is_named() -> None:
    layer = Mamba(4, 4)
    weight = layer.x_proj.weight.detach().clone()
    del layer.x_proj.weight
    layer.x_proj.weight = weight  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"^mixer\.x_proj\.weight is not a parameter of Mamba any more"):
        check_plain({"mixer": layer})


def test_values_that_are_not_finite_are_left_to_others() -> None:
    layer = LRU(4, 4)
    with torch.no_grad():
        layer.B_re.fill_(torch.nan)
    check_plain({"": layer})
