"""What counts as a call of a layer, against loops over all calls in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import compressm
from compressm.errors import ConfigError, InvalidSystemError, UnsupportedModelError
from compressm.layers import Bidirectional, LinearAttention, Mamba, Mamba2, SequenceClassifier
from compressm.observing.moments import MODEL_CALLS, NotFiniteWarning, Statistics
from compressm.observing.over_data import gather
from compressm.theory.recurrence import Moments

WIDTH = 4


def layer(seed: int = 0, d_state: int = 6) -> Mamba:
    torch.manual_seed(seed)
    made = Mamba(WIDTH, d_state)
    with torch.no_grad():
        made.dt_proj.bias.fill_(-1.0)
    return made


def inputs(*shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed)).cumsum(1)


def loop(mamba: Mamba, hidden: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Sums of ``gain^2 h h^T`` and ``C C^T`` and the number of tokens, token by token, in float64, from the equations
    of the layer's docstring.

    Args:
        hidden: one sequence, shape ``(length, d_model)``.
        read: which tokens count, shape ``(length,)``.
    """
    m, v = copy.deepcopy(mamba).double(), hidden.double()
    taps, length = m.conv1d.weight[:, 0], v.shape[0]
    entering, z = m.in_proj(v).chunk(2, -1)
    n, P, W, tokens = m.d_state, 0.0, 0.0, 0.0
    h = torch.zeros(m.d_inner, n, dtype=torch.float64)
    for t in range(length):
        u = m.conv1d.bias.clone()
        for lag in range(min(taps.shape[1], t + 1)):
            u = u + taps[:, -1 - lag] * entering[t - lag]
        u = F.silu(u)
        dt, B, C = m.x_proj(u).split([m.dt_rank, n, n])
        delta = F.softplus(m.dt_proj(dt))
        h = torch.exp(-delta[:, None] * m.A_log.exp()) * h + (delta * u)[:, None] * B
        if read is not None and not read[t]:
            continue
        seen = h * (F.silu(z[t]) * m.out_proj.weight.norm(dim=0))[:, None]
        P, W, tokens = P + seen.T @ seen, W + torch.outer(C, C), tokens + 1
    return P.detach(), W.detach(), tokens  # type: ignore[union-attr]


def expect(found: Moments, parts: list[tuple[Tensor, Tensor, float]]) -> None:
    P, W, tokens = (sum(part[i] for part in parts) for i in range(3))
    assert float(found.tokens) == pytest.approx(tokens)
    for mine, truth in ((found.P[0], P), (found.W[0], W)):
        torch.testing.assert_close(mine, truth, rtol=2e-5, atol=1e-6 * float(truth.abs().max()))  # float32's rounding


class Twice(nn.Module):
    """Reads its input, and then what it has made of it, with one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = layer()

    def forward(self, u: Tensor) -> Tensor:
        return self.second(3 * self.first(u) + u.flip(1))


class Both(nn.Module):
    """Reads in both directions with one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ssm = layer()

    def forward(self, u: Tensor) -> Tensor:
        return self.ssm(u) + self.ssm(u.flip(1)).flip(1)


class Chunks(nn.Module):
    """Reads a sequence in three parts, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ssm = layer()

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([self.ssm(part) for part in u.split(5, 1)], 1)


class Checkpointed(nn.Module):
    """A layer whose forward is computed anew in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.ssm, self.reentrant = layer(), reentrant

    def forward(self, u: Tensor) -> Tensor:
        return checkpoint(self.ssm, u.requires_grad_(), use_reentrant=self.reentrant)  # type: ignore[return-value]


class Aside(nn.Module):
    """Calls its layer once as it should be, and once by its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.ssm = layer()

    def forward(self, u: Tensor) -> Tensor:
        return self.ssm(u) + self.ssm.forward(2 * u)


def calls_of(make: Callable[[], nn.Module], u: Tensor) -> tuple[Statistics, nn.Module]:
    net = make()
    statistics = Statistics(net)
    statistics.observe_next()
    net(u).square().sum().backward()
    statistics.close()
    return statistics, net


def test_a_layer_that_is_called_twice_is_measured_on_both_calls() -> None:
    u = inputs(3, 12)
    statistics, net = calls_of(Twice, u)
    assert statistics.layers == ["first"]
    with torch.no_grad():
        second = 3 * net.first(u) + u.flip(1)  # type: ignore[operator]
    expect(statistics.moments()["first"], [loop(net.first, u[0]), loop(net.first, second[0])])  # type: ignore[arg-type]


def test_both_directions_count_and_parts_count() -> None:
    u = inputs(2, 13)
    statistics, net = calls_of(Both, u)
    expect(statistics.moments()["ssm"], [loop(net.ssm, u[0]), loop(net.ssm, u[0].flip(0))])  # type: ignore[arg-type]
    statistics, net = calls_of(Chunks, u)
    expect(statistics.moments()["ssm"], [loop(net.ssm, part) for part in u[0].split(5)])  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_the_backward_pass_repeats_counts_once(reentrant: bool) -> None:
    u = inputs(2, 11)
    statistics, net = calls_of(lambda: Checkpointed(reentrant), u.clone())
    expect(statistics.moments()["ssm"], [loop(net.ssm, u[0])])  # type: ignore[arg-type]


def test_calls_of_forward_count_too() -> None:
    u = inputs(2, 11)
    statistics, net = calls_of(Aside, u)
    expect(statistics.moments()["ssm"], [loop(net.ssm, u[0]), loop(net.ssm, 2 * u[0])])  # type: ignore[arg-type]


def test_steps_are_refused_since_their_states_cannot_be_followed() -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ssm = layer()

        def forward(self, u: Tensor) -> Tensor:
            state, out = self.ssm.initial_state(u.shape[0]), self.ssm(u)
            for v in u.unbind(1):
                last, state = self.ssm.step(v, state)
                out = out + last[:, None]
            return out

    net = Stepping()
    with pytest.raises(
        UnsupportedModelError, match=r"'ssm' .* not seen whole.*step.*call the layer itself, layer\(u\)"
    ):
        gather(net, [inputs(2, 5)])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    compressor = compressm.Compressor(net, optimizer, 40, states=3, cuts=1)
    net(inputs(2, 5)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="not seen whole"):
        compressor.step()


def test_accumulated_calls_of_the_model_count_up_to_a_limit() -> None:
    net = nn.Sequential(layer())
    statistics, data = Statistics(net), [inputs(2, 7, seed=k) for k in range(MODEL_CALLS + 3)]
    statistics.observe_next()
    for u in data:
        net(u).sum().backward()
    first = [loop(net[0], u[0]) for u in data[:MODEL_CALLS]]  # type: ignore[arg-type]
    expect(statistics.moments()["0"], first)
    statistics.observe_next()  # what was seen before is forgotten by one step, not by one for each call
    for u in data[:2]:
        net(u)
    faded = [tuple(statistics.memory * value for value in part) for part in first]
    expect(statistics.moments()["0"], [*faded, *first[:2]])  # type: ignore[list-item]


def test_under_a_compressor_an_observation_is_one_step() -> None:
    net = Twice()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    compressor = compressm.Compressor(net, optimizer, 2000, states=3, cuts=1)
    for number in range(6):
        net(inputs(2, 9, seed=number)).sum().backward()
        optimizer.step()
        compressor.step()
    tokens = float(compressor.state_dict()["moments"]["first"]["tokens"])
    assert tokens == 18  # of the first step; at every eighth there is another


class Reading(nn.Module):
    """A classifier's block that reads in both directions, with two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Bidirectional(layer(1), layer(2))

    def forward(self, u: Tensor) -> Tensor:
        return self.both(u)


def test_padding_of_a_reversed_sequence_is_where_it_is_then() -> None:
    torch.manual_seed(0)
    net = SequenceClassifier(1, 3, WIDTH, 6, 1, dropout=0.0, layer="mamba", vocabulary=9)
    net.blocks[0].ssm = Reading()  # type: ignore[union-attr]
    tokens = torch.tensor([[3, 1, 4, 1, 5, 0, 0, 0], [2, 7, 1, 8, 2, 8, 1, 8]])
    found = gather(net, [tokens], sequences=1)
    with torch.no_grad():
        hidden = net.blocks[0].norm(net.encoder(tokens))[0]  # type: ignore[operator, union-attr]
    read = tokens[0] != 0
    both = net.blocks[0].ssm.both  # type: ignore[union-attr]
    expect(found["blocks.0.ssm.both.forwards"], [loop(both.forwards, hidden, read)])
    # The reversed layer has read the padding when it comes to the tokens.
    expect(found["blocks.0.ssm.both.backwards"], [loop(both.backwards, hidden.flip(0), read.flip(0))])


@pytest.mark.parametrize("make", [lambda: Mamba2(WIDTH, 4, head_dim=4), lambda: LinearAttention(WIDTH, 4, 2)])
def test_copies_of_an_observed_model_are_not_observed(make: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(make())
    statistics = Statistics(net)
    statistics.observe_next()
    copy.deepcopy(net)(inputs(2, 5))
    assert statistics.unseen == ["0"]
    net(inputs(2, 5))
    assert not statistics.unseen


def hf_model(family: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=20, hidden_size=8, num_hidden_layers=1, **options)
    return getattr(transformers, f"{family}Model")(config).eval()


HF = {
    "Mamba": {"state_size": 5, "time_step_rank": 2},
    "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 4, "expand": 2, "n_groups": 1, "chunk_size": 4},
}


@pytest.mark.parametrize("family", HF)
def test_a_sequence_read_token_by_token_has_the_moments_of_the_whole(family: str) -> None:
    """With a cache, every call goes on from the state of the one before."""
    model = hf_model(family, **HF[family])
    tokens = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(3))
    whole = gather(model, [{"input_ids": tokens, "use_cache": False}])
    statistics, cache = Statistics(model, sequences=2, memory=1.0), None
    with torch.no_grad():
        for token in tokens.unbind(1):
            statistics.observe_next(training_only=False)  # anew: these are more calls than MODEL_CALLS
            cache = model(token[:, None], use_cache=True, cache_params=cache).cache_params
    for name, value in whole.items():
        for key, truth in value.tensors().items():
            mine = statistics.moments()[name].tensors()[key]
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6 * float(truth.abs().max()))


def test_recurrent_gemma_goes_on_from_the_state_in_its_layer() -> None:
    options = {"lru_width": 8, "num_attention_heads": 2, "block_types": ["recurrent"], "intermediate_size": 16}
    block = hf_model("RecurrentGemma", num_key_value_heads=1, **options).layers[0].temporal_block
    with torch.no_grad():
        block.rg_lru.recurrent_param.fill_(-4.0)  # slow states
    hidden = torch.randn(2, 9, 8)
    places = torch.arange(9)[None].expand(2, 9)
    whole, parts = Statistics(block, sequences=2), Statistics(block, sequences=2, memory=1.0)
    with torch.no_grad():
        whole.observe_next(training_only=False)
        out = block(hidden, places, None, use_cache=False)[0]
        whole.close()
        seen = []
        for t in range(9):
            parts.observe_next(training_only=False)
            seen.append(block(hidden[:, t : t + 1], places[:, t : t + 1], None, use_cache=True)[0])
        torch.testing.assert_close(torch.cat(seen, 1), out)
    for key, truth in whole.moments()[""].tensors().items():
        torch.testing.assert_close(parts.moments()[""].tensors()[key], truth, rtol=1e-4, atol=1e-5)


def test_parts_of_several_tokens_go_on_from_the_carried_state() -> None:
    model = hf_model("Mamba2", **HF["Mamba2"])
    with torch.no_grad():
        model.layers[0].mixer.dt_bias.fill_(-3.0)  # slow states
    tokens = torch.randint(3, 20, (2, 12), generator=torch.Generator().manual_seed(3))
    whole = gather(model, [{"input_ids": tokens, "use_cache": False}])
    statistics = Statistics(model, sequences=2, memory=1.0)
    statistics.observe_next(training_only=False)
    with torch.no_grad():
        before = model(tokens[:, :7], use_cache=True).cache_params
        state = before.get_recurrent_state(0).clone()
        statistics.observe_next(training_only=False)
        statistics.reset()
        statistics.observe_next(training_only=False)
        model(tokens[:, :7], use_cache=True)
        after = model(tokens[:, 7:], use_cache=True, cache_params=before)
    assert not torch.equal(after.cache_params.get_recurrent_state(0), state)  # the model itself went on
    for key, truth in whole["layers.0.mixer"].tensors().items():
        mine = statistics.moments()["layers.0.mixer"].tensors()[key]
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_not_finite_are_named(value: float) -> None:
    net = SequenceClassifier(1, 3, WIDTH, 6, 1, layer="mamba")
    data = [torch.randn(4, 10, 1) for _ in range(3)]
    data[2][0, 3, 0] = value
    calls: list[Callable[[], Any]] = [
        lambda: gather(net, data),
        lambda: compressm.analyze(net, data=data),
        lambda: compressm.compress(net, states=3, data=[{"u": u} for u in data]),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"batch 2 of data holds (nan|inf) at \[0, 3, 0\]: data must be finite"):
            call()


def test_one_bad_batch_does_not_spoil_the_moments() -> None:
    torch.manual_seed(0)
    net = SequenceClassifier(1, 3, WIDTH, 6, 1, dropout=0.0, layer="mamba")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    compressor = compressm.Compressor(net, optimizer, 60, states=3, cuts=1, window=0.5)
    for step in range(30):
        u = torch.randn(2, 10, 1)
        if step == 9:
            u[0, 0, 0] = math.nan
            with pytest.warns(NotFiniteWarning, match=r"step 10: the model's input u has 1 entry that is not finite"):
                net(u)
        else:
            net(u).sum().backward()
        optimizer.step()
        event = compressor.step()
    assert event is not None
    assert event.kind == "cut"
    assert compressor.state_dims == {"blocks.0.ssm": 3}


def test_where_all_data_were_bad_the_cut_says_so_and_not_the_learning_rate() -> None:
    net = SequenceClassifier(1, 3, WIDTH, 6, 1, dropout=0.0, layer="mamba")
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    compressor = compressm.Compressor(net, optimizer, 20, states=3, cuts=1)
    with pytest.warns(NotFiniteWarning):
        net(torch.full((2, 5, 1), math.nan))
    optimizer.step()
    compressor.step()
    net(torch.full((2, 5, 1), math.nan))
    optimizer.step()
    with pytest.raises(InvalidSystemError, match=r"all 2 observations of 'blocks.0.ssm' were left out: .*input u") as e:
        compressor.step()
    assert "learning rate" not in str(e.value)
    net(torch.randn(2, 5, 1))
    optimizer.step()
    event = compressor.step()  # the cut is not lost
    assert event is not None
    assert event.kind == "cut"
