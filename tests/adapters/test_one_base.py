"""Linear and selective layers answer the same questions: how they are balanced, and what cuts of them there are.

What is expected comes from the definitions, in NumPy and SciPy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov, sqrtm
from torch import Tensor, nn

import compressm
from compressm.adapters import LayerAdapter, LRUAdapter, find_layers, layer_values, layers_that_need_data, register
from compressm.adapters.changes import write
from compressm.adapters.mamba3 import units_of
from compressm.cutting.spectrum import snapshot, snapshot_state
from compressm.errors import InvalidSystemError, UnsupportedModelError
from compressm.layers import LRU, S4D, Mamba3
from compressm.observing.over_data import gather
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Reduction
from compressm.theory.rank_rule import RankRule
from helpers import real_matrices
from layer_cases import LAYERS, WIDTH

# Those with states that can be reduced, and only one kind of them.
KINDS = sorted(LAYERS.keys() - {"s4", "hyena", "hyena of a filter", "bidirectional"})
SELECTIVE = {
    "mamba", "mamba2", "mamba3", "linear-attention", "retnet", "gated", "gla", "delta-net", "gated-delta-net", "rg-lru",
}  # fmt: skip


def built(kind: str) -> tuple[nn.Module, LayerAdapter, Balanced]:
    torch.manual_seed(5)
    layer = LAYERS[kind]()
    (_, adapter), *_ = find_layers(layer).values()
    moments = gather(layer, [torch.randn(3, 20, WIDTH)])
    return layer, adapter, adapter.balance(layer, moments.get(""))


@pytest.mark.parametrize("kind", KINDS)
def test_only_selective_layers_need_data(kind: str) -> None:
    layer, adapter, _ = built(kind)
    assert adapter.needs_data == (kind in SELECTIVE)
    assert list(layers_that_need_data(layer)) == [""] * (kind in SELECTIVE)
    assert (adapter.system(layer) is None) == (kind in SELECTIVE)
    if adapter.needs_data:
        with pytest.raises(UnsupportedModelError, match="moments of data"):
            adapter.balance(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_hankel_operator(kind: str) -> None:
    _, _, balanced = built(kind)
    H = balanced.hankel_operator().numpy()
    np.testing.assert_allclose(H, H.conj().swapaxes(-1, -2), atol=1e-10 * np.abs(H).max())
    found = np.linalg.eigvalsh(H)[..., ::-1]
    scale = float(balanced.hsv.max())
    np.testing.assert_allclose(found, balanced.hsv.numpy(), atol=1e-7 * scale)
    np.testing.assert_allclose(balanced.energy.sum(-1), balanced.hsv.sum(-1))
    every = balanced.hsv.numpy().reshape(-1, balanced.hsv.shape[-1])
    np.testing.assert_allclose(balanced.mean_hsv(), every.mean(0))


def test_the_operator_of_a_linear_layer_is_that_of_its_gramians() -> None:
    layer, adapter, balanced = built("lru")
    system = adapter.system(layer)
    assert system is not None
    A, B, C = real_matrices(system)
    P, Q = solve_discrete_lyapunov(A, B @ B.T), solve_discrete_lyapunov(A.T, C.T @ C)
    root = np.asarray(sqrtm(P)).real
    np.testing.assert_allclose(balanced.hankel_operator(), np.asarray(sqrtm(root @ Q @ root)).real, atol=1e-8)


def test_the_operator_of_a_selective_layer_is_that_of_its_moments() -> None:
    layer, _, balanced = built("mamba2")
    moments = gather(layer, [torch.randn(3, 20, WIDTH, generator=torch.Generator().manual_seed(7))])[""]
    _, adapter = find_layers(layer)[""]
    balanced = adapter.balance(layer, moments)
    for group in range(2):
        P, W = (x[group].numpy() / float(moments.tokens) for x in (moments.P, moments.W))
        root = np.asarray(sqrtm(P)).real
        expected = np.asarray(sqrtm(root @ W @ root)).real
        np.testing.assert_allclose(balanced.hankel_operator()[group], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_balanced_layer_comes_back_from_what_was_saved(kind: str) -> None:
    _, _, balanced = built(kind)
    back = snapshot(snapshot_state(balanced), "real")
    assert type(back) is type(balanced)
    assert torch.equal(back.hsv, balanced.hsv)


@pytest.mark.parametrize("kind", KINDS)
def test_a_proposal_is_what_the_layer_becomes_when_it_is_written(kind: str) -> None:
    layer, adapter, balanced = built(kind)
    present, before = adapter.state_dim(layer), copy.deepcopy(layer.state_dict())
    cuts = adapter.cuts(layer, balanced)
    for states in range(1, present):
        proposal = cuts.proposal(states, RankRule(states=states))
        assert proposal is not None
        assert proposal.change is not None
        assert proposal.certificate.valid
        assert proposal.reason == ""
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())  # not written yet
        smaller = copy.deepcopy(layer)
        write(smaller, proposal.change)
        least = units_of(layer.sizes).least if isinstance(layer, Mamba3) else 1
        assert adapter.state_dim(smaller) == proposal.states <= max(states, least)
        assert smaller(torch.randn(2, 7, WIDTH)).shape == (2, 7, WIDTH)
        system = adapter.system(smaller)
        if system is not None:
            poles = np.sort_complex(np.asarray(proposal.poles_after))
            np.testing.assert_allclose(np.sort_complex(system.lam.numpy().ravel()), poles, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_energy_that_is_kept_is_what_is_not_discarded(kind: str) -> None:
    layer, adapter, balanced = built(kind)
    cuts, total = adapter.cuts(layer, balanced), float(balanced.hsv.sum())
    for states in range(1, adapter.state_dim(layer)):
        proposal = cuts.proposal(states, RankRule(states=states))
        assert proposal is not None
        assert proposal.energy_kept is not None
        best = float(balanced.energy[..., : proposal.states].sum()) / total
        if cuts.discards is None and adapter.needs_data:  # any map of the states may be written
            assert proposal.energy_kept == pytest.approx(best, abs=1e-5)
        else:  # left-over real poles take a state each, and a selection of states loses more than a map
            assert proposal.energy_kept <= best + 1e-5
        if cuts.discards is not None:
            share = float(cuts.discards(states).sum()) / total
            assert proposal.energy_kept == pytest.approx(max(0.0, 1 - share), abs=1e-6)


def test_cuts_of_linear_layers_and_exact_ones_are_the_best_possible() -> None:
    exact = {kind for kind in KINDS if (lambda b: b[1].cuts(b[0], b[2]).discards)(built(kind)) is None}
    assert exact == {"lru", "s5", "s5-both", "s4d", "linear-attention", "retnet", "gated"}


@pytest.mark.parametrize("kind", ["lru", "s4d"])
def test_a_cut_behind_the_gate_is_not_proposed(kind: str) -> None:
    layer, adapter, balanced = built(kind)
    cuts = adapter.cuts(layer, balanced)
    assert cuts.proposal(3, RankRule(states=3, min_reduction=0.5)) is None  # a quarter of four states
    assert cuts.proposal(2, RankRule(states=2, min_reduction=0.5)) is not None


@pytest.mark.parametrize(("kind", "other"), [("lru", "mamba"), ("mamba", "lru")])
def test_what_another_kind_of_layer_was_balanced_as_is_refused(kind: str, other: str) -> None:
    layer, adapter, _ = built(kind)
    with pytest.raises(InvalidSystemError, match="expected"):
        adapter.cuts(layer, built(other)[2])


class _Misread(LRUAdapter):
    """Writes another system than the one that was certified."""

    def plan(self, values: Mapping[str, Tensor], reduction: Reduction) -> Any:
        C = reduction.system.C * 1.5
        wrong = type(reduction.system)(reduction.system.lam, reduction.system.B, C, reduction.system.real_output)
        return super().plan(values, Reduction(wrong, reduction.left, reduction.right, reduction.certificates))


def test_a_layer_that_would_not_compute_the_certified_system_is_not_cut() -> None:
    layer = LRU(WIDTH, 8)
    adapter = _Misread()
    proposal = adapter.cuts(layer, adapter.balance(layer)).proposal(4, RankRule(states=4))
    assert proposal is not None
    assert proposal.change is None
    assert "rounding to the layer's dtype adds" in proposal.reason


class Doubled(LRU):
    """A layer of a user's own, with a parametrisation of its own."""


class DoubledAdapter(LRUAdapter):
    layer_type = Doubled
    uniform = True


def test_layers_that_share_one_size_all_stay_where_one_is_refused() -> None:
    register(DoubledAdapter())
    torch.manual_seed(0)
    model = nn.Sequential(Doubled(WIDTH, 8), Doubled(WIDTH, 8), S4D(WIDTH, 8))
    # The first layer's C is also another module's, so that it cannot be cut.
    outside = nn.Module()
    outside.register_parameter("C", model[0].get_parameter("C_re"))
    model.add_module("3", outside)
    before = {name: value.clone() for name, value in layer_values(model).items()}
    first, second, free = compressm.cutting.plan_reduction(model, RankRule(states=4)).report.layers
    assert [first.outcome, second.outcome, free.outcome] == ["refused", "refused", "cut"]
    assert first.reason == "C_re is also 3.C, which would change with it"
    assert second.reason == "0 was refused, and the layers of this model share one state dimension"
    assert (first.states_after, second.states_after, free.states_after) == (8, 8, 4)
    apart = compressm.cutting.plan_reduction(model, RankRule(states=4, per_layer=True)).report.layers
    assert [layer.outcome for layer in apart] == ["refused", "cut", "cut"]
    assert all(torch.equal(value, before[name]) for name, value in layer_values(model).items())
