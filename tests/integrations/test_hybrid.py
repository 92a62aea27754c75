"""Models of several kinds of layer, and of two directions: what has a state is cut, all else stays bit by bit."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.layers import LRU, S4D, S5, Bidirectional, parameter_groups
from helpers import lru


def hybrid() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        S5(8, 32, dt_min=1e-2),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        S4D(8, 16, dt_min=1e-2),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lru(0, d_state=32),
    )


def test_attention_is_left_alone() -> None:
    model = hybrid()
    kept = {name: value.clone() for name, value in model.state_dict().items() if name[0] in "13"}
    report = compressm.compress(model, fraction=0.5)
    assert report.state_dims == {"0": 16, "2": 8, "4": 16}
    assert {layer.name for layer in report.layers if layer.outcome == "cut"} == {"0", "2", "4"}
    after = model.state_dict()
    assert len(kept) == 24
    for name, value in kept.items():
        assert torch.equal(after[name], value), name


def test_attention_and_its_optimizer_state_are_left_alone_in_training() -> None:
    model = hybrid()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, ssm_lr_factor=0.5))
    compressor = compressm.Compressor(model, optimizer, total_steps=8, states=6, cuts=1, window=0.5)
    attention = [*model[1].parameters(), *model[3].parameters()]
    u, losses, cuts = torch.randn(4, 30, 8), [], 0
    target = u.roll(3, 1)
    for _ in range(8):
        loss = F.mse_loss(model(u), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        before = [(p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in attention]
        if compressor.step() is not None:
            cuts += 1
            for parameter, (value, moment) in zip(attention, before, strict=True):
                assert torch.equal(parameter, value)
                assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    assert cuts == 1
    assert set(compressor.state_dims.values()) == {6}
    assert losses[-1] < losses[0]


def test_directions_with_states_of_their_own_are_cut_apart() -> None:
    torch.manual_seed(1)
    easy, hard = LRU(4, 24, r_min=0.1, r_max=0.5).double(), LRU(4, 24, r_min=0.9, r_max=0.99).double()
    model, u = Bidirectional(easy, hard), torch.randn(2, 300, 4, dtype=torch.float64)
    before = model(u)
    report = compressm.compress(model, tolerance=0.05)
    dims = report.state_dims
    assert dims["forwards"] < dims["backwards"] < 24
    bound = sum(layer.certificate.bound for layer in report.layers)  # type: ignore[union-attr]
    error = (model(u) - before).norm()
    assert 0 < error <= bound * u.norm()


def test_a_cut_bidirectional_classifier_is_saved_and_loaded(tmp_path) -> None:
    torch.manual_seed(2)
    model = compressm.layers.SequenceClassifier(
        2, 3, d_model=6, d_state=16, n_layers=2, layer="s5", bidirectional=True
    ).eval()
    compressm.compress(model, states=7)
    compressm.save(model, tmp_path / "model")
    again, u = compressm.load(tmp_path / "model"), torch.randn(3, 20, 2)
    assert again.config["d_state"] == [7, 7]  # type: ignore[index, call-overload]
    assert torch.equal(again(u), model(u))
