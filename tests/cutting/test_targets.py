"""A size that a target refuses is never written, under every rule, once and while training."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

import compressm
from compressm.cutting.sizes import geometries, state_dims
from compressm.errors import InvalidRankRuleError
from compressm.layers import LRU, Mamba, Mamba2
from compressm.theory.targets import Target, takes

LEGAL = {4, 8, 12}  # (d_inner + 2 groups N) % 8 = 0 with d_inner = 16 and one group, up to 12 states


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (Mamba2(8, 12, head_dim=4, n_groups=1) for _ in range(2))
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 2))


DATA = [torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize(
    "rule",
    [
        {"states": 7}, {"fraction": 0.5}, {"tolerance": 0.2}, {"max_error": 1.0}, {"total_states": 15},
        {"max_loss": 0.5, "loss": "regression"}, {"max_drop": 1.0, "evaluate": lambda m: 0.0},
        {"states": 9, "multiple_of": 2}, {"tolerance": 0.3, "multiple_of": 8, "max_reduction": 0.5},
    ],
    ids=lambda rule: ", ".join(rule),
)  # fmt: skip
def test_only_legal_sizes_are_written(rule: dict[str, Any]) -> None:
    free, bound = model(), model()
    compressm.compress(free, data=DATA, **rule)
    report = compressm.compress(bound, data=DATA, target="mamba_ssm", **rule)
    assert report.serving is not None
    assert set(state_dims(bound).values()) <= LEGAL
    assert all(takes("mamba_ssm", one, one.states) for one in geometries(bound).values())
    if "states" in rule or "total_states" in rule:  # limits hold; promises are rounded up
        assert sum(state_dims(bound).values()) <= sum(state_dims(free).values())
    elif "max_drop" not in rule:
        assert sum(state_dims(bound).values()) >= sum(state_dims(free).values()) or "fraction" in rule


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (lambda: Mamba2(64, 256, head_dim=64), (130, 31)),
        (lambda: Mamba(64, 24), (17, 5)),
    ],
    ids=["Mamba-2", "Mamba"],
)
def test_every_target_gets_a_size_that_it_takes_or_nothing_is_written(layer: Any, sizes: Any, target: Target) -> None:
    """The table is asked about the layer as it was written, not about the plan."""
    for states in sizes:
        torch.manual_seed(0)
        one = layer()
        before = {name: value.clone() for name, value in one.state_dict().items()}
        refused = None
        try:
            compressm.compress(one, states=states, data=torch.randn(1, 4, 64), target=target, selection="gramians")
        except InvalidRankRuleError as error:
            refused = str(error)
        (made,) = geometries(one).values()
        if refused is None:
            assert takes(target, made, made.states)
            assert made.states <= states
        else:
            assert target in refused
            assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())


def test_only_legal_sizes_are_written_while_training() -> None:
    m = model()
    optimizer = torch.optim.Adam(m.parameters(), 1e-3)
    compressor = compressm.Compressor(m, optimizer, 40, states=5, cuts=3, window=0.5, target="mamba_ssm")
    seen = set[int]()
    for step in range(40):
        optimizer.zero_grad()
        m(DATA[step % 4]).square().mean().backward()
        optimizer.step()
        compressor.step()
        seen |= set(compressor.state_dims.values())
    assert seen == LEGAL
    resumed = model()  # built as at first, and resumed when it has its smallest size
    state = compressor.state_dict()
    again = compressm.Compressor(
        resumed, torch.optim.Adam(resumed.parameters()), 40, states=5, cuts=3, window=0.5, target="mamba_ssm"
    )
    again.load_state_dict(state)
    assert again.state_dims == compressor.state_dims


def test_what_cannot_be_met_is_refused_before_anything_is_computed() -> None:
    for refused, message in (
        ({"states": 3, "target": "mamba_ssm"}, "states=3 is an upper limit.*below 4: ask for 4, 8"),
        ({"total_states": 7, "target": "mamba_ssm"}, "total_states=7 is less than the 8 states"),
        ({"states": 8, "target": "llama.cpp"}, "'llama.cpp' takes on CUDA N in 128, 256"),
        ({"states": 8, "target": "mamba_ssm", "per_layer": True}, "leave out per_layer"),
        ({"states": 8, "target": "mamba_ssm", "multiple_of": 5}, "multiple of 5"),
    ):
        with pytest.raises(InvalidRankRuleError, match=message):
            compressm.compress(model(), **refused)
    with pytest.raises(InvalidRankRuleError, match="no known kernel for its recurrence"):
        compressm.compress(LRU(4, 8), states=4, target="vllm")
    m = model()
    with pytest.raises(InvalidRankRuleError, match="below 4"):
        compressm.Compressor(m, torch.optim.SGD(m.parameters(), 0.1), 100, states=3, target="mamba_ssm")
