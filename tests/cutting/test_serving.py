"""Bytes of the serving report, held against the real caches of transformers and the states of our own layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import write
from compressm.cutting.serving import (
    Attention,
    Memory,
    Serving,
    attention_of,
    cache_of,
    decoding_speed,
    human,
    parse_bytes,
)
from compressm.errors import ConfigError
from compressm.layers import (
    LRU,
    S4D,
    S5,
    DeltaNet,
    GatedLinearAttention,
    LinearAttention,
    Mamba,
    Mamba2,
    RecurrentBlock,
)
from compressm.theory.geometry import Geometry
from hf_models import FAMILIES, hf_models, tokens


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


def cached(layers: list[Any], *names: str) -> int:
    return sum(one.nbytes for layer in layers for name in names for one in tensors(getattr(layer, name, None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=2)
def test_the_bytes_are_those_of_the_real_cache(family: str, dtype: torch.dtype, data: st.DataObject) -> None:
    model = data.draw(hf_models(family)).to(dtype)
    if dtype == torch.bfloat16 and family in ("Jamba", "GraniteMoeHybrid"):
        return  # the grouped products of their experts need wider layers in half precision
    layers = cache_of(model, tokens(1, 5)).layers
    memory = Memory.of(model, attention_of(model))
    assert memory.states == cached(layers, "recurrent_states") > 0
    assert memory.windows == cached(layers, "conv_states") > 0
    assert memory.attention_bytes(5) == cached(layers, "keys", "values")


def test_the_bytes_of_recurrent_gemma_are_those_in_its_layers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RecurrentGemmaConfig(
        vocab_size=40, hidden_size=16, lru_width=24, num_attention_heads=2, num_hidden_layers=3, intermediate_size=16,
        num_key_value_heads=1, attention_window_size=8,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config).eval().to(torch.bfloat16)
    memory = Memory.of(model, attention_of(model))
    cache = cache_of(model, tokens(1, 5))
    layers = [layer for layer, _ in find_layers(model).values()]
    assert memory.windows == sum(layer.conv1d_state.nbytes for layer in layers)  # type: ignore[union-attr, operator]
    assert memory.states == sum(layer.rg_lru.recurrent_states.nbytes for layer in layers)  # type: ignore[union-attr]
    assert memory.attention_bytes(5) == cached(cache.layers, "keys", "values")
    assert memory.attention_bytes(1000) == memory.attention_bytes(8)


@pytest.mark.parametrize(
    "layer",
    [
        LRU(4, 6), S5(4, 6), S4D(4, 6), Mamba(4, 6), Mamba2(8, 6, head_dim=4, n_groups=2),
        LinearAttention(8, 6, n_heads=2), GatedLinearAttention(8, 6, n_heads=2), DeltaNet(8, 6, n_heads=2),
        RecurrentBlock(8, 12, n_blocks=2), GatedLinearAttention(8, 6, n_heads=2, d_conv=4),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_the_bytes_of_our_own_layers_are_those_of_their_states(layer: nn.Module) -> None:
    ((_, adapter),) = find_layers(layer).values()
    foreseen = adapter.geometry(layer)
    for states in (foreseen.states, foreseen.states // 2):
        write(layer, adapter.resized(layer, states))
        geometry, state = adapter.geometry(layer), layer.initial_state(1)  # type: ignore[operator]
        assert geometry.state_bytes + geometry.window_bytes == sum(one.nbytes for one in tensors(state))
        assert foreseen.resized(states) == geometry


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=1)
def test_a_cut_changes_the_bytes_as_foreseen(family: str, data: st.DataObject) -> None:
    model = data.draw(hf_models(family))
    before = Memory.of(model, ())
    states = next(iter(before.layers.values())).states
    report = compressm.compress(model, states=max(1, states // 2), data=[{"input_ids": tokens(4, 16)}])
    after = Memory.of(model, ())
    foreseen = before.resized(report.state_dims, before.weights - after.weights)
    assert foreseen == replace(after, attention=())
    assert report.serving is not None
    assert report.serving.after.checkpoint == after.checkpoint < before.checkpoint
    assert str(report).startswith(f"state per sequence {human(before.checkpoint)} → {human(after.checkpoint)}")


@pytest.mark.parametrize("choice", [{"exclude": "1"}, {"layers": "0"}])
def test_layers_that_are_left_out_of_a_cut_have_states_too(choice: dict[str, Any]) -> None:
    model = nn.Sequential(LinearAttention(8, n_heads=2, d_state=6), LinearAttention(8, n_heads=2, d_state=6))
    report = compressm.compress(model, states=2, data=torch.randn(4, 9, 8), **choice)
    assert report.serving is not None
    before, after = report.serving.before, report.serving.after
    assert (before.states, after.states) == (2 * 6 * 8 * 4, (6 + 2) * 8 * 4)  # d_state times d_model floats a layer
    assert list(after.layers) == ["0", "1"]


def test_sequences_and_bytes_that_move_by_hand() -> None:
    layer = Geometry("ssd", 16, 32, heads=4, convolved=64, window=4)
    memory = Memory({"a": layer, "b": layer}, (Attention(100), Attention(10, window=50)), 10_000, 9_000)
    assert (memory.states, memory.windows) == (2 * 16 * 32 * 4, 2 * 64 * 4 * 4)
    assert memory.attention_bytes(1000) == 100_000 + 500
    assert memory.sequence(1000) == 4096 + 2048 + 100_500
    assert memory.sequences(10_000 + 3 * memory.sequence(1000), 1000) == 3
    assert memory.sequences(9_999, 1000) == 0
    assert memory.moved(1000, 2) == 9_000 + 2 * (2 * 6144 + 100_500)
    assert "hold 0 sequences of 4,096 tokens" in Serving(memory, memory, 1).headline()


def test_weights_that_a_token_reads_leave_out_embeddings_and_experts() -> None:
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        config = transformers.MambaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, tie_word_embeddings=tied)
        memory = Memory.of(transformers.MambaForCausalLM(config))
        assert memory.weights - memory.read == (0 if tied else 40 * 8 * 4)


def test_numbers_of_bytes_are_read_and_written() -> None:
    assert parse_bytes("40GB") == 40 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    assert parse_bytes("512m") == 512 * 10**6
    assert parse_bytes("77") == 77
    for bad in ("", "GB", "forty", "-1GB", "0"):
        with pytest.raises(ConfigError, match="write it as 40GB"):
            parse_bytes(bad)
    assert [human(x) for x in (7, 999, 1000, 25_165_824, 5.4e9)] == ["7 B", "999 B", "1 kB", "25.2 MB", "5.4 GB"]


def test_the_speed_of_generation_is_a_number() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=1)
    speed = decoding_speed(transformers.MambaForCausalLM(config).eval(), tokens=4)
    assert speed is not None
    assert math.isfinite(speed)
    assert speed > 0
    assert decoding_speed(nn.Linear(2, 2)) is None
