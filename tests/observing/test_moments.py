from __future__ import annotations

import copy
import functools
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.errors import ConfigError, UnsupportedModelError
from compressm.layers import LanguageModel, Mamba, SequenceClassifier, parameter_groups
from compressm.observing.moments import Statistics
from compressm.observing.over_data import gather
from compressm.saving.checkpoint import load_tree, save_tree
from compressm.theory.recurrence import Signals, moments
from compressm.training.compressor import Compressor
from helpers import spawned


def model(seed: int = 0, layer: str = "mamba", d_state: int = 16) -> SequenceClassifier:
    torch.manual_seed(seed)
    options = {"head_dim": 4, "n_groups": 2} if layer == "mamba2" else {}
    return SequenceClassifier(1, 3, 4, d_state, 2, dropout=0.0, layer=layer, **options)


def batches(count: int = 3, size: int = 4, length: int = 20, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, length, 1, generator=generator).cumsum(1) for _ in range(count)]


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) for m in module.modules())


def test_an_observation_is_made_once_in_training_and_changes_nothing() -> None:
    net, plain, (u,) = model(), model(), batches(1)
    statistics = Statistics(net)
    statistics.observe_next()
    net.eval()
    net(u)
    assert statistics.state_dict() == {}  # evaluation data are not looked at
    net.train()
    net(u).sum().backward()
    plain(u).sum().backward()
    statistics.close()
    assert hooks(net) == 0
    for mine, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
    assert {float(m.tokens) for m in statistics.moments().values()} == {20.0}
    net(u)
    assert {float(m.tokens) for m in statistics.moments().values()} == {20.0}


def test_batches_of_all_forms_add_up() -> None:
    net, data = model(), batches()
    whole = gather(net, [torch.cat(data)], sequences=12)
    assert net.training
    labels = torch.zeros(4)
    for form in ([*data], [(u, labels) for u in data], [[u] for u in data], [{"u": u} for u in data]):
        found = gather(net, form)
        for name, value in whole.items():
            for key, tensor in value.tensors().items():
                torch.testing.assert_close(found[name].tensors()[key], tensor, rtol=1e-4, atol=1e-5)
    assert hooks(net) == 0


def test_models_without_selective_layers_need_no_data() -> None:
    lru = SequenceClassifier(1, 3, 4, 8)
    assert gather(lru, []) == {}
    assert Statistics(lru).moments() == {}
    for call in (compressm.analyze, lambda net: compressm.compress(net, states=4)):
        with pytest.raises(UnsupportedModelError, match=r"'blocks.0.ssm' is a selective layer.*by data="):
            call(model())
    with pytest.raises(ConfigError, match="data hold no batch"):
        gather(model(), [])
    with pytest.raises(UnsupportedModelError, match="of which none has passed through it yet"):
        Statistics(model()).moments()


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_one_shot(layer: str, tmp_path: Path) -> None:
    net, data = model(layer=layer).eval(), batches(4)
    spectrum = compressm.analyze(net, data=data)
    assert [s.states for s in spectrum] == [16, 16]
    before = net(data[0]).detach()
    report = compressm.compress(net, states=8, data=data)
    assert report.cut
    assert set(report.state_dims.values()) == {8}
    assert "16 → 8" in str(report)
    for reported in report.layers:
        assert reported.to_dict()["certificate"]["relative_error"] < 0.6
    torch.testing.assert_close(net(data[0]), before, rtol=0.3, atol=0.3 * float(before.abs().max()))
    compressm.save(net, tmp_path)
    assert torch.equal(compressm.load(tmp_path)(data[0]), net(data[0]))
    again = compressm.compress(net, max_reduction=1.0, max_drop=1e9, evaluate=lambda _: 0.0, data=data)
    assert set(again.state_dims.values()) == {1}


def test_language_models_are_compressed_too() -> None:
    torch.manual_seed(0)
    net, tokens = LanguageModel(11, 8, 12), torch.randint(11, (4, 30))
    before = net(tokens).detach()
    compressm.compress(net, states=6, data=[tokens])
    torch.testing.assert_close(net(tokens), before, rtol=0, atol=0.1 * float(before.abs().max()))
    assert net.generate(tokens[:, :3], 4).shape == (4, 7)


class Loop:
    def __init__(self, steps: int = 40, **arguments) -> None:
        self.net = model()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.net, 3e-3))
        self.compressor = Compressor(self.net, self.optimizer, steps, window=0.5, **arguments)
        self.step = 0

    def run(self, until: int) -> list[float]:
        losses = []
        while self.step < until:
            (u,) = batches(1, seed=self.step)
            loss = F.cross_entropy(self.net(u), (u.mean((1, 2)) > 0).long())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.item())
            self.compressor.step()
        return losses


def test_a_model_shrinks_while_it_trains() -> None:
    loop = Loop(states=4, cuts=2)
    loop.run(40)
    assert [event.kind for event in loop.compressor.history] == ["cut", "cut"]
    assert set(loop.compressor.state_dims.values()) == {4}
    assert hooks(loop.net) == 0  # no observation goes on after the last cut
    for group in loop.optimizer.param_groups:
        for parameter in group["params"]:
            assert loop.optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_settled_spectra_are_recognised() -> None:
    still = Loop(tolerance=0.2, cuts=1, when="settled")
    for group in still.optimizer.param_groups:
        group["lr"] = 1e-9
    still.run(20)
    assert [event.kind for event in still.compressor.history][:1] == ["cut"]


def test_a_search_goes_on_after_a_setback_with_the_moments_from_before_it() -> None:
    metrics = iter([0.9] * 4 + [0.1, 0.1] + [0.9] * 20)  # bad right after the first cut and at its examination
    loop = Loop(cuts=1, max_drop=0.1, evaluate=lambda _: next(metrics), check_after=3)
    loop.run(32)
    assert [event.kind for event in loop.compressor.history] == ["cut", "rolled_back", "cut", "kept"]
    assert set(loop.compressor.state_dims.values()) == {12}


def test_a_setback_is_undone_and_resizes() -> None:
    metrics = iter([0.9] * 4 + [0.1, 0.1])
    loop = Loop(states=2, cuts=1, max_drop=0.1, evaluate=lambda _: next(metrics), check_after=3, on_setback="stop")
    loop.run(20)
    before = copy.deepcopy(loop.compressor.state_dict()["observed"]["model"])
    loop.run(23)
    assert [event.kind for event in loop.compressor.history[-3:]] == ["rolled_back", "stopped", "fell_short"]
    assert set(loop.compressor.state_dims.values()) == {16}
    for name, value in loop.net.state_dict().items():
        assert torch.equal(value, before[name])


@functools.cache
def unbroken_losses() -> list[float]:
    return Loop(states=4, cuts=2).run(30)


@pytest.mark.parametrize("at", [3, 10, 17])
def test_interrupted_anywhere_it_goes_on_as_if_unbroken(at: int, tmp_path: Path) -> None:
    first = Loop(states=4, cuts=2)
    first.run(at)
    save_tree(
        tmp_path, {"c": first.compressor.state_dict(), "m": first.net.state_dict(), "o": first.optimizer.state_dict()}
    )
    tree, second = load_tree(tmp_path), Loop(states=4, cuts=2)
    second.compressor.load_state_dict(tree["c"])
    second.net.load_state_dict(tree["m"])
    second.optimizer.load_state_dict(tree["o"])
    second.step = at
    assert second.run(30) == unbroken_losses()[at:]


def observe_share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = model()
    statistics = Statistics(net, sequences=4)
    statistics.observe_next()
    net(batches(2)[rank])
    save_tree(f"{folder}/{rank}", {name: value.tensors() for name, value in statistics.moments().items()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_sum_their_moments(tmp_path: Path) -> None:
    spawned(2, observe_share, str(tmp_path))
    whole = gather(model(), batches(2))
    shares = [load_tree(tmp_path / str(rank)) for rank in range(2)]
    for name, value in whole.items():
        for key, tensor in value.tensors().items():
            assert torch.equal(shares[0][name][key], shares[1][name][key])
            torch.testing.assert_close(shares[0][name][key], tensor, rtol=1e-4, atol=1e-5)


def test_a_model_trained_in_evaluation_mode_is_told_so_at_once() -> None:
    model = Mamba(4, 8).eval()  # as transformers' from_pretrained returns it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor = Compressor(model, optimizer, 40, states=4, cuts=1)
    model(torch.randn(1, 6, 4)).square().mean().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"call model.train\(\) before training"):
        compressor.step()
    for _ in range(2):
        optimizer.step()
        compressor.step()
    optimizer.step()
    with pytest.raises(UnsupportedModelError, match=r"call model.train\(\) before training"):
        compressor.step()


def test_looking_at_data_leaves_every_mode_as_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), Mamba(4, 8)).train()
    model[0].eval()
    gather(model, [torch.randn(2, 6, 4)])
    assert [module.training for module in model] == [False, True]


def test_padding_of_a_classifier_does_not_count() -> None:
    torch.manual_seed(0)
    net = SequenceClassifier(1, 3, 4, 8, 2, dropout=0.0, layer="mamba", vocabulary=20)
    tokens = torch.randint(1, 20, (4, 30))
    padded = torch.cat([tokens, torch.zeros(4, 50, dtype=torch.long)], 1)
    plain, other = gather(net, [tokens]), gather(net, [padded])
    for name, value in plain.items():
        for key, tensor in value.tensors().items():
            torch.testing.assert_close(
                other[name].tensors()[key], tensor, rtol=1e-4, atol=1e-6 * float(tensor.abs().max())
            )
    compressor = Compressor(net, torch.optim.Adam(net.parameters()), 20, states=4)
    net.eval()(torch.randint(1, 20, (4, 80)))  # of which nothing is remembered
    net.train()(padded)
    seen = {float(value["tokens"]) for value in compressor.state_dict()["moments"].values()}
    assert seen == {30.0}
    compressor.step()


@pytest.mark.parametrize("told_by", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_are_kept_apart(told_by: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(vocab_size=20, hidden_size=8, state_size=4, num_heads=4, head_dim=4, expand=2,
                                       num_hidden_layers=1, n_groups=1, chunk_size=8)  # fmt: skip
    layer = transformers.Mamba2Model(config).layers[0].mixer
    with torch.no_grad():
        layer.dt_bias.fill_(-4.0)  # slow states, which would go on into the next sequence
    sequences = [torch.randn(1, length, 8) for length in (12, 5, 20)]
    expected = Statistics(layer, memory=1.0)
    for hidden in sequences:
        expected.observe_next(training_only=False)
        layer(hidden)
    expected.close()
    places = torch.tensor([0, 12, 17, 37], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), places.diff())[None]
    packed, together = Statistics(layer), Statistics(layer)
    for statistics, arguments in ((packed, {told_by: numbers if told_by == "seq_idx" else places}), (together, {})):
        statistics.observe_next(training_only=False)
        with suppress(ValueError):  # without CUDA, transformers refuses packed sequences, after the hook has seen them
            layer(torch.cat(sequences, 1), **arguments)
        statistics.close()
    for name, value in expected.moments()[""].tensors().items():
        torch.testing.assert_close(packed.moments()[""].tensors()[name], value, rtol=1e-5, atol=1e-6)
    assert together.moments()[""].P[0].trace() > 1.1 * packed.moments()[""].P[0].trace()


def test_long_sequences_are_added_up_to_many_digits() -> None:
    torch.manual_seed(0)
    rates = torch.tensor([[1.0, 1.01, 1.02, 1.05]])
    length = 4096
    signals = Signals(torch.randn(1, length, 1), torch.full((1, length, 1), 1e-3), rates, torch.ones(1, length, 1, 4),
                      torch.ones(1, length, 1, 4))  # fmt: skip
    # The decays are float32's: what is tested are the sums.
    decay, h, P = torch.exp(torch.tensor(-1e-3) * rates).double(), torch.zeros(1, 4, dtype=torch.float64), 0
    for x in signals.x.double().flatten():
        h = decay * h + x
        P = P + h.T @ h
    torch.testing.assert_close(moments(signals).P[0], torch.as_tensor(P), rtol=2e-6, atol=0)
