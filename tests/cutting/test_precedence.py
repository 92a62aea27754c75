"""What comes first where a rule, a multiple, a shared dimension and a gate meet, in every combination."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.cutting import plan_reduction, state_dims
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.spectrum import balance_layers
from compressm.errors import InvalidRankRuleError
from compressm.layers import LRU, S4D, S5, LinearAttention, Mamba, Mamba2, RecurrentBlock
from compressm.observing.over_data import gather
from compressm.theory.possible_sizes import check_sizes
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import choose_ranks
from compressm.training.compressor import Compressor

RULES: list[dict[str, Any]] = [
    {"tolerance": 0.1}, {"max_error": 0.05}, {"states": 10}, {"fraction": 0.6}, {"total_states": 30},
    {"tolerance": 0.02}, {"states": 13}, {"fraction": 1.0}, {"total_states": 41}, {"total_states": 1000},
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    dict(zip(("multiple_of", "per_layer", "min_reduction", "max_reduction"), values, strict=True))
    for values in product((1, 3, 8), (False, True), (0.0, 0.3), (1.0, 0.5))
]
LAYERS: dict[str, dict[str, int]] = {
    "equal": {"a": 16, "b": 16, "c": 16},
    "different": {"a": 16, "b": 24, "c": 10},
    "small": {"a": 5, "b": 16, "c": 5},
    "one": {"a": 20},
}


def energies(dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Decreasing spectra, flatter from layer to layer; two systems in the last one."""
    found = {
        name: torch.logspace(0, -1 - 3 / (index + 1), n, dtype=torch.float64) / n
        for index, (name, n) in enumerate(dims.items())
    }
    last = next(reversed(found))
    found[last] = torch.stack([found[last], found[last] ** 1.5])
    return found


def discarded(energy: torch.Tensor, states: int, worse: float) -> np.ndarray:
    """What a cut discards in each system: the smallest energies, or by a factor more where states are selected."""
    return worse * energy.numpy()[..., states:].sum(-1) * (states < energy.shape[-1])


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("worse", [1.0, 1.7])
@pytest.mark.parametrize("shared", [False, True])
def test_every_combination_follows_the_order_of_precedence(layers: str, worse: float, shared: bool) -> None:
    present = LAYERS[layers]
    spectra = energies(present)
    made: dict[str, Callable[[int], torch.Tensor]] = {
        name: lambda states, e=e: torch.as_tensor(discarded(e, states, worse)) for name, e in spectra.items()
    }
    tried = 0
    for wanted, options in product(RULES, OPTIONS):
        if wanted.get("total_states", 1000) < options["multiple_of"]:
            continue
        rule = RankRule(**wanted, **options)
        alike = list(present) if shared and not rule.per_layer else []
        try:
            ranks = choose_ranks(spectra, rule, discards=made if worse > 1 else None, alike=alike)
        except InvalidRankRuleError:
            assert rule.total_states is not None
            units = [list(present)] if alike else [[name] for name in present]
            assert sum(len(u) * min(rule.multiple_of, *(present[n] for n in u)) for u in units) > rule.total_states
            continue
        groups = [alike] if alike else [[name] for name in present]
        for group in groups:
            hold_to_the_order(rule, {n: present[n] for n in group}, {n: ranks[n] for n in group}, spectra, worse)
        if rule.total_states is not None:
            hold_to_the_budget(rule, groups, present, ranks)
        tried += 1
    assert tried > 0.8 * len(RULES) * len(OPTIONS)


def sizes(present: Mapping[str, int], rule: RankRule) -> list[int]:
    """Every size that a group of layers may be given, from the definition."""
    smallest = min(present.values())
    return [
        size
        for size in range(1, smallest + 1)
        if (size % rule.multiple_of == 0 or size == smallest)
        and all(n - size <= rule.max_reduction * n + 1e-9 for n in present.values())
    ]


def hold_to_the_order(
    rule: RankRule, present: dict[str, int], ranks: dict[str, int], spectra: dict[str, torch.Tensor], worse: float
) -> None:
    kept_all, possible = ranks == present, sizes(present, rule)
    if not kept_all:
        assert len(set(ranks.values())) == 1  # one group, one size
        assert next(iter(ranks.values())) in possible
    if rule.guarantees_error:
        good = [size for size in possible if all(keeps(rule, spectra[n], size, worse) for n in present)]
        assert kept_all if not good else ranks == dict.fromkeys(present, min(good))
    elif rule.total_states is None:
        limits = {n: rule.states or max(1, int(rule.fraction * present[n] + 1e-9)) for n in present}  # type: ignore[operator]
        within = [size for size in possible if size <= min(limits.values())]
        if all(present[n] <= limits[n] for n in present) or not possible:
            assert kept_all
        else:
            assert ranks == dict.fromkeys(present, max(within, default=min(possible)))


def keeps(rule: RankRule, energy: torch.Tensor, states: int, worse: float) -> bool:
    lost = discarded(energy, states, worse)
    if rule.tolerance is not None:
        return bool((lost <= rule.tolerance * energy.numpy().sum(-1) * (1 + 1e-12)).all())
    assert rule.max_error is not None
    return bool((2 * lost <= rule.max_error * (1 + 1e-12)).all())


def hold_to_the_budget(rule: RankRule, groups: list[list[str]], present: dict[str, int], ranks: dict[str, int]) -> None:
    possible = [sizes({n: present[n] for n in group}, rule) for group in groups]
    least = sum(
        len(group) * min(s) if s else sum(present[n] for n in group) for group, s in zip(groups, possible, strict=True)
    )
    total = sum(ranks.values())
    assert rule.total_states is not None
    assert total <= max(rule.total_states, least)  # max_reduction alone may ask for more than the budget
    for group, s in zip(groups, possible, strict=True):  # no larger size of any group fits any more
        larger = [size for size in s if size > ranks[group[0]]]
        if larger and ranks[group[0]] in s:
            assert total + len(group) * (min(larger) - ranks[group[0]]) > rule.total_states


WIDTH = 4


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "state_size": 16, "num_hidden_layers": 2}
    if name == "Mamba2":
        options |= {"num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 8}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options)).eval()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "lru": lambda: nn.Sequential(*(LRU(WIDTH, 16, r_min=0.0, r_max=0.9) for _ in range(3))),
    "s5 and s4d": lambda: nn.Sequential(S5(WIDTH, 16), S4D(WIDTH, 12), S5(WIDTH, 20, bidirectional=True)),
    "exact selective": lambda: nn.Sequential(*(LinearAttention(WIDTH, 16, 2) for _ in range(2))),
    "selected": lambda: nn.Sequential(Mamba(WIDTH, 16), Mamba2(WIDTH, 12, head_dim=4), RecurrentBlock(WIDTH, 16, 1)),
    "shared": lambda: hugging_face("Mamba"),
    "shared, groups": lambda: hugging_face("Mamba2"),
}


@pytest.mark.parametrize("options", [OPTIONS[::5], pytest.param(OPTIONS, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind_keep_to_it(kind: str, options: list[dict[str, Any]]) -> None:
    torch.manual_seed(3)
    model = KINDS[kind]()
    shared = kind.startswith("shared")
    batch = torch.randint(0, 32, (2, 24)) if shared else torch.randn(2, 24, WIDTH)
    balancings = balance_layers(model, moments=gather(model, [batch]))
    present = state_dims(model)
    cuts = MadeCuts(find_layers(model), balancings, "hankel")
    for wanted, option in product(RULES[:5], options):
        rule = RankRule(**wanted, **option)
        try:
            report = plan_reduction(model, rule, balancings=balancings, cuts=cuts).report
        except InvalidRankRuleError as error:
            assert f"total_states={rule.total_states} is less than" in str(error)  # noqa: PT017 - some are refused
            continue
        after = report.state_dims
        for layer in report.layers:
            n, r = layer.states_before, layer.states_after
            assert layer.outcome in ("cut", "kept", "refused")
            if layer.outcome != "cut":
                assert r == n
                continue
            assert r % rule.multiple_of == 0 or r == min(present.values())
            assert n - r <= rule.max_reduction * n
            assert n - r >= rule.min_reduction * n
            if rule.states is not None and rule.max_reduction == 1:
                assert r <= rule.states
            if rule.fraction is not None and rule.max_reduction == 1:
                assert r <= max(rule.fraction * n, rule.multiple_of)  # the latter is refused by `compress`
            if rule.tolerance is not None:
                assert layer.energy_kept is not None
                assert layer.energy_kept >= 1 - rule.tolerance - 1e-9
        if shared and not rule.per_layer:
            assert len(set(after.values())) == 1
        if rule.total_states is not None and rule.max_reduction == 1 and rule.min_reduction == 0:
            refused = any(layer.outcome == "refused" for layer in report.layers)
            assert refused or sum(after.values()) <= rule.total_states


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"total_states": 27}, 8),  # 13 each before, which is no multiple
        ({"total_states": 16}, 8),
        ({"states": 10}, 8),  # 16 before, which is more than at most 10
        ({"fraction": 0.6}, 8),
        ({"states": 16}, 16),
        ({"tolerance": 1e-12}, 16),
    ],
)
def test_layers_that_share_a_dimension_get_a_multiple_within_the_limit(wanted: dict[str, Any], expected: int) -> None:
    torch.manual_seed(0)
    model = hugging_face("Mamba")
    report = compressm.compress(model, multiple_of=8, data=[torch.randint(0, 32, (2, 24))], **wanted)
    assert set(report.state_dims.values()) == {expected}


def test_a_limit_that_holds_no_multiple_is_refused_before_anything_is_done() -> None:
    torch.manual_seed(0)
    for name in ("states", "total_states"):
        with pytest.raises(
            InvalidRankRuleError, match=f"{name}=5 is an upper limit, and less than multiple_of=8: raise"
        ):
            RankRule(**{name: 5}, multiple_of=8)  # type: ignore[arg-type]
    model = nn.Sequential(LRU(4, 16), LRU(4, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = copy.deepcopy(model.state_dict())
    for wanted, message in (
        ({"total_states": 12}, "total_states=12 is less than the 16 states that 2 layers keep at least with multiple"),
        ({"fraction": 0.25}, "fraction=0.25 of the 16 states of '0' is 4, less than multiple_of=8: raise fraction"),
    ):
        with pytest.raises(InvalidRankRuleError, match=message):
            compressm.compress(model, multiple_of=8, **wanted)  # type: ignore[arg-type]
        with pytest.raises(InvalidRankRuleError, match=message):
            Compressor(model, optimizer, 100, multiple_of=8, **wanted)  # type: ignore[arg-type]
        with pytest.raises(InvalidRankRuleError, match=message):
            check_sizes(RankRule(multiple_of=8, **wanted), {"0": 16, "1": 16})  # type: ignore[arg-type]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(InvalidRankRuleError, match="total_states=30 is less than the 32 states that 2 layers"):
        compressm.compress(hugging_face("Mamba"), total_states=30, multiple_of=16, data=[torch.ones(1, 4).long()])


@pytest.mark.parametrize("make", [lambda: LRU(2, 24, r_min=0.0, r_max=0.9), lambda: S5(2, 24), lambda: S4D(2, 24)])
def test_a_linear_layer_is_filled_up_to_the_multiple_by_states_that_can_learn(make: Callable[[], nn.Module]) -> None:
    # A left-over real eigenvalue takes a whole state: fewer than asked for may fit, and 7 is no multiple of 8.
    filled, layer = 0, None
    for seed in range(12):
        torch.manual_seed(seed)
        layer: Any = make()
        ((_, adapter),) = find_layers(layer).values()
        free = copy.deepcopy(layer)
        compressm.compress(free, states=16)
        report = compressm.compress(layer, states=17, multiple_of=8).layers[0]
        assert (report.outcome, report.states_after) == ("cut", 16)
        u = torch.randn(2, 40, 2)
        torch.testing.assert_close(layer(u), free(u), rtol=1e-4, atol=1e-4)  # they change nothing
        if (idle := 16 - adapter.state_dim(free)) > 0 and not isinstance(layer, S4D):
            silent = (layer.C_re == 0).all(0) & (layer.C_im == 0).all(0)
            assert int(silent.sum()) == idle
            layer(u).square().sum().backward()
            assert bool((layer.C_re.grad[:, silent] != 0).any())
            filled += 1
    assert filled > 0 or isinstance(layer, S5 | S4D)


def test_while_training_every_size_on_the_way_is_a_multiple() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LRU(4, 64), LRU(4, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for wanted in ({"states": 16}, {"fraction": 0.25}, {"total_states": 40}):
        one, compressor = copy.deepcopy(model), None
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-3)
        compressor = Compressor(one, optimizer, 40, window=0.2, cuts=4, multiple_of=8, **wanted)  # type: ignore[arg-type]
        for _ in range(8):
            optimizer.zero_grad()
            one(torch.randn(2, 12, 4)).square().mean().backward()
            optimizer.step()
            if compressor.step() is not None:
                assert all(states % 8 == 0 for states in compressor.state_dims.values())
        assert sum(compressor.state_dims.values()) in ((32,) if "total_states" not in wanted else (40,))


def test_a_shared_dimension_never_breaks_the_promise_of_a_larger_layer() -> None:
    # Layers that were cut apart before: the one of 4 states bounds what all can share, and the other needs 12.
    spectra = {"a": torch.ones(4).double(), "b": torch.ones(16).double()}
    rule = RankRule(tolerance=0.3)
    assert choose_ranks(spectra, rule) == {"a": 3, "b": 12}
    assert choose_ranks(spectra, rule, alike=["a", "b"]) == {"a": 4, "b": 16}
    assert choose_ranks(spectra, replace(rule, tolerance=0.8), alike=["a", "b"]) == {"a": 4, "b": 4}
