"""8-bit states, held against formats by definition, and against models that read their tokens at once."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.cutting.rounded_state import check_roundable, round_states, rounded, state_bytes
from compressm.cutting.sizes import geometries
from compressm.errors import ConfigError, InvalidRankRuleError, UnsupportedModelError
from compressm.layers import LanguageModel
from compressm.observing.inputs import Call

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def own(layer: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(40, 16, 8, layer=layer, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def model_of(where: str, name: str) -> Any:
    if where == "own":
        return own(name, **({"n_heads": 2} if name == "delta_net" else {"head_dim": 8} if name == "mamba2" else {}))
    pytest.importorskip("transformers")
    from toy_models import SIZES

    return SIZES[name].build()


@given(st.integers(0, 1000), st.integers(-6, 6), st.sampled_from([0, 1, -1]))
def test_rounding_is_as_near_as_the_format_allows(seed: int, exponent: int, axis: int) -> None:
    state = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    state[0] = 0
    largest = state.abs().amax(axis, keepdim=True)
    assert bool((rounded(state, axis, "int8") - state).abs().le(largest * (0.5 / 127 + 2**-8)).all())
    fp8 = (rounded(state, axis, "fp8") - state).abs()  # three bits of mantissa, and half the smallest step below
    assert bool(fp8.le(state.abs() * (2**-4 + 2**-8) + largest * (2**-10 / 448 + 1e-9)).all())
    torch.testing.assert_close(rounded(state, axis, "bfloat16"), state, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("where", "name"),
    [("own", "mamba"), ("own", "mamba2"), ("own", "delta_net"), ("transformers", "mamba"), ("transformers", "mamba2"),
     ("transformers", "qwen3_next"), ("transformers", "bamba")],
)  # fmt: skip
def test_coarser_formats_lose_more_and_exact_states_lose_nothing(where: str, name: str) -> None:
    model, x = model_of(where, name), tokens()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        out: Any = model(x)
    whole = out if isinstance(out, Tensor) else out.logits
    exact = math.exp(float(F.cross_entropy(whole[:, :-1].flatten(0, 1), x[:, 1:].flatten())))
    for every in (1, 5) if name != "mamba" or where == "own" else (1,):
        fine, coarse, floating = round_states(model, [x], every=every)
        assert 0 < fine.divergence < 0.05
        assert fine.perplexity == pytest.approx(exact, rel=0.05)
        assert fine.error < min(coarse.error, floating.error) < 0.5
        sizes = list(geometries(model).values())
        assert coarse.bytes == floating.bytes == sum(one.channels * (one.states + 2) for one in sizes)
        assert fine.bytes == sum(state_bytes(one, "bfloat16") for one in sizes)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("layer", ["linear_attention", "delta_net"])
def test_equal_coordinates_change_nothing_and_round_better(layer: str) -> None:
    model, x = own(layer, n_heads=2), tokens(4, 40, seed=1)
    with torch.no_grad():  # keys far from equal: the first entries are the large ones
        for block in model.blocks:
            ssm: Any = block.ssm
            for weight in (ssm.k_proj.weight, ssm.q_proj.weight) if layer == "delta_net" else (ssm.k_proj.weight,):
                weight.view(2, 8, -1).mul_(torch.logspace(0, -2, 8)[:, None])
        before, (coarse,) = model(x), round_states(model, [x], formats=["int8"])
        compressm.equalise_states(model, [tokens(4, 40)])
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
        (equal,) = round_states(model, [x], formats=["int8"])
    assert equal.error < coarse.error


def test_what_cannot_be_rounded_is_refused() -> None:
    model = own("mamba2", head_dim=8)
    with pytest.raises(InvalidRankRuleError, match="format"):
        round_states(model, [tokens()], formats=["int4"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="every must be"):
        round_states(model, [tokens()], every=0)
    with pytest.raises(UnsupportedModelError, match="are not free"):
        compressm.equalise_states(model, [tokens()])
    with pytest.raises(UnsupportedModelError, match="no vector of states per channel"):
        round_states(own("rg_lru"), [tokens()])
    with pytest.raises(UnsupportedModelError, match="is neither a causal language model"):
        check_roundable(nn.Linear(2, 2), Call((torch.zeros(2, 2),)))
    with pytest.raises(UnsupportedModelError, match="try every=1"):  # its code leaves the state out then
        round_states(model_of("transformers", "mamba"), [tokens()], every=5)
    with pytest.raises(UnsupportedModelError, match="in no cache that is known"):
        round_states(model_of("transformers", "xlstm"), [tokens()])


@pytest.mark.parametrize(("where", "name"), [("own", "mamba"), ("transformers", "mamba"), ("transformers", "mamba2")])
def test_padding_behind_tokens_does_not_count(where: str, name: str) -> None:
    model, x = model_of(where, name), tokens(3, 9)
    padded = torch.cat([x, torch.zeros(3, 7, dtype=torch.long)], 1)
    mask = (torch.arange(16) < 9).long().expand(3, 16)
    told = {"tokens": padded, "mask": mask} if where == "own" else {"attention_mask": mask, "input_ids": padded}
    alone, together = (round_states(model, [batch], formats=["int8"])[0] for batch in (_named(where, x), told))
    assert together.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert together.divergence == pytest.approx(alone.divergence, rel=1e-3)
    assert together.error == pytest.approx(alone.error, rel=1e-3)


def _named(where: str, x: Tensor) -> dict[str, Tensor]:
    return {"tokens" if where == "own" else "input_ids": x}


def test_padding_before_tokens_is_refused_with_the_remedy() -> None:
    model, x = model_of("transformers", "mamba"), tokens(3, 9)
    none = torch.zeros_like(x)
    batch = {"input_ids": torch.cat([none, x], 1), "attention_mask": torch.cat([none, none + 1], 1)}
    with pytest.raises(UnsupportedModelError, match="put padding behind the tokens"):
        round_states(model, [batch], formats=["int8"])
