"""States of selective layers that leave a choice, picked by trying."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressm
from compressm.cutting import plan_reduction
from compressm.cutting.picking import best_picked
from compressm.cutting.plan import Plan
from compressm.cutting.rise import measured_rises
from compressm.layers import SequenceClassifier
from compressm.observing.held_out import gather_halves, joined
from compressm.observing.loss_evidence import evidence_on
from compressm.theory.rank_rule import RankRule


def model(layer: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = SequenceClassifier(2, 4, d_model=8, n_layers=2, layer=layer, **options).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("out_proj.weight"):
                weight.mul_(100)  # so that the states matter
    return net


OPTIONS: dict[str, dict[str, Any]] = {"mamba2": {"d_state": 8, "head_dim": 4}, "rg_lru": {"d_state": 8}}


def batches(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(10, 20, 2, generator=generator).cumsum(1) / 3 for _ in range(count)]


def plans(net: nn.Module, seen: list[Tensor], states: int) -> Plan:
    moments = joined(gather_halves(net, seen))
    torch.manual_seed(0)
    evidence = evidence_on(net, seen, "classification")
    rule = RankRule(states=states, min_reduction=0.0)
    return plan_reduction(net, rule, moments=moments, loss=evidence, others=True)


@torch.no_grad()
def divergence(before: nn.Module, after: nn.Module, data: list[Tensor]) -> float:
    """From the definition: the mean over sequences of sum p log(p / q)."""
    x = torch.cat(data)
    p, q = before(x).double().log_softmax(-1), after(x).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("layer", OPTIONS)
@pytest.mark.parametrize("states", [6, 4, 2])
def test_the_way_with_the_least_divergence_on_the_data_is_taken(layer: str, states: int) -> None:
    net, seen = model(layer, **OPTIONS[layer]), batches()
    plan = plans(net, seen, states)
    assert plan.others
    true: dict[str, float] = {}
    for pick, one in {plan.pick: plan, **plan.others}.items():
        smaller = copy.deepcopy(net)
        report = one.apply(smaller)
        assert set(report.state_dims.values()) == {states}
        true[pick] = divergence(net, smaller, seen)
    best = best_picked(net, plan, seen, "classification")
    assert dict(best.report.picks) == pytest.approx(true, rel=1e-3, abs=1e-7)
    assert list(true.values()) != [next(iter(true.values()))] * len(true), "nothing to choose from"
    best.apply(net_cut := copy.deepcopy(net))
    assert divergence(net, net_cut, seen) == pytest.approx(min(true.values()), rel=1e-3, abs=1e-7)


def test_compress_takes_it_and_says_so() -> None:
    net, data = model("mamba2", **OPTIONS["mamba2"]), batches()
    before = copy.deepcopy(net)
    report = compressm.compress(net, states=3, data=data, loss="classification")
    taken, nats = report.picks[0]
    seen = [one for index, one in enumerate(data) if index % 4 != 3]
    assert nats == pytest.approx(divergence(before, net, seen), rel=1e-3)
    assert nats == min(value for _, value in report.picks)
    assert report.to_dict()["picks"][taken] == nats
    assert f"{nats:.3g} nats on the data of the cut" in str(report)


def test_by_saliency_the_states_with_the_largest_mean_square_gradients_stay() -> None:
    net, seen = model("mamba2", **OPTIONS["mamba2"]), batches()
    plan, fishers = plans(net, seen, 3).others["saliency"], evidence_of(net, seen)
    smaller = copy.deepcopy(net)
    plan.apply(smaller)
    for name, fisher in fishers.items():
        old, new = net.get_submodule(name), smaller.get_submodule(name)
        kept = fisher.F.flatten(2).flatten(0, 1).diagonal().topk(3).indices.sort().values
        start = 2 * old.d_inner  # type: ignore[operator]
        B, expected = new.in_proj.weight[start : start + 3], old.in_proj.weight[start : start + 8][kept]  # type: ignore[union-attr, index]
        assert torch.equal(B, expected)


def test_several_cuts_are_measured_as_each_alone() -> None:
    net, seen = model("mamba2", **OPTIONS["mamba2"]), batches()
    plan = plans(net, seen, 3)
    cuts = [plan.changes, {}, *(one.changes for one in plan.others.values())]
    together = measured_rises(net, cuts, seen, "classification")
    assert together == [measured_rises(net, [one], seen, "classification")[0] for one in cuts]
    assert together[1].nats == 0


@pytest.mark.parametrize(("layer", "tolerance", "left_out"), [("mamba2", 0.2, "saliency"), ("rg_lru", 0.3, "saliency")])
def test_every_way_that_is_tried_keeps_the_energy_that_tolerance_promises(
    layer: str, tolerance: float, left_out: str
) -> None:
    net, seen = model(layer, **{**OPTIONS[layer], "d_state": 16}), batches(6)
    moments = joined(gather_halves(net, seen))
    torch.manual_seed(0)
    evidence = evidence_on(net, seen, "classification")

    def planned(rule: RankRule) -> Plan:
        return plan_reduction(net, rule, moments=moments, loss=evidence, others=True)

    promised = planned(RankRule(tolerance=tolerance))
    ways = {promised.pick: promised, **promised.others}
    assert len(ways) > 1
    assert left_out not in ways
    for plan in ways.values():
        for one in plan.report.layers:
            assert one.energy_kept is None or one.energy_kept >= 1 - tolerance - 1e-9


@pytest.mark.parametrize("layer", ["mamba", "delta_net", "lru"])
def test_layers_that_take_maps_leave_no_choice(layer: str) -> None:
    report = compressm.compress(model(layer, d_state=8), states=4, data=batches(), loss="classification")
    assert report.cut
    assert report.picks == ()
    assert not compressm.compress(model(layer, d_state=8), states=4, data=batches()).hint


def test_without_the_loss_nothing_is_tried() -> None:
    report = compressm.compress(model("mamba2", **OPTIONS["mamba2"]), states=4, data=batches())
    assert report.picks == ()
    assert "loss=" in report.hint
    assert report.hint in str(report)


def test_the_error_on_held_out_data_is_that_of_the_way_taken() -> None:
    net, seen = model("mamba2", **OPTIONS["mamba2"]), batches()
    halves = gather_halves(net, seen)
    by_powers = plans(net, seen, 4).others["powers"].measured(net, seen, halves, "hankel", evidence_of(net, seen))
    rule = RankRule(states=4, min_reduction=0.0)
    plain = plan_reduction(net, rule, moments=joined(halves), selection="gramians")
    expected = plain.measured(net, seen, halves, "gramians")
    for one, other in zip(by_powers.report.layers, expected.report.layers, strict=True):
        assert one.error_held_out == pytest.approx(other.error_held_out, rel=1e-6)
        assert one.error_on_data == pytest.approx(other.error_on_data, rel=1e-6)


def evidence_of(net: nn.Module, seen: list[Tensor]) -> Any:
    torch.manual_seed(0)
    return evidence_on(net, seen, "classification").fishers
