from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import compressm.theory.certificate
from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values
from compressm.cutting import compress, plan_reduction, resize_states, state_dims
from compressm.cutting.metrics import measure
from compressm.cutting.spectrum import analyze
from compressm.errors import CheckpointError, InvalidRankRuleError, InvalidSystemError, UnsupportedModelError
from compressm.layers import LRU, S4D, LinearAttention, SequenceClassifier
from compressm.theory.balancing import Method, balance, truncate
from compressm.theory.certificate import Certificate
from compressm.theory.rank_rule import RankRule
from compressm.theory.systems import DiagonalSystem


def classifier(seed: int = 0, d_state: int | list[int] = 32) -> SequenceClassifier:
    torch.manual_seed(seed)
    return SequenceClassifier(1, 4, d_model=6, d_state=d_state, n_layers=2, norm="layer", r_min=0.9).eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_plan_writes_nothing_and_then_everything() -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    plan = plan_reduction(model, RankRule(tolerance=0.1))
    assert plan.report.cut
    assert same(model.state_dict(), before)
    report = plan.apply(model)
    assert state_dims(model) == report.state_dims
    assert max(report.state_dims.values()) < 32
    assert torch.isfinite(model(torch.randn(2, 50, 1))).all()


@pytest.mark.parametrize(
    "rule", [{"tolerance": 0.05}, {"states": 10}, {"fraction": 0.4}, {"max_error": 5.0}, {"total_states": 30}]
)
def test_every_rule_keeps_its_word(rule: dict[str, float]) -> None:
    model = classifier()
    report = compress(model, **rule)  # type: ignore[arg-type]
    for layer in report.layers:
        assert layer.certificate is not None
        assert layer.certificate.valid
        hsv = torch.tensor(layer.hsv, dtype=torch.float64)
        if "tolerance" in rule:
            assert layer.certificate.bound / 2 <= 0.05 * float(hsv.sum()) * (1 + 1e-9)
        if "max_error" in rule:
            assert layer.certificate.hinf_error <= layer.certificate.bound <= 5.0 * (1 + 1e-9)
        if "states" in rule:
            assert layer.states_after <= 10
        if "fraction" in rule:
            assert layer.states_after <= 12
    if "total_states" in rule:
        assert sum(report.state_dims.values()) <= 30


def test_tolerance_zero_and_a_shut_gate_leave_the_model_alone() -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    assert not compress(model, tolerance=0.0).cut
    report = compress(model, states=31, min_reduction=0.05)
    assert not report.cut
    assert [layer.outcome for layer in report.layers] == ["kept", "kept"]
    assert report.layers[0].reason == "fewer than 2 of 32 states would go (min_reduction=0.05)"
    assert same(model.state_dict(), before)


def test_a_refused_cut_leaves_model_and_optimizer_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier().train()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 20, 1)).sum().backward()
    optimizer.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(
        compressm.theory.certificate, "MAX_CONDITION", 1.0
    )  # no real basis of eigenvectors is orthogonal
    report = compress(model, states=8, optimizer=optimizer)
    assert [layer.outcome for layer in report.layers] == ["refused", "refused"]
    assert "ill conditioned" in report.layers[0].reason
    assert same(model.state_dict(), before)
    for key, value in optimizer.state_dict()["state"].items():
        assert same(value, state["state"][key])


def test_a_layer_that_has_diverged_is_named_as_such() -> None:
    model = classifier()
    with torch.no_grad():
        model.get_submodule("blocks.1.ssm").get_parameter("B_re")[3, 2] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidSystemError, match=r"blocks\.1\.ssm\.B_re is not finite"):
        compress(model, states=8)
    assert torch.equal(model.state_dict()["blocks.0.ssm.B_re"], before["blocks.0.ssm.B_re"])


def test_report_is_readable_and_json() -> None:
    report = compress(classifier(), tolerance=0.1)
    text = str(report)
    assert "blocks.1.ssm" in text
    assert "→" in text
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["layers"][0]["certificate"]["states_before"] == 32
    assert len(stored["layers"][0]["hsv"]) == 64


def test_compressing_to_a_quality() -> None:
    model = classifier()
    u = torch.randn(16, 60, 1, generator=torch.Generator().manual_seed(0))
    truth = model(u).detach()

    def closeness(m: nn.Module) -> float:
        torch.rand(3)  # an evaluation may draw random numbers, and must not change those of training
        with torch.no_grad():
            return -float((m.eval()(u) - truth).norm() / truth.norm())

    model.train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    report = compress(model, max_drop=0.01, evaluate=closeness)
    assert torch.equal(torch.rand(1), expected)
    assert report.cut
    assert model.training
    assert closeness(model) >= -0.01
    assert (report.metric_before, report.metric_after) == (pytest.approx(0, abs=1e-6), pytest.approx(closeness(model)))
    assert str(report).endswith(f"metric: {report.metric_before:.4g} → {report.metric_after:.4g}")
    further = {name: int(0.8 * n) for name, n in report.state_dims.items()}
    assert closeness_after(model, further, closeness) < -0.01  # it did not stop far short of what was allowed


def test_a_loss_is_better_lower_and_reported_as_it_is() -> None:
    def states(model: nn.Module) -> int:
        return sum(state_dims(model).values())

    best, least = classifier(), classifier()
    compress(best, max_drop=30, evaluate=states)
    report = compress(least, max_drop=30, evaluate=lambda model: -states(model), mode="min")
    assert 34 <= states(least) == states(best) < 64
    assert (report.metric_before, report.metric_after) == (-64, -states(least))
    assert json.loads(json.dumps(report.to_dict()))["metric_after"] == -states(least)


def test_states_that_the_data_leave_at_rest_are_not_removed_if_the_metric_needs_them() -> None:
    torch.manual_seed(0)
    layer = LinearAttention(8, 8)
    before, u = copy.deepcopy(layer), torch.randn(16, 20, 8)
    data = torch.zeros(4, 20, 8)
    data[..., 0] = torch.randn(4, 20)  # one of eight channels

    def closeness(one: nn.Module) -> float:
        with torch.no_grad():
            return -float((one(u) - before(u)).square().mean())

    report = compress(layer, max_drop=1e-9, evaluate=closeness, data=[data])
    assert closeness(layer) >= -1e-9
    assert (report.metric_before, report.metric_after) == (0.0, closeness(layer))
    assert report.layers[0].reason == "the metric dropped by more than max_drop after every cut that was tried"
    assert report.predicted_loss is None  # nothing is known of the loss
    report = compress(layer, max_drop=1.0, evaluate=closeness, data=[data])
    assert report.cut


def closeness_after(model: SequenceClassifier, dims: dict[str, int], closeness) -> float:
    compress(model, states=max(dims.values()))
    return closeness(model)


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidRankRuleError, match="go together"):
        compress(classifier(), max_drop=0.1)
    with pytest.raises(InvalidRankRuleError, match="not both"):
        compress(classifier(), max_drop=0.1, evaluate=lambda _: 0.0, states=3)
    for drop in (-0.1, math.nan, True):  # no cut would ever keep the first two
        with pytest.raises(InvalidRankRuleError, match="max_drop must be a number of at least 0"):
            compress(classifier(), max_drop=drop, evaluate=lambda _: 0.0)
    with pytest.raises(InvalidRankRuleError, match="exactly one"):
        compress(classifier())


def test_a_model_without_state_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no state space layer.*known: .*LRU.*register"):
        compress(nn.Linear(3, 3), states=2)


def test_resizing_makes_room_for_the_weights_of_a_compressed_model() -> None:
    small, fresh = classifier(0), classifier(1)
    compress(small, states=9)
    resize_states(fresh, state_dims(small))
    fresh.load_state_dict(small.state_dict())
    u = torch.randn(2, 20, 1)
    assert torch.equal(fresh(u), small(u))
    with pytest.raises(CheckpointError, match="build the model"):
        resize_states(fresh, {"other": 3})


def test_parameters_that_two_layers_share_are_not_cut_apart() -> None:
    model = torch.nn.Sequential(LRU(4, 16), LRU(4, 16), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].nu_log = model[0].nu_log
    model[3].weight = model[2].weight  # elsewhere it does no harm
    u = torch.randn(1, 30, 4)
    before = model(u)
    report = compress(model, states=12)
    assert [layer.outcome for layer in report.layers] == ["refused", "refused"]
    assert "nu_log is also 1.nu_log" in report.layers[0].reason
    assert torch.equal(model(u), before)
    shared = torch.nn.ModuleList([layer := LRU(4, 16), layer])  # one layer under two names is one layer
    assert compress(shared, states=12).state_dims == {"0": 12}


def test_frozen_parts_stay_in_evaluation_mode_and_a_failed_evaluation_leaves_the_model_whole() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), LRU(4, 16)).train()
    model[0].eval()
    measure(model, lambda m: float(m.eval()(torch.zeros(1, 6, 4)).detach().sum()))
    assert [module.training for module in model] == [False, True]
    seen: list[int] = []

    def fails_at_the_second_size(_: torch.nn.Module) -> float:
        seen.append(model[1].d_state)
        if len(set(seen)) > 1:
            raise RuntimeError("out of memory")
        return 1.0

    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        compress(model, max_drop=0.1, evaluate=fails_at_the_second_size)
    assert seen[-1] < 16
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("option", "value"), [("selection", "randm"), ("method", "modal"), ("carry", "rest")])
def test_a_misspelt_choice_is_refused_with_those_that_there_are(option: str, value: str) -> None:
    with pytest.raises(InvalidRankRuleError, match=f"{option} must be one of '.*; got '{value}'"):
        compress(LRU(4, 16), states=8, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["complex", "real"])
@pytest.mark.parametrize("seed", range(8))
def test_the_energy_kept_is_that_of_all_channels(seed: int, method: Method) -> None:
    torch.manual_seed(seed)
    layer = S4D(3, 12)
    ((_, adapter),) = find_layers(layer).values()
    channels = adapter.read(layer_values(layer))
    spectrum = analyze(layer, method=method).layers[0]
    report = compress(layer, states=4, method=method).layers[0]
    # Channel by channel, since in the real method a real eigenvalue left over takes a whole state of four.
    alone = [
        truncate(balance(DiagonalSystem(lam, B, C), method), 4)
        for lam, B, C in zip(channels.lam, channels.B, channels.C, strict=True)
    ]
    discarded = sum(reduction.certificate.bound for reduction in alone) / 2
    kept = 1 - discarded / float(spectrum.energy.sum())
    assert report.energy_kept == pytest.approx(kept)
    first_four = float(spectrum.energy[..., :4].sum() / spectrum.energy.sum())
    assert report.energy_kept == pytest.approx(first_four) or (method == "real" and report.energy_kept < first_four)
    assert spectrum.energy.shape == (3, 12)


@pytest.mark.parametrize("multiple_of", [1, 2, 4])
def test_an_error_asked_for_is_kept_by_any_multiple(multiple_of: int) -> None:
    cuts = 0
    for seed in range(8):
        for allowed in (1.0, 0.5, 0.25):
            torch.manual_seed(seed)
            layer = LRU(2, 24, r_min=0.0, r_max=0.9)  # fast modes: several real eigenvalues are left over
            report = compress(layer, max_error=allowed, multiple_of=multiple_of).layers[0]
            if report.outcome == "cut":
                assert isinstance(report.certificate, Certificate)
                assert report.certificate.bound <= allowed * (1 + 1e-9)
                assert report.states_after % multiple_of == 0
                cuts += 1
    assert cuts > 10


def test_what_was_kept_is_told_by_what_was_discarded() -> None:
    kept: dict[str, float | None] = {}
    for selection in ("hankel", "random", "smallest", "modal"):
        torch.manual_seed(0)
        (report,) = compress(LRU(4, 32), states=16, selection=selection).layers  # type: ignore[arg-type]
        kept[selection] = report.energy_kept
        assert isinstance(report.certificate, Certificate)
        if selection != "modal":
            discarded = report.certificate.bound / (2 * sum(report.hsv))
            assert kept[selection] == pytest.approx(1 - discarded)
    assert kept["modal"] is None
    assert kept["smallest"] < kept["random"] < kept["hankel"] < 1  # type: ignore[operator]
