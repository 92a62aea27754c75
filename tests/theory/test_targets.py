"""Sizes for a target: what it refuses is never chosen, under every rule; limits and promises still hold."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.errors import InvalidRankRuleError
from compressm.theory.geometry import Geometry
from compressm.theory.possible_sizes import check_sizes
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import choose_ranks
from compressm.theory.targets import ONE_SIZE, TABLE, Target, check_target, legal_sizes, parallel_sizes, takers, takes

MAMBA2 = Geometry("ssd", 128, 64 * 80, groups=1, heads=80, convolved=64 * 80 + 2 * 128, window=4)
QWEN3_NEXT = Geometry("delta", 128, 32 * 128, groups=16, heads=32, convolved=8192, window=4)
GEOMETRIES = {
    "s6": Geometry("s6", 64, 1536, heads=1536, convolved=1536, window=4),
    "ssd": MAMBA2,
    "ssd in groups": Geometry("ssd", 96, 512, groups=8, heads=8, convolved=512 + 16 * 96, window=4),
    "delta": QWEN3_NEXT,
    "kda": Geometry("kda", 128, 4096, groups=32, heads=32, convolved=12288, window=4),
}


@pytest.mark.parametrize("target", get_args(Target))
@given(data=st.data())
def test_a_size_that_a_target_refuses_is_never_chosen(target: Target, data: st.DataObject) -> None:
    geometry = data.draw(st.sampled_from(list(GEOMETRIES.values())))
    count, n = data.draw(st.integers(1, 3)), geometry.states
    names = [f"layer{i}" for i in range(count)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    decay = data.draw(st.floats(0.01, 1))
    energies = {
        name: (torch.rand(n, generator=generator) * torch.exp(-decay * torch.arange(n))).sort(descending=True).values
        for name in names
    }
    rule_of: dict[str, Any] = data.draw(
        st.one_of(
            st.fixed_dictionaries({"states": st.integers(1, n)}),
            st.fixed_dictionaries({"fraction": st.floats(0.01, 1)}),
            st.fixed_dictionaries({"tolerance": st.floats(0, 0.99)}),
            st.fixed_dictionaries({"max_error": st.floats(0, 50)}),
            st.fixed_dictionaries({"total_states": st.integers(count, count * n)}),
            st.fixed_dictionaries({"max_loss": st.floats(0, 1)}),
        )
    )
    multiple, most = data.draw(st.sampled_from([1, 1, 3, 8])), data.draw(st.sampled_from([1.0, 0.5]))
    alike = names if target in ONE_SIZE or data.draw(st.booleans()) else []
    damages = None
    if "max_loss" in rule_of:
        damages = {name: torch.cat([one.flip(0).cumsum(0).flip(0), torch.zeros(1)]) for name, one in energies.items()}
    present = dict.fromkeys(names, n)
    try:
        rule = RankRule(**rule_of, target=target, multiple_of=multiple, max_reduction=most)
        legal = check_target(target, dict.fromkeys(names, geometry))
        check_sizes(rule, present, alike, legal)
    except InvalidRankRuleError as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert "\n" not in refused
        return
    ranks = choose_ranks(energies, rule, alike=alike, damages=damages, legal=legal)
    for name, states in ranks.items():
        assert states == n or takes(target, geometry, states), f"{name}: {states}"
        assert n - states <= most * n
    if alike:
        assert len(set(ranks.values())) == 1
    if most == 1.0 and "states" in rule_of and any(r < n for r in ranks.values()):
        assert max(ranks.values()) <= rule_of["states"]
    if most == 1.0 and "total_states" in rule_of:
        assert sum(ranks.values()) <= max(rule_of["total_states"], 0)


@pytest.mark.parametrize(
    ("target", "geometry", "expected"),
    [
        ("flashinfer", MAMBA2, (64, 96, 128)),
        ("llama.cpp", MAMBA2, (128,)),
        ("llama.cpp", GEOMETRIES["s6"], (16,)),
        ("mamba_ssm", Geometry("ssd", 12, 24, heads=3, convolved=48, window=4), (4, 8, 12)),
        ("llama.cpp", QWEN3_NEXT, (128,)),
        ("vllm", Geometry("delta", 300, 64, convolved=0), tuple(range(1, 257))),
        ("vllm", GEOMETRIES["kda"], (128,)),
        ("sglang", Geometry("s6", 16, 64), ()),
        ("transformers", Geometry("lti", 16, 2), ()),
    ],
)
def test_legal_sizes_worked_out_by_hand(target: Target, geometry: Geometry, expected: tuple[int, ...]) -> None:
    assert legal_sizes(target, geometry) == expected


def test_a_target_that_cannot_be_met_is_refused_in_one_line() -> None:
    with pytest.raises(InvalidRankRuleError, match=r"'llama.cpp' takes on CUDA N in 128.*'mixer' with 128 states"):
        check_target("llama.cpp", {"mixer": MAMBA2})
    with pytest.raises(InvalidRankRuleError, match="no known kernel for its recurrence \\(lti\\)"):
        check_target("vllm", {"lru": Geometry("lti", 16, 2)})
    with pytest.raises(InvalidRankRuleError, match="takes one state dimension for all layers"):
        RankRule(states=4, target="vllm", per_layer=True)
    with pytest.raises(InvalidRankRuleError, match="target must be one of"):
        RankRule(states=4, target="tensorrt")  # type: ignore[arg-type]
    legal = check_target("flashinfer", {"mixer": MAMBA2})
    with pytest.raises(InvalidRankRuleError, match=r"states=63 is an upper limit.*below 64: ask for 64, 96"):
        check_sizes(RankRule(states=63, target="flashinfer"), {"mixer": 128}, legal=legal)
    sizes = dict.fromkeys("ab", legal["mixer"])
    with pytest.raises(InvalidRankRuleError, match="total_states=100 is less than the 128"):
        check_sizes(RankRule(total_states=100, target="flashinfer"), {"a": 128, "b": 128}, legal=sizes)


def test_who_takes_what_and_on_how_many_gpus() -> None:
    assert "flashinfer" in takers(MAMBA2, 64)
    assert "flashinfer" not in takers(MAMBA2, 65)
    assert "transformers" in takers(MAMBA2, 65)
    assert parallel_sizes(MAMBA2) == (1, 2, 4, 8, 16)  # 80 heads, one group
    assert parallel_sizes(GEOMETRIES["ssd in groups"]) == (1, 2, 4, 8)


def test_every_row_names_its_source_and_date() -> None:
    for row in TABLE:
        assert "/" in row.source
        assert "2026" in row.date
        assert row.kinds
