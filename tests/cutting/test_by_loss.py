"""Cuts by data and loss, through `analyze`, `compress` and `Compressor`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values, write
from compressm.cutting import Report, plan_reduction
from compressm.cutting.rise import cut_layers, measured_rise
from compressm.errors import ConfigError, InvalidRankRuleError
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.observing.damage import divergence, linear_changes
from compressm.observing.held_out import gather_halves, joined
from compressm.observing.loss_evidence import divided, evidence_on, gather_evidence
from compressm.theory.covariance import balance_covariances, truncate_covariances
from compressm.theory.evidence import Covariances
from compressm.theory.fisher import MaskFisher, select_by_fisher
from compressm.theory.rank_rule import RankRule


def model(layer: str = "lru", layers: int = 2, states: int = 12, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    own = {"lru": {"r_min": 0.3, "r_max": 0.95}, "mamba2": {"head_dim": 4}}.get(layer, {})
    return SequenceClassifier(2, 4, d_model=8, d_state=states, n_layers=layers, layer=layer, **own, **options).eval()


def batches(count: int = 8, rows: int = 10, length: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, length, 2, generator=generator).cumsum(1) / 3 for _ in range(count)]


def own_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1], reduction="none")


def labelled(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(x, (x[:, -1, 0] > 0).long() + 2 * (x[:, 0, 1] > 0).long()) for x in batches(count)]


def test_the_cut_is_the_truncation_by_the_moments_of_three_quarters_of_the_batches() -> None:
    net, data = model(), labelled()
    expected = copy.deepcopy(net)
    seen = [batch for index, batch in enumerate(data) if index % 4 != 3]
    evidence = gather_evidence(net, seen, own_loss).evidence()
    for name, (layer, adapter) in find_layers(expected).items():
        moments = evidence[name]
        assert isinstance(moments, Covariances)
        reduction = truncate_covariances(balance_covariances(adapter.system(layer), moments), 3)  # type: ignore[arg-type]
        write(layer, adapter.plan(layer_values(layer), reduction))  # type: ignore[union-attr]
    report = compressm.compress(net, states=3, data=data, loss=own_loss)
    assert report.cut
    for (key, value), (_, other) in zip(expected.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


def test_the_predicted_rise_is_that_of_the_changes_of_all_layers_together() -> None:
    net, data = model(), labelled()
    observer = gather_evidence(net, [one for index, one in enumerate(data) if index % 4 != 3], own_loss, keep=1000)
    before = copy.deepcopy(net)
    report = compressm.compress(net, states=4, data=data, loss=own_loss)
    changes = {}
    for name, (layer, adapter) in find_layers(before).items():
        smaller = adapter.system(net.get_submodule(name))
        system = adapter.system(layer)
        assert smaller is not None
        assert system is not None
        calls = observer.samples()[name]
        changes[name] = torch.cat([linear_changes(layer, system, smaller, one) for one in calls])  # type: ignore[arg-type]
    assert report.predicted_loss == pytest.approx(divergence(changes.values()), rel=1e-3)
    for one in report.layers:
        assert one.predicted_loss == pytest.approx(divergence([changes[one.name]]), rel=1e-3)
    assert "predicted rise of the loss" in str(report)
    assert report.to_dict()["predicted_loss"] == report.predicted_loss


def test_the_measured_rise_is_the_divergence_on_the_batches_that_were_held_out() -> None:
    net, data = model(), batches()
    before = copy.deepcopy(net)
    report = compressm.compress(net, states=3, data=data, loss="classification")
    x = torch.cat([data[3], data[7]])
    with torch.no_grad():
        old, new = before(x).double().log_softmax(-1), net(x).double().log_softmax(-1)
    each = (old.exp() * (old - new)).sum(-1)
    assert report.measured_loss == pytest.approx(float(each.mean()), rel=1e-3)
    assert report.measured_loss_error == pytest.approx(float(each.std() / len(x) ** 0.5), rel=1e-2)
    assert f"{report.measured_loss:.3g}" in str(report)


def test_the_rise_of_a_loss_of_ones_own_is_the_difference_of_its_means() -> None:
    net, data = model(), labelled(4)
    smaller = copy.deepcopy(net)
    report = compressm.compress(smaller, states=2, data=data, loss=own_loss)
    x, y = data[3]
    with torch.no_grad():
        expected = F.cross_entropy(smaller(x), y) - F.cross_entropy(net(x), y)
    assert report.measured_loss == pytest.approx(float(expected), abs=1e-6)


def test_of_a_language_model_the_rise_counts_per_token_that_is_not_padding() -> None:
    torch.manual_seed(0)
    net = LanguageModel(11, d_model=8, d_state=8, n_layers=1, layer="mamba2", head_dim=4, padding=0).eval()
    net.blocks[0].ssm.out_proj.weight.data.mul_(20)  # type: ignore[union-attr, index]  # so that the states matter
    rows = torch.randint(1, 11, (160, 9))
    rows[::2, 6:] = 0
    before = copy.deepcopy(net)
    report = compressm.compress(net, states=2, data=list(rows.split(40)), loss="classification")
    with torch.no_grad():
        old, new = before(rows[120:]).double().log_softmax(-1), net(rows[120:]).double().log_softmax(-1)
    each = (old.exp() * (old - new)).sum(-1)[rows[120:] != 0]
    assert report.measured_loss == pytest.approx(float(each.mean()), rel=1e-3)
    assert report.predicted_loss is not None
    assert 0.4 < report.predicted_loss / report.measured_loss < 2.5


@pytest.mark.parametrize("layer", ["lru", "mamba2"])
@pytest.mark.parametrize("allowed", [1e-3, 1e-5])
def test_max_loss_is_kept_on_held_out_data(layer: str, allowed: float) -> None:
    net, data = model(layer), batches()
    report = compressm.compress(net, max_loss=allowed, data=data, loss="classification")
    assert report.cut
    assert report.predicted_loss is not None
    assert report.predicted_loss <= allowed
    assert report.measured_loss is not None
    assert report.measured_loss <= allowed


def test_nothing_is_cut_where_no_cut_keeps_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # On data of another kind every cut does harm that evidence did not show.
    net, data = model(), batches()
    data[3::4] = [100 * x for x in data[3::4]]
    before = copy.deepcopy(net.state_dict())
    report = compressm.compress(net, max_loss=1e-12, data=data, loss="classification")
    assert report.measured_loss is None or report.measured_loss <= 1e-12
    if not report.cut:
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_budget_goes_to_the_layer_whose_states_the_loss_needs() -> None:
    net, data = model(states=16), batches()
    for parameter in net.blocks[1].parameters():  # type: ignore[union-attr, index]
        parameter.data.mul_(0.1)  # the second block hardly acts
    report = compressm.compress(net, total_states=12, data=data, loss="classification")
    first, second = report.state_dims.values()
    assert first + second <= 12
    assert first > second >= 1


def cut_as_in_training(net: nn.Module, states: int, seen: list[tuple[Tensor, Tensor]]) -> Report:
    """Without trying other ways to pick the states; see `compressm.cutting.picking`."""
    moments, evidence = joined(gather_halves(net, seen)), evidence_on(net, seen, own_loss)
    return plan_reduction(net, RankRule(states=states, min_reduction=0.0), moments=moments, loss=evidence).apply(net)


def cut_to_five(kind: str) -> list[tuple[Any, Any, MaskFisher]]:
    """Every layer before and after a cut to five states by the loss, and the mask's Fisher matrix it was made from."""
    net, data = model(kind), labelled()
    before = copy.deepcopy(net)
    evidence = gather_evidence(net, data, own_loss).evidence()
    cut_as_in_training(net, 5, data)
    found: list[tuple[Any, Any, MaskFisher]] = []
    for name, (layer, _) in find_layers(before).items():
        fisher = evidence[name]
        assert isinstance(fisher, MaskFisher)
        found.append((layer, net.get_submodule(name), fisher))
    assert found
    return found


def test_states_of_mamba2_are_picked_by_the_masks_fisher_matrix() -> None:
    for old, new, fisher in cut_to_five("mamba2"):
        kept = select_by_fisher(fisher, 5).kept[0]
        d, n = old.d_inner, 12
        B = old.in_proj.weight[2 * d : 2 * d + n]
        torch.testing.assert_close(new.in_proj.weight[2 * d : 2 * d + 5], B[kept])


def test_channels_of_griffins_block_are_picked_by_the_mask_which_sees_its_gates() -> None:
    for old, new, fisher in cut_to_five("rg_lru"):
        selection = select_by_fisher(fisher, 5, gains=True)
        kept, gains = selection.kept[0], selection.gains[0].float()
        for part, expected in (
            ("linear_x.weight", old.get_parameter("linear_x.weight")[kept]),
            ("linear_out.weight", old.get_parameter("linear_out.weight")[:, kept] * gains),
        ):
            torch.testing.assert_close(new.get_parameter(part), expected)


def test_above_the_range_of_the_prediction_states_of_mamba2_are_picked_by_second_moments() -> None:
    white, data = model("mamba2"), labelled()
    white.decoder.weight.data.mul_(1e3)  # type: ignore[union-attr]  # so that every state matters much to the loss
    by_loss = copy.deepcopy(white)
    report = cut_as_in_training(by_loss, 2, data)
    assert (report.predicted_loss or 0.0) > 0.5
    compressm.compress(white, states=2, data=data)
    for (key, value), (_, other) in zip(white.state_dict().items(), by_loss.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


def test_analysis_tells_the_rise_if_one_layer_is_cut() -> None:
    net, data = model(states=8), batches()
    spectrum = compressm.analyze(net, data=data, loss="classification")
    observer = gather_evidence(net, data, keep=1000)
    for name, (layer, adapter) in find_layers(net).items():
        rise = spectrum[name].rise
        assert rise is not None
        assert rise.shape == (9,)
        assert float(rise[8]) == 0
        assert bool((rise[:-1] >= rise[1:]).all())
        moments = observer.evidence()[name]
        system = adapter.system(layer)
        assert isinstance(moments, Covariances)
        assert system is not None
        reduction = truncate_covariances(balance_covariances(system, moments), 2)
        exact = [linear_changes(layer, system, reduction.system, one) for one in observer.samples()[name]]  # type: ignore[arg-type]
        assert float(rise[2]) == pytest.approx(divergence([torch.cat(exact)]), rel=0.5)  # labels are drawn anew
        nats = float(rise[3])
        assert spectrum[name].states_within(nats) <= 3
    assert "nats=0.1" in str(spectrum)
    assert list(spectrum.to_dataframe().columns) == ["layer", "state", "energy", "discarded", "rise"]
    assert "rise" in spectrum.to_dict()["blocks.0.ssm"]
    white = compressm.analyze(net)
    assert white["blocks.0.ssm"].rise is None
    assert "nats" not in str(white)
    with pytest.raises(ConfigError, match=r"loss of 'blocks\.0\.ssm' is not known"):
        white["blocks.0.ssm"].states_within(0.1)


def test_layers_are_exchanged_while_the_rise_is_measured_and_put_back() -> None:
    net = model()
    net.blocks[1].ssm = net.blocks[0].ssm  # type: ignore[union-attr, index]  # one layer in two places
    change = compressm.cutting.plan_reduction(net, compressm.theory.rank_rule.RankRule(states=2)).changes
    layer = net.get_submodule("blocks.0.ssm")
    with cut_layers(net, change) as smaller:
        assert smaller.get_submodule("blocks.0.ssm") is smaller.get_submodule("blocks.1.ssm") is not layer
    assert net.get_submodule("blocks.0.ssm") is net.get_submodule("blocks.1.ssm") is layer
    alone = layer
    change = compressm.cutting.plan_reduction(alone, compressm.theory.rank_rule.RankRule(states=2)).changes
    assert measured_rise(alone, change, [torch.randn(3, 6, 8)], "regression").nats > 0


def test_every_fourth_batch_is_held_out_or_a_quarter_of_the_rows() -> None:
    net = model()
    seen, held_out = divided(net, batches(9))
    assert (len(seen), len(held_out)) == (7, 2)
    (x, y), *_ = labelled(1)
    seen, held_out = divided(net, [(x, y)])
    assert torch.equal(torch.cat([one[0] for one in (*seen, *held_out)]), x)
    assert torch.equal(torch.cat([one[1] for one in (*seen, *held_out)]), y)
    assert len(held_out) == 1
    with pytest.raises(ConfigError, match="fewer than four sequences"):
        divided(net, x[:3])


def test_arguments_that_contradict_each_other_are_refused_at_once() -> None:
    net, data = model(), batches(4)
    for options, message in (
        ({"max_loss": 0.1}, "white noise does not tell"),
        ({"states": 2, "loss": "classification"}, "data is missing"),
        ({"states": 2, "gramians": "loss", "data": data}, "loss is missing"),
        ({"states": 2, "gramians": "data"}, "gramians must be one of 'white', 'loss'"),
        ({"states": 2, "gramians": "white", "data": data, "loss": "regression"}, "loss='regression' is given"),
        ({"states": 2, "data": data, "loss": "classification", "method": "complex"}, "method='complex'"),
        ({"states": 2, "data": data, "loss": "classification", "selection": "random"}, "selection='random'"),
        ({"max_error": 0.1, "data": data, "loss": "classification"}, "bound under white noise"),
        ({"max_loss": -1.0, "data": data, "loss": "classification"}, "max_loss must be"),
    ):
        with pytest.raises(InvalidRankRuleError, match=message):
            compressm.compress(net, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRankRuleError, match="data is missing"):
        compressm.analyze(net, loss="classification")


def trainer(net: nn.Module, steps: int, **options: Any) -> tuple[compressm.Compressor, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    return compressm.Compressor(net, optimizer, steps, gramians="loss", **options), optimizer


def train(net: nn.Module, compressor: compressm.Compressor, optimizer: torch.optim.Optimizer, steps: range) -> None:
    net.train()
    for step in steps:
        x, y = labelled(12)[step % 12]
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        compressor.step()


RULES: tuple[dict[str, Any], ...] = ({"states": 4}, {"total_states": 9}, {"max_loss": 1e-3}, {"tolerance": 0.05})


@pytest.mark.parametrize(
    ("layer", "rule"),
    [  # every rule and both kinds of layer; the other pairs are exhaustive
        pytest.param(layer, rule, marks=() if (layer == "lru") == (index % 2 == 0) else pytest.mark.exhaustive)
        for layer in ("lru", "mamba2")
        for index, rule in enumerate(RULES)
    ],
)
def test_a_training_resumed_at_any_point_cuts_as_one_that_went_through(layer: str, rule: dict[str, Any]) -> None:
    whole = model(layer, dropout=0.0)
    compressor, optimizer = trainer(whole, 40, cuts=2, window=0.5, **rule)
    train(whole, compressor, optimizer, range(40))
    assert [event.kind for event in compressor.history] == ["cut", "cut"] or len(compressor.history) == 2
    assert compressor.history[0].predicted_loss is not None  # type: ignore[union-attr]
    broken = model(layer, dropout=0.0)
    first, optimizer = trainer(broken, 40, cuts=2, window=0.5, **rule)
    train(broken, first, optimizer, range(16))
    state = copy.deepcopy((broken.state_dict(), optimizer.state_dict(), first.state_dict()))
    resumed = model(layer, dropout=0.0)
    second, optimizer = trainer(resumed, 40, cuts=2, window=0.5, **rule)
    second.load_state_dict(state[2])
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, second, optimizer, range(16, 40))
    for (key, value), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


def test_gradients_are_observed_just_before_cuts_and_nothing_in_between() -> None:
    net = model()
    compressor, optimizer = trainer(net, 1000, states=4, cuts=1, window=0.1)
    observer = compressor._cutter.observations.observer
    assert observer is not None
    train(net, compressor, optimizer, range(49))
    assert observer._passes == 1  # the first step alone
    train(net, compressor, optimizer, range(49, 99))
    assert observer._passes == 51  # and the last fifty, of which the last is armed
    evidence = observer.evidence()["blocks.0.ssm"]
    assert isinstance(evidence, Covariances)
    train(net, compressor, optimizer, range(99, 110))
    assert compressor.done
    assert observer._passes == 51
    assert observer.unseen == ["blocks.0.ssm", "blocks.1.ssm"]  # forgotten with the cut


def test_a_layer_that_no_gradient_reaches_is_named_in_the_first_step() -> None:
    net = model()
    compressor, optimizer = trainer(net, 100, states=4)
    net.blocks[0].requires_grad_(False)  # type: ignore[union-attr, index]
    net.encoder.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"no gradient has passed through 'blocks\.0\.ssm'"):
        train(net, compressor, optimizer, range(1))


def test_in_training_what_balances_must_fit_the_rule() -> None:
    net = model()
    for options, message in (
        ({"max_error": 0.1}, "bound under white noise"),
        ({"states": 3, "method": "complex"}, "method='complex'"),
        ({"states": 3, "selection": "random"}, "selection='random'"),
    ):
        with pytest.raises(InvalidRankRuleError, match=message):
            trainer(net, 100, **options)
