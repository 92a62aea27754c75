"""When a compressor looks at selective layers, and how much what it saw counts later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_recurrence import brute_force
from torch.nn import functional as F

from compressm.adapters import find_layers
from compressm.layers import SequenceClassifier
from compressm.observing.moments import Statistics
from compressm.training.compressor import Compressor

NAME = "blocks.0.ssm"


def model() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, 3, 4, 6, 1, dropout=0.0, norm="layer", layer="mamba")


def batch(step: int) -> torch.Tensor:
    return torch.randn(3, 10, 1, generator=torch.Generator().manual_seed(step)).cumsum(1)


def by_definition(net: SequenceClassifier, u: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """P and W of one sequence, summed over its tokens by a float64 loop: from what enters the layer."""
    entered: list[torch.Tensor] = []
    layer, adapter = find_layers(net)[NAME]
    hook = layer.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach()))
    with torch.no_grad():
        net(u)
        hook.remove()
        return brute_force(adapter.signals(layer, entered[0]))  # type: ignore[union-attr]


def test_each_observation_counts_nine_tenths_of_the_one_after_it() -> None:
    net = model()
    statistics = Statistics(net)
    for step in range(3):
        statistics.observe_next()
        net(batch(step))
    statistics.close()
    found = statistics.moments()[NAME]
    parts = [by_definition(net, batch(step)[:1]) for step in range(3)]
    for value, index in ((found.P, 0), (found.W, 1)):
        expected = 0.81 * parts[0][index] + 0.9 * parts[1][index] + parts[2][index]
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.max())
    assert float(found.tokens) == pytest.approx(10 * (0.81 + 0.9 + 1))


def test_calls_within_one_observation_count_alike() -> None:
    net = model()
    statistics = Statistics(net)
    statistics.observe_next()
    for step in range(3):
        net(batch(step))
    statistics.close()
    found = statistics.moments()[NAME]
    expected = sum(by_definition(net, batch(step)[:1])[0] for step in range(3))
    np.testing.assert_allclose(found.P.numpy(), expected, rtol=1e-4, atol=1e-5 * np.max(expected))
    assert float(found.tokens) == 30


def test_training_is_looked_at_in_every_eighth_step_and_in_the_first_sequence() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)  # so that moments can be told from the weights at the end
    compressor = Compressor(net, optimizer, 1000, states=3, cuts=1)  # the cut comes at step 100
    seen: list[int] = []
    for step in range(1, 36):
        F.cross_entropy(net(batch(step)), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        compressor.step()
        if step == 1 or step % 8 == 1:
            seen.append(step)
        moments = compressor.state_dict()["moments"][NAME]
        assert float(moments["tokens"]) == pytest.approx(10 * sum(0.9**k for k in range(len(seen)))), step
    assert seen == [1, 9, 17, 25, 33]
    expected = np.zeros((1, 6, 6))
    for step in seen:
        expected = 0.9 * expected + by_definition(net, batch(step)[:1])[0]
    found = compressor.state_dict()["moments"][NAME]["P"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_where_probes_are_closer_together_every_probe_sees_something_new() -> None:
    # A cut at step 20, with a probe at every second step.
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    compressor = Compressor(net, optimizer, 40, states=3, cuts=1, window=0.5)
    for step in range(1, 12):
        F.cross_entropy(net(batch(step)), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        compressor.step()
        tokens = float(compressor.state_dict()["moments"][NAME]["tokens"])
        assert tokens == pytest.approx(10 * sum(0.9**k for k in range((step + 1) // 2))), step
