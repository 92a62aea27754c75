"""Cut layers that learn the old layers' outputs: against a float64 loop, and through `compress` and `Compressor`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.adapters import Adapter, find_layers
from compressm.adapters.changes import layer_values
from compressm.cutting.matching import matched
from compressm.cutting.replay import cut_copy
from compressm.errors import InvalidRankRuleError
from compressm.layers import LRU, S5, SequenceClassifier
from compressm.observing.damage import LinearSample
from compressm.theory.balancing import balance, truncate
from compressm.theory.systems import DiagonalSystem


def simulated(system: DiagonalSystem, D: Tensor, u: Tensor) -> Tensor:
    """The output of a layer, step by step in float64."""
    x, out, u = torch.zeros(len(u), system.n, dtype=torch.complex128), list[Tensor](), u.double()
    for token in u.unbind(1):
        x = system.lam * x + token.to(x) @ system.B.mT
        out.append((x @ system.C.mT).real + D.double() * token)
    return torch.stack(out, 1)


def cut(layer: nn.Module, states: int) -> tuple[Adapter, Any]:
    adapter = next(iter(find_layers(layer).values()))[1]
    assert isinstance(adapter, Adapter)
    values = layer_values(layer)
    return adapter, adapter.plan(values, truncate(balance(adapter.read(values)), states))


@torch.no_grad()
def test_the_errors_are_those_of_a_float64_loop_on_the_held_out_sequences() -> None:
    torch.manual_seed(0)
    layer = LRU(3, 16, r_min=0.3, r_max=0.95)
    u = torch.randn(48, 30, 3).cumsum(1) / 3
    adapter, change = cut(layer, 2)
    found = matched(layer, adapter, change, [LinearSample(part, torch.ones_like(part)) for part in u.split(8)], 60)
    assert found is not None
    held_out = u[3::4]
    y = simulated(adapter.system(layer), layer.D, held_out)
    truncation = simulated(adapter.system(cut_copy(layer, change)), layer.D, held_out)
    learnt = simulated(found.system, layer.D, held_out)
    assert found.before == pytest.approx(float((truncation - y).norm() / y.norm()), rel=1e-4)
    assert found.after == pytest.approx(float((learnt - y).norm() / y.norm()), rel=1e-4)
    assert found.after < 0.8 * found.before
    torch.testing.assert_close(cut_copy(layer, found.change)(held_out).double(), learnt, rtol=0, atol=1e-4)


def test_tokens_without_an_effect_on_the_loss_do_not_count() -> None:
    torch.manual_seed(0)
    layer = LRU(3, 16, r_min=0.3, r_max=0.95)
    adapter, change = cut(layer, 2)
    u, g = torch.randn(32, 20, 3).cumsum(1), torch.ones(32, 20, 3)
    g[:, 10:] = 0
    whole = matched(layer, adapter, change, [LinearSample(u, g)], 60)
    u_other = u.clone()
    u_other[:, 10:] = 100 * torch.randn(32, 10, 3)
    other = matched(layer, adapter, change, [LinearSample(u_other, g)], 60)
    assert whole is not None
    assert other is not None
    assert whole.after == pytest.approx(other.after, rel=1e-4)


def test_both_directions_are_reversed_within_the_sequences() -> None:
    torch.manual_seed(0)
    layer = S5(3, 12, bidirectional=True)
    adapter, change = cut(layer, 2)
    u, lengths = torch.randn(24, 15, 3).cumsum(1), torch.randint(5, 16, (24,))
    g = (torch.arange(15) < lengths[:, None])[..., None].float().expand_as(u)
    found = matched(layer, adapter, change, [LinearSample(u, g, lengths)], 60)
    assert found is not None
    with torch.no_grad():
        y, learnt = (one(u[3::4], lengths=lengths[3::4]) for one in (layer, cut_copy(layer, found.change)))
    error = float(((learnt - y) * g[3::4]).norm() / (y * g[3::4]).norm())
    assert found.after == pytest.approx(error, rel=1e-4)


def test_nothing_better_is_no_change() -> None:
    torch.manual_seed(0)
    layer = LRU(3, 8, r_min=0.3, r_max=0.95)
    adapter, change = cut(layer, 8)  # exact: nothing can be closer
    assert matched(layer, adapter, change, [LinearSample(torch.randn(16, 20, 3), torch.ones(16, 20, 3))], 20) is None


def test_a_compressor_matches_before_it_writes_and_training_goes_on() -> None:
    torch.manual_seed(0)
    net = SequenceClassifier(2, 4, d_model=8, d_state=16, n_layers=2, r_min=0.3, r_max=0.95)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    options: dict[str, Any] = {"states": 2, "cuts": 1, "window": 0.2, "gramians": "loss"}
    compressor = compressm.Compressor(net, optimizer, 100, match_steps=60, **options)
    x = torch.randn(16, 20, 2).cumsum(1) / 3
    y = (x[:, -1, 0] > 0).long()
    event = None
    while event is None:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        event = compressor.step()
    reports = event.to_dict()["layers"]
    assert all(one["states_after"] == 2 and one["matched"][1] < one["matched"][0] for one in reports)
    before = copy.deepcopy(net.state_dict())
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in net.named_parameters())


def test_compress_matches_on_its_data_and_predicts_less() -> None:
    torch.manual_seed(0)
    net = SequenceClassifier(2, 4, d_model=8, d_state=16, n_layers=2, r_min=0.3, r_max=0.95).eval()
    data = [torch.randn(16, 20, 2).cumsum(1) / 3 for _ in range(8)]
    reports = [
        compressm.compress(copy.deepcopy(net), states=2, data=data, loss="classification", match_steps=steps)
        for steps in (0, 100)
    ]
    plain, better = (report.predicted_loss for report in reports)
    assert plain is not None
    assert better is not None
    assert better < plain
    assert "learnt the old layer's output" in str(reports[1])
    assert "learnt" not in str(reports[0])


def test_a_search_for_a_size_trains_no_layer_twice_to_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = SequenceClassifier(2, 4, d_model=8, d_state=16, n_layers=2, r_min=0.3, r_max=0.95).eval()
    data = [torch.randn(16, 20, 2).cumsum(1) / 3 for _ in range(4)]
    teacher, trained, evaluated = copy.deepcopy(net), list[tuple[int, int]](), list[int]()

    def counted(layer: nn.Module, adapter: Any, change: Any, *more: Any) -> Any:
        trained.append((id(layer), adapter.state_dim(cut_copy(layer, change))))
        return matched(layer, adapter, change, *more)

    @torch.no_grad()
    def agreement(smaller: nn.Module) -> float:
        evaluated.append(1)
        return -float((smaller(data[0]) - teacher(data[0])).square().mean())

    monkeypatch.setattr("compressm.cutting.plan.matched", counted)
    report = compressm.compress(
        net, max_drop=0.01, evaluate=agreement, data=data, loss="classification", match_steps=5, max_reduction=1.0
    )
    assert report.cut
    assert len(trained) == len(set(trained)) < 2 * len(evaluated)


def test_matching_without_recorded_inputs_is_refused() -> None:
    with pytest.raises(InvalidRankRuleError, match=r"match_steps=50 .* gramians='loss'"):
        compressm.compress(LRU(2, 8), states=2, match_steps=50)
    for no_number in (-1, 2.5, "few"):
        with pytest.raises(
            InvalidRankRuleError, match=f"match_steps must be a whole number of at least 0; got {no_number!r}"
        ):
            compressm.compress(LRU(2, 8), states=2, match_steps=no_number)  # type: ignore[arg-type]
