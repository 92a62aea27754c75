"""Cuts by data and loss of unusual models, batches and losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.cutting import plan_reduction
from compressm.cutting.rise import cut_layers, measured_rise
from compressm.errors import ConfigError, InvalidRankRuleError
from compressm.layers import LRU, LanguageModel, SequenceClassifier
from compressm.observing.damage import selective_damages
from compressm.observing.labels import divergences
from compressm.observing.loss_evidence import LossEvidence, divided, gather_evidence
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import choose_ranks


def data(count: int = 8, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 16, width, generator=generator).cumsum(1) / 3 for _ in range(count)]


class Twice(nn.Module):
    """One layer in two places of the same parent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = LRU(4, 8)
        self.body, self.out = nn.Sequential(layer, nn.Tanh(), layer), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean(1))


class ByChannel(nn.Module):
    """A layer whose rows are the channels of the sequences, and another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = LRU(1, 8), LRU(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.first(x.mT.reshape(batch * width, length, 1)).view(batch, width, length).mT
        return self.out(self.second(y.tanh()).mean(1))


class WithAnchor(nn.Module):
    """A layer that reads all sequences, and then the first one again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ssm, self.out = LRU(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.ssm(x).mean(1) + self.ssm(x[:1]).mean(1))


def kl(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        old, new = before(x).double().log_softmax(-1), after(x).double().log_softmax(-1)
    return float((old.exp() * (old - new)).sum(-1).mean())


@pytest.mark.parametrize("kind", [Twice, ByChannel, WithAnchor])
def test_the_measured_rise_is_that_of_the_model_as_cut(kind: type[nn.Module]) -> None:
    net, batches = kind(), data()
    before = copy.deepcopy(net)
    report = compressm.compress(net, states=2, data=batches, loss="classification")
    expected = (kl(before, net, batches[3]) + kl(before, net, batches[7])) / 2
    assert expected > 1e-6
    assert report.measured_loss == pytest.approx(expected, rel=1e-2)


def test_all_places_of_a_layer_in_one_parent_are_exchanged() -> None:
    net = Twice()
    layer = net.body[0]
    change = plan_reduction(net, RankRule(states=2)).changes
    with cut_layers(net, change):
        assert net.body[0] is net.body[2] is not layer
    assert net.body[0] is net.body[2] is layer


@pytest.mark.parametrize(("kind", "name"), [(ByChannel, "first"), (WithAnchor, "ssm")])
def test_of_rows_that_are_not_the_models_sequences_no_rise_is_predicted(kind: type[nn.Module], name: str) -> None:
    net = kind()
    observer = gather_evidence(net, data(), keep=1000)
    assert observer.unlike == {name}
    assert name not in observer.samples()
    assert all(len(passes) == 4 * 8 for passes in observer.samples().values())  # four probes of eight batches
    report = compressm.compress(kind(), total_states=6, data=data(), loss="classification")
    assert report.cut
    assert sum(report.state_dims.values()) <= 6
    assert report.predicted_loss is None
    with pytest.raises(InvalidRankRuleError, match=f"there is none for '{name}'.*exclude="):
        compressm.compress(net, max_loss=0.1, data=data(), loss="classification")


def test_lists_of_labels_and_lengths_are_divided_with_their_rows() -> None:
    torch.manual_seed(0)
    net, (x, *_) = SequenceClassifier(4, 3, d_model=8, d_state=8, n_layers=1), data(1)
    lengths, names = [16, 3, 5, 16, 2, 7], list("abcdef")
    named = [part for each in divided(net, {"u": x, "lengths": lengths}) for part in each]
    assert [one for part in named for one in part["lengths"]] == lengths
    pairs = [part for each in divided(net, [(x, names)]) for part in each]
    assert [one for part in pairs for one in part[1]] == names
    assert torch.equal(torch.cat([part[0] for part in pairs]), x)
    report = compressm.compress(net, states=4, data=[(x, [0, 1, 2, 0, 1, 2])], loss=with_lists)
    assert report.cut


def with_lists(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, torch.tensor(batch[1]), reduction="none")


def test_a_class_that_a_mask_excludes_adds_nothing_to_the_divergence() -> None:
    old, new = torch.tensor([[0.3, -torch.inf, 1.0]]), torch.tensor([[0.1, -torch.inf, 1.4]])
    p, q = old[:, [0, 2]].double().softmax(-1), new[:, [0, 2]].double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergences(old, new, "classification"), expected)


def test_a_loss_without_gradient_or_that_is_not_finite_is_refused() -> None:
    net = Twice()
    for loss, message in (
        (lambda output, _: output.detach().sum(-1), "the losses have no gradient"),
        (lambda output, _: (output.argmax(-1) == 0).float(), "the losses have no gradient"),
        (
            lambda output, _: output.sum(-1) * torch.tensor([1, 1, torch.nan, 1, 1, 1]),
            "the loss of sequence 2 of a batch is nan",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            compressm.compress(net, states=2, data=data(), loss=loss)
    other: Any = "mse"
    for act in (
        lambda: compressm.compress(net, states=2, data=data(), loss=other),
        lambda: compressm.analyze(net, data=data(), loss=other),
    ):
        with pytest.raises(InvalidRankRuleError, match="loss must be one of 'classification', 'regression'; got 'mse'"):
            act()


@pytest.mark.parametrize("total", [4, 5, 9])
def test_a_budget_is_kept_where_the_floors_are_rounded_up(total: int) -> None:
    sizes = {"a": 60, "b": 15, "c": 15, "d": 10}
    damages = {name: torch.arange(n, -1, -1.0) for name, n in sizes.items()}
    energies = {name: torch.ones(n) for name, n in sizes.items()}
    ranks = choose_ranks(energies, RankRule(total_states=total), damages=damages)
    assert sum(ranks.values()) == total
    assert min(ranks.values()) >= 1


def test_multiples_do_not_lift_a_floor_above_the_budget() -> None:
    sizes = {"a": 2000, "b": 8, "c": 8}
    damages = {name: torch.arange(n, -1, -1.0) for name, n in sizes.items()}
    ranks = choose_ranks(
        {k: torch.ones(n) for k, n in sizes.items()}, RankRule(total_states=24, multiple_of=8), damages=damages
    )
    assert ranks == {"a": 8, "b": 8, "c": 8}


def test_a_plan_whose_prediction_stays_above_max_loss_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Twice()
    evidence = LossEvidence.of(gather_evidence(net, data(), keep=100))
    plan = plan_reduction(net, RankRule(max_loss=1.0), loss=evidence)
    assert plan.changes
    # Curves that promise far too little: whatever is chosen by them costs more than it may.
    monkeypatch.setattr("compressm.cutting.plan.damage_curves", lambda *_: {"body.0": torch.zeros(9)})
    plan = plan_reduction(net, RankRule(max_loss=1e-12), loss=evidence)
    assert not plan.changes
    assert plan.report.predicted_loss == 0
    (layer,) = plan.report.layers
    assert (layer.outcome, layer.states_after, layer.predicted_loss) == ("kept", 8, None)
    assert "predicted rise of the loss was above max_loss" in layer.reason


def test_sizes_without_a_valid_cut_are_left_out_of_a_selective_curve() -> None:
    class Balanced:
        hsv = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)

    gradients = [torch.eye(3, dtype=torch.float64).expand(5, 1, 3, 3)]
    curve = selective_damages(Balanced(), gradients, lambda _: None)  # type: ignore[arg-type]
    assert float(curve[0]) == pytest.approx(4.5)  # 1/2 (1 + 1 + 1)^2
    assert float(curve[3]) == 0


def test_a_forward_without_gradients_before_the_training_s_own_does_not_count() -> None:
    dims: list[list[int]] = []
    predicted: list[Any] = []
    for twice in (False, True):
        net = Twice()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        compressor = compressm.Compressor(net, optimizer, 20, states=3, gramians="loss", cuts=1, window=0.5)
        for x in data(12):
            if twice:
                with torch.no_grad():
                    net(x)
            optimizer.zero_grad()
            F.cross_entropy(net(x), (x[:, -1, 0] > 0).long()).backward()
            optimizer.step()
            compressor.step()
        dims.append(list(compressor.state_dims.values()))
        predicted.append(compressor.history[0].predicted_loss)  # type: ignore[union-attr]
    assert dims == [[3], [3]]
    assert predicted[0] == predicted[1] is not None


@pytest.mark.parametrize(
    "rule", [{"max_loss": 1.0}, {"max_loss": 1.0, "max_reduction": 0.25}, {"states": 1, "max_reduction": 0.25}]
)
def test_real_eigenvalues_do_not_make_a_cut_larger_than_max_reduction(rule: dict[str, Any]) -> None:
    share = rule.get("max_reduction", 0.5)
    for seed, states in ((0, 7), (1, 12), (2, 5), (3, 12), (4, 7)):
        torch.manual_seed(seed)
        net = SequenceClassifier(4, 3, d_model=4, d_state=states, n_layers=2, layer="lru", r_min=0.1, r_max=0.9)
        blocks: Any = net.blocks
        for block in blocks:
            block.ssm.theta_log.data.sub_(4)  # nearly real eigenvalues, of which each may take a whole state
        loss: dict[str, Any] = {"loss": "classification"} if "max_loss" in rule else {}
        report = compressm.compress(net, data=data(4), **rule, **loss)
        assert min(report.state_dims.values()) >= states - int(share * states)


def test_a_model_of_layers_that_cannot_be_observed_alone_is_cut_without_a_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As layers of flash-linear-attention and mamba_ssm, which need a GPU.
    monkeypatch.setattr("compressm.observing.observer.can_be_masked", lambda _: False)
    torch.manual_seed(0)
    net = SequenceClassifier(4, 3, d_model=8, d_state=8, n_layers=2, layer="mamba2", head_dim=4)
    by_moments = copy.deepcopy(net)
    batches = data()
    assert "blocks.0.ssm" in str(compressm.analyze(net, data=batches, loss="classification"))
    report = compressm.compress(net, states=3, data=batches, loss="classification")
    assert report.predicted_loss is None
    assert report.measured_loss is not None
    compressm.compress(by_moments, states=3, data=[batch for index, batch in enumerate(batches) if index % 4 != 3])
    for (key, value), (_, other) in zip(net.state_dict().items(), by_moments.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


class Reader(nn.Module):
    """A language model that takes the arguments of one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LanguageModel(20, d_model=8, d_state=8, n_layers=1).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int = 0) -> Tensor:
        del attention_mask
        return self.model(input_ids)[:, -logits_to_keep:]


def test_of_the_last_predictions_those_at_padding_do_not_count() -> None:
    """Rows 0 to 3 of eight end in padding. The last quarter is held out: rows 6 and 7."""
    model, ids = Reader(), torch.randint(20, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:4, 9:], mask[6, 9:11] = 0, 0
    before = copy.deepcopy(model)
    batch = {"input_ids": ids, "attention_mask": mask}
    report = compressm.compress(model, states=2, data={**batch, "logits_to_keep": 3}, loss="classification")
    with torch.no_grad():
        old, new = (one(ids, mask)[6:, -3:].double().log_softmax(-1) for one in (before, model))
    each = (old.exp() * (old - new)).sum(-1)[mask[6:, -3:].bool()]
    assert len(each) == 4
    assert report.measured_loss == pytest.approx(float(each.mean()), rel=1e-5)
    padded = {"input_ids": ids[:4], "attention_mask": mask[:4], "logits_to_keep": 3}
    with pytest.raises(ConfigError, match="no prediction that is not at padding"):
        compressm.compress(before, states=2, data=padded, loss="classification")
    with pytest.raises(ConfigError, match="no prediction that is not at padding"):
        measured_rise(before, {}, padded, "classification")
