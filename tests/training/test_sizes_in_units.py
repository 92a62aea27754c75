"""Layers whose state dimension must be a multiple of a number, such as Mamba-3, under every rule of a `Compressor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import compressm
from compressm.cutting import state_dims
from compressm.cutting.fitting import fit_any_size
from compressm.cutting.sizes import checked_sizes
from compressm.errors import InvalidRankRuleError
from compressm.layers import LanguageModel
from compressm.theory.rank_rule import RankRule

STEPS = 24


def model(states: int | list[int] = 16, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(20, 16, states, n_layers=2, layer="mamba3", **{"head_dim": 8, **options})


def trained(net: LanguageModel, **rule: Any) -> compressm.Compressor:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    compressor = compressm.Compressor(net, optimizer, STEPS, **rule)
    for _ in range(STEPS):
        tokens = torch.randint(20, (4, 12), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        compressor.step()
    return compressor


@pytest.mark.parametrize(
    ("rule", "at_most"),
    [
        ({"states": 7}, 4),
        ({"states": 8, "gramians": "loss"}, 8),
        ({"fraction": 0.6}, 8),
        ({"states": 9, "per_layer": True}, 8),
        ({"states": 13, "multiple_of": 3}, 12),
        ({"tolerance": 0.3}, 12),
        ({"max_loss": 0.5, "gramians": "loss"}, 12),
        ({"max_error": 1000.0}, 12),
        ({"states": 8, "cuts": 1}, 8),
    ],
)
def test_every_rule_ends_at_whole_units(rule: dict[str, Any], at_most: int) -> None:
    net = model()
    compressor = trained(net, **rule)
    dims = state_dims(net)
    assert dims == dict(compressor.state_dims)
    assert all(n % 4 == 0 and 4 <= n <= at_most for n in dims.values())
    if "states" in rule or "fraction" in rule:
        assert set(dims.values()) == {at_most}
    for event in compressor.history:
        for layer in event.to_dict()["layers"]:
            assert layer["states_before"] % 4 == layer["states_after"] % 4 == 0


def test_a_budget_over_layers_is_kept() -> None:
    for gramians in ("white", "loss"):
        net = model([16, 8])
        trained(net, total_states=14, gramians=gramians)
        assert sorted(state_dims(net).values()) == [4, 8]


def test_where_all_pairs_rotate_sizes_are_even() -> None:
    net = model(16, rope_fraction=1.0, mimo_rank=2)
    trained(net, states=7)
    assert set(state_dims(net).values()) == {6}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"states": 2}, "states=2 is an upper limit, and there is no size of 'blocks.0.ssm' below 4: ask for 4, 8, 12"),
        ({"fraction": 0.2}, "fraction=0.2 is an upper limit, and there is no size"),
        ({"states": 6, "multiple_of": 3}, "no size of 'blocks.0.ssm' below 12"),
        ({"total_states": 6}, "total_states=6 is less than the 8 states that 2 layers keep at least"),
    ],
)
def test_a_limit_below_a_unit_is_refused_at_construction(rule: dict[str, Any], message: str) -> None:
    net = model()
    with pytest.raises(InvalidRankRuleError, match=message):
        compressm.Compressor(net, torch.optim.AdamW(net.parameters()), STEPS, **rule)
    with pytest.raises(InvalidRankRuleError, match=message):
        compressm.compress(net, data=[torch.randint(20, (2, 8))], **rule)


def test_a_layer_of_one_unit_stays_as_it_is() -> None:
    net = model([16, 4])
    trained(net, states=8)
    assert list(state_dims(net).values()) == [8, 4]


def test_a_target_takes_sizes_that_are_both() -> None:
    net = model(64, head_dim=16)
    assert checked_sizes(net, RankRule(states=40, target="mamba_ssm")) == dict.fromkeys(
        ("blocks.0.ssm", "blocks.1.ssm"), (16, 32, 64)
    )
    compressm.compress(net, states=40, target="mamba_ssm", data=[torch.randint(20, (2, 8))])
    assert set(state_dims(net).values()) == {32}


def test_cut_weights_are_loaded_into_a_larger_model(tmp_path: Path) -> None:
    net, larger, tokens = model(), model(), torch.randint(20, (2, 9))
    trained(net, states=8)
    compressm.save(net, tmp_path / "it")
    assert torch.equal(compressm.load(tmp_path / "it")(tokens), net(tokens))
    fit_any_size(larger)
    larger.load_state_dict(net.state_dict())
    assert state_dims(larger) == state_dims(net)
    assert torch.equal(larger(tokens), net(tokens))
