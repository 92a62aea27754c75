"""Cuts of Mamba-3: moments against the recurrence's own outputs, pairs that stay together, and the authors' layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.adapters import Mamba3Adapter, MambaSSM3Adapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.adapters.mamba3 import units_of
from compressm.cutting.serving import Memory
from compressm.errors import UnsupportedModelError
from compressm.layers import LanguageModel, Mamba3
from compressm.layers.mamba3 import rotated, trapezoidal_scan
from compressm.observing.damage import selective_changes
from compressm.observing.masks import mask_gradients, masked_forward
from compressm.observing.over_data import gather
from compressm.theory.fisher import MaskFisher
from compressm.theory.rank_rule import RankRule
from compressm.theory.recurrence import balance_selective, first_states, moments
from compressm.theory.units import Units, select_units, select_units_by_fisher

ADAPTER = Mamba3Adapter()
CASES: dict[str, dict[str, Any]] = {
    "one input": {},
    "all pairs rotate": {"rope_fraction": 1.0},
    "groups, normalised": {"n_groups": 2, "out_norm": True},
    "three inputs": {"mimo_rank": 3},
    "two inputs, groups": {"mimo_rank": 2, "n_groups": 2, "rope_fraction": 1.0},
}


def build(options: dict[str, Any], states: int = 12) -> Mamba3:
    torch.manual_seed(0)
    layer = Mamba3(6, states, **{"head_dim": 3, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.dt_bias.add_(2)
    return layer


def hidden(seed: int = 1, batch: int = 3, length: int = 30) -> Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recurrence_outputs(layer: Mamba3, u: Tensor, kept: Tensor | None = None) -> Tensor:
    """What the queries read, times the factors that follow until the output, with all states or some of them."""
    t = layer.terms(u)
    angles, halves = t.turn.cumsum(1), layer.mimo_rank > 1
    mask = torch.ones(layer.d_state, dtype=u.dtype)
    if kept is not None:
        mask = torch.zeros_like(mask).index_fill(0, kept, 1.0)
    k, q = (rotated(one, angles, halves) for one in (t.keys, t.queries * mask))
    y = trapezoidal_scan(layer.inputs(t.x), k, q, t.log_decay, t.now, t.before)
    z = t.z[..., None, :]
    gain = F.silu(z * layer.mimo_z if halves else z) * layer.out_proj.weight.norm(dim=0).view(layer.n_heads, 1, -1)
    gain = gain if layer.norm is None else gain * layer.norm.weight.view(layer.n_heads, 1, -1)
    return (y * gain * (layer.mimo_o if halves else 1)).detach()


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_error_is_that_of_the_outputs_without_the_states(case: str) -> None:
    layer, u = build(CASES[case]), hidden()
    balancing = balance_selective(moments(ADAPTER.signals(layer, u)))
    assert float(balancing.moments.tokens) == 90
    units = units_of(layer.sizes)
    for states in range(units.least, 12, units.least):
        found = select_units(balancing, units, states)
        assert found.kept is not None
        whole, part = recurrence_outputs(layer, u), recurrence_outputs(layer, u, found.kept[0])
        error = float((whole - part).norm() / whole.norm())
        assert found.estimate.relative_error == pytest.approx(error, rel=1e-4)


def test_padding_does_not_count() -> None:
    layer, u = build({}), hidden()
    present = torch.ones(3, 30)
    present[1, 20:] = present[2, 1:] = 0
    cut = [moments(ADAPTER.signals(layer, u[row : row + 1, :n])) for row, n in enumerate((30, 20, 1))]
    summed = cut[0].plus(cut[1]).plus(cut[2]).tensors()
    found = moments(ADAPTER.signals(layer, u), present).tensors()
    assert summed.keys() == found.keys()
    for name, value in summed.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("selection", ["hankel", "gramians", "magnitude", "random", "means"])
@pytest.mark.parametrize("case", CASES)
def test_a_cut_keeps_whole_pairs_in_both_classes(case: str, selection: Any) -> None:
    layer, u = build(CASES[case]), hidden()
    balancing = balance_selective(moments(ADAPTER.signals(layer, u)))
    kept = ADAPTER.cuts(layer, balancing, selection).proposal(7, RankRule(states=7)).reduction.kept  # type: ignore[union-attr]
    assert kept is not None
    states = 6 if CASES[case].get("rope_fraction") == 1.0 else 4
    assert kept.shape == (layer.n_heads, states)
    assert bool((kept == kept[0]).all())
    pairs = kept[0] % 6 if layer.mimo_rank > 1 else kept[0] // 2
    numbers, counts = pairs.unique(return_counts=True)
    assert counts.tolist() == [2] * (states // 2)
    if states == 4:
        assert (numbers < 3).tolist() == [True, False]  # pairs 0, 1 and 2 rotate


@pytest.mark.parametrize("case", CASES)
def test_a_cut_layer_has_the_kept_entries_of_keys_and_queries(case: str) -> None:
    layer, u = build(CASES[case]), hidden()
    smaller = copy.deepcopy(layer)
    balancing = balance_selective(moments(ADAPTER.signals(layer, u)))
    proposal = ADAPTER.cuts(layer, balancing).proposal(8, RankRule(states=8))
    assert proposal.change is not None
    assert proposal.reduction is not None
    kept = proposal.reduction.kept[0]  # type: ignore[union-attr]
    write(smaller, proposal.change)
    assert (smaller.d_state, smaller.sizes.angles) == (8, 8 * layer.sizes.angles // 12)
    before, after = layer.terms(u), smaller.terms(u)
    torch.testing.assert_close(after.turn, before.turn[..., turning(layer, kept)])
    for name in ("x", "z", "log_decay", "now", "before"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))
    begin = 2 * layer.d_inner
    rows = layer.in_proj(u)[..., begin : begin + 2 * layer.sizes.keys].unflatten(-1, (2, layer.mimo_rank, -1, 12))
    for i, (name, vectors, bias) in enumerate((("keys", "B", layer.B_bias), ("queries", "C", layer.C_bias))):
        raw = rows[..., i, :, :, :]
        unit = F.rms_norm(raw, (12,), None, 1e-5)
        scale = (unit[..., kept].square().mean() / unit.square().mean()).sqrt()
        part = F.rms_norm(raw[..., kept], (8,), None, 1e-5)
        weight = layer.get_parameter(f"{vectors}_norm.weight")[kept]
        expected = (part * weight * scale).transpose(2, 3).repeat_interleave(layer.n_heads // layer.n_groups, 2)
        torch.testing.assert_close(getattr(after, name), expected + bias[..., kept], rtol=1e-5, atol=1e-6)


def turning(layer: Mamba3, kept: Tensor) -> list[int]:
    """The angles of the kept pairs."""
    first = [int(i) for i in kept if (i < layer.d_state // 2 if layer.mimo_rank > 1 else i % 2 == 0)]
    numbers = first if layer.mimo_rank > 1 else [i // 2 for i in first]
    return [number for number in numbers if number < layer.sizes.angles]


def test_states_that_nobody_writes_are_cut_without_an_error() -> None:
    layer, u = build({}), hidden()
    with torch.no_grad():  # pairs 0 and 5: keys of zero, and so the others are scaled alike by the norm
        rows = layer.in_proj.weight[2 * layer.d_inner :]
        for state in (0, 1, 10, 11):
            rows[state] = rows[12 + state] = 0
            layer.B_bias[..., state] = layer.C_bias[..., state] = 0
        before = layer(u)
    compressm.compress(layer, states=8, data=[u])
    assert layer.d_state == 8
    torch.testing.assert_close(layer(u), before, rtol=1e-3, atol=1e-5 * float(before.detach().abs().max()))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99), st.data())
def test_units_are_chosen_such_that_no_exchange_is_better(
    classes: int, count: int, size: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = classes * count * size
    units = Units(torch.randperm(n, generator=generator).view(classes, count, size))
    root = torch.randn(n, n, dtype=torch.float64, generator=generator)
    cost, stay = root @ root.mT, data.draw(st.integers(1, count))
    kept = units.chosen(cost, stay * units.least)

    def lost(states: set[int]) -> float:
        gone = torch.tensor([float(i not in states) for i in range(n)], dtype=torch.float64)
        return float(gone @ cost @ gone)

    chosen = set(kept.tolist())
    inside = [[set(unit) <= chosen for unit in each] for each in units.members.tolist()]
    assert [sum(each) for each in inside] == [stay] * classes
    assert len(chosen) == stay * units.least
    best = lost(chosen)
    for each, flags in zip(units.members.tolist(), inside, strict=True):
        for i, j in ((i, j) for i in range(count) for j in range(count) if flags[i] and not flags[j]):
            assert best <= lost(chosen - set(each[i]) | set(each[j])) + 1e-6 * float(cost.trace())


@pytest.mark.parametrize("case", CASES)
def test_the_masks_gradients_are_those_of_the_layer_without_pairs(case: str) -> None:
    """The derivative along a pair's mask, numerically, and the damage that the Fisher matrix predicts."""
    layer, u = build(CASES[case]), hidden(batch=2, length=12)
    forward: Any = masked_forward
    weights = torch.randn(2, 12, 6, dtype=torch.float64)
    gradient = mask_gradients(layer, ADAPTER, (u,), {}, weights)
    assert gradient.shape == (2, 1, 12, 12)
    for pair in units_of(layer.sizes).members.flatten(0, 1).tolist():
        step = torch.zeros(2, 1, 12, dtype=torch.float64)
        step[..., pair] = 1e-6
        up, down = (forward(layer, 1 + sign * step)(u) for sign in (1, -1))
        expected = ((up - down) * weights).sum((1, 2)) / 2e-6
        found = gradient.diagonal(dim1=-2, dim2=-1)[:, 0, pair].sum(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_fisher_matrix_keeps_what_the_loss_needs() -> None:
    layer, u = build({}), hidden()
    balancing = balance_selective(moments(ADAPTER.signals(layer, u)))
    units = units_of(layer.sizes)
    gradients = 1e-3 * torch.randn(50, 1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients[..., [2, 3, 8, 9]] *= 1e3  # pair 1 turns, pair 4 does not
    found = select_units_by_fisher(MaskFisher.of(gradients), units, 4, balancing)
    assert found.kept is not None
    assert found.kept[0].tolist() == [2, 3, 8, 9]
    gone = [i for i in range(12) if i not in (2, 3, 8, 9)]
    expected = float(gradients[:, 0, gone].sum(1).square().mean()) / 2
    alike = float(gradients[:, 0, gone].square().sum(1).mean()) / 2  # where all entries off the diagonal are shrunk
    predicted = found.estimate.predicted_damage  # type: ignore[attr-defined]
    assert min(expected, alike) * 0.99 <= predicted <= max(expected, alike) * 1.01


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_change_of_the_loss_is_that_of_the_masks(case: str) -> None:
    """To first order, also where a layer has several heads, which share one mask."""
    layer, u = build(CASES[case]), hidden(batch=2, length=12)
    weights = torch.randn(2, 12, 6, dtype=torch.float64)
    gradients = mask_gradients(layer, ADAPTER, (u,), {}, weights).detach()
    balancing = balance_selective(moments(ADAPTER.signals(layer, u)))
    reduction = select_units(balancing, units_of(layer.sizes), 8)
    mask = torch.zeros(2, 1, 12, dtype=torch.float64)
    mask[..., reduction.kept[0]] = 1  # type: ignore[index]

    def loss(share: float) -> Tensor:
        forward = masked_forward(layer, 1 - share * (1 - mask))
        assert forward is not None
        return (forward(u) * weights).sum((1, 2))

    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    torch.testing.assert_close(selective_changes(gradients, reduction), expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_cut_by_the_loss_tries_every_way_and_says_so() -> None:
    torch.manual_seed(0)
    model = LanguageModel(30, d_model=8, d_state=16, n_layers=2, layer="mamba3", head_dim=4)
    tokens = torch.randint(0, 30, (16, 20))
    report = compressm.compress(model, states=8, data=[tokens], loss="classification")
    assert {pick for pick, _ in report.picks} == {"fisher", "saliency", "moments", "powers"}
    assert set(report.state_dims.values()) == {8}


def test_memory_is_that_of_the_carried_state() -> None:
    for options in CASES.values():
        layer = build(options).float()
        model = nn.Sequential(layer)
        carried = sum(part.numel() * part.itemsize for part in layer.initial_state(1))
        assert Memory.of(model).checkpoint == carried
        report = compressm.compress(model, states=8, data=[hidden().float()])
        assert report.serving is not None
        assert ", last token " in report.serving.lines()[1]
        carried = sum(part.numel() * part.itemsize for part in layer.initial_state(1))
        assert Memory.of(model).checkpoint == carried


def test_what_pairs_do_not_allow_is_refused() -> None:
    layer = build({})
    with pytest.raises(UnsupportedModelError, match="must be a multiple of 4"):
        ADAPTER.resized(layer, 6)
    with pytest.raises(UnsupportedModelError, match="in pairs at fixed places"):
        compressm.sort_states(nn.Sequential(layer), [hidden()])


@pytest.mark.parametrize("case", ["one input", "three inputs"])
@pytest.mark.parametrize("wrong", ["half a pair", "other states in a head", "only pairs that rotate"])
def test_a_plan_for_states_that_cannot_stay_is_refused(case: str, wrong: str) -> None:
    layer = build(CASES[case])
    members = units_of(layer.sizes).members
    right = torch.cat([members[0, 1], members[1, 2]]).sort().values
    made = first_states(12, 4, layer.n_heads)
    kept = right.expand(layer.n_heads, -1).clone()
    ADAPTER.plan(layer_values(layer), replace(made, kept=kept))
    if wrong == "half a pair":
        kept[:, 0] = members[0, 0, 0]
    elif wrong == "other states in a head":
        kept[-1] = torch.cat([members[0, 0], members[1, 2]]).sort().values
    else:
        kept[:] = torch.cat([members[0, 0], members[0, 1]]).sort().values
    with pytest.raises(UnsupportedModelError, match="keeps whole pairs of states"):
        ADAPTER.plan(layer_values(layer), replace(made, kept=kept))


class Theirs(Mamba3):
    """Our layer, whose parameters are those of the authors', with the attributes of theirs."""

    def theirs(self) -> Theirs:
        s = self.sizes
        for name, value in {
            "nheads": s.heads, "num_bc_heads": s.groups, "num_rope_angles": s.angles, "is_mimo": s.halves,
            "split_tensor_size": 2 * s.angles, "rotary_dim_divisor": s.states // s.angles, "A_floor": s.rate_floor,
        }.items():  # fmt: skip
            setattr(self, name, value)
        return self

    @property
    def d_state(self) -> int:
        return self.told

    @d_state.setter
    def d_state(self, states: int) -> None:
        self.told = states


@pytest.mark.parametrize("case", CASES)
def test_the_authors_layer_is_read_and_cut_as_ours(case: str) -> None:
    layer, u = build(CASES[case]), hidden()
    theirs = object.__new__(Theirs)
    theirs.__dict__.update(copy.deepcopy(layer).__dict__)
    theirs.told = 12
    theirs.theirs()
    adapter = MambaSSM3Adapter("mamba_ssm.modules.mamba3.Mamba3")
    assert adapter.state_dim(theirs) == 12
    ours, found = ADAPTER.signals(layer, u), adapter.signals(theirs, u)
    for name in ("x", "step", "B", "C", "gain", "squares"):
        assert torch.equal(getattr(found, name), getattr(ours, name)), name
    balancing = balance_selective(moments(found))
    both = (ADAPTER, layer), (adapter, theirs)
    expected, change = (a.cuts(one, balancing).proposal(8, RankRule(states=8)).change for a, one in both)
    assert change is not None
    assert expected is not None
    for name, value in expected.values().items():
        assert torch.equal(change.values()[name], value), name
    write(theirs, change)
    assert (theirs.told, theirs.num_rope_angles, theirs.split_tensor_size) == (8, *angles_of(8, layer))
    assert theirs.in_proj.out_features == theirs.in_proj.weight.shape[0]
    assert adapter.sizes(theirs).angles == theirs.sizes.angles  # by its attributes, and by its shapes


def angles_of(states: int, layer: Mamba3) -> tuple[int, int]:
    angles = states * layer.sizes.angles // 12
    return angles, 2 * angles


def test_a_layer_whose_angles_do_not_fit_its_states_is_refused() -> None:
    layer = build({})
    theirs = object.__new__(Theirs)
    theirs.__dict__.update(layer.__dict__)
    theirs.told = 12
    theirs.theirs()
    theirs.num_rope_angles = 2
    with pytest.raises(UnsupportedModelError, match="d_state=12 and 2 angles"):
        MambaSSM3Adapter("mamba_ssm.modules.mamba3.Mamba3").state_dim(theirs)


def test_it_is_found_in_models_and_trains_on_after_a_cut() -> None:
    torch.manual_seed(0)
    model = LanguageModel(30, d_model=8, d_state=16, n_layers=2, layer="mamba3", head_dim=4, mimo_rank=2)
    assert [type(adapter) for _, adapter in find_layers(model).values()] == [Mamba3Adapter] * 2
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    tokens = (torch.arange(20) + torch.arange(16)[:, None]) % 30

    def train(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        return float(loss.detach())  # pyright: ignore[reportPossiblyUnboundVariable]

    first = train(30)
    assert compressm.compress(model, states=8, data=[tokens], optimizer=optimizer).cut
    assert train(60) < first
    assert gather(model, [tokens])["blocks.0.ssm"].squares.shape == (2, 8)  # type: ignore[union-attr]
    assert layer_values(model.get_submodule("blocks.0.ssm"))["B_bias"].shape == (4, 2, 8)
