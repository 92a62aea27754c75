"""Sequences of unequal length in one batch: every result is that of each sequence alone, whatever stands behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressm.layers import LRU, S5, Bidirectional, LanguageModel, Mamba, SequenceClassifier
from compressm.layers.models import GATED, TIME_INVARIANT, SequenceBatchNorm
from compressm.layers.padding import ends, reverse

LENGTHS = [9, 14, 1, 5]
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 4},
    "mamba3": {"head_dim": 4},
    "linear_attention": {"n_heads": 2},
    "gated_linear_attention": {"n_heads": 2},
    "delta_net": {"n_heads": 2},
    "hyena": {"max_length": 32},
    "s4": {"max_length": 32},
}
KINDS = [*((layer, {}) for layer in (*TIME_INVARIANT, *GATED)), ("s5", {"bidirectional": True})]
IDS = [layer + "".join(f", {key}" for key in extra) for layer, extra in KINDS]


def classifier(layer: str, **options: Any) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(2, 3, 6, 4, 2, dropout=0.0, layer=layer, **OPTIONS.get(layer, {}), **options).double()


def sequences() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1, length, 2, dtype=torch.float64) for length in LENGTHS]


def padded(parts: list[Tensor], fill: float = 0.0) -> Tensor:
    longest = max(part.shape[1] for part in parts) + 2  # more padding than there must be
    rows = [torch.cat([p, p.new_full((1, longest - p.shape[1], *p.shape[2:]), fill)], 1) for p in parts]
    return torch.cat(rows)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    used = list(model.parameters())
    found = torch.autograd.grad(loss, used, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(used, found, strict=True)]


@pytest.mark.parametrize("norm", ["rms", "batch"])
@pytest.mark.parametrize(("layer", "extra"), KINDS, ids=IDS)
def test_a_padded_batch_is_its_sequences_one_by_one(layer: str, extra: dict[str, Any], norm: str) -> None:
    model = classifier(layer, norm=norm, **extra)
    model(torch.randn(4, 30, 2, dtype=torch.float64))  # moves the running statistics
    model.eval()
    parts = sequences()
    alone = torch.cat([model(part) for part in parts])
    weights = torch.randn(4, 3, dtype=torch.float64)
    expected = gradients(model, (alone * weights).sum())
    for fill in (0.0, 1e6, float("nan")):
        u = padded(parts, fill).requires_grad_()
        together = model(u, torch.tensor(LENGTHS))
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)
        for mine, right in zip(gradients(model, (together * weights).sum()), expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-9)
        (grad,) = torch.autograd.grad(model(u, torch.tensor(LENGTHS)).sum(), u)
        assert all(not bool(grad[i, length:].any()) for i, length in enumerate(LENGTHS))
    assert not torch.allclose(model(padded(parts, 3.0)), alone)  # padding does count where nobody tells


@pytest.mark.parametrize("layer", ["lru", "s5", "mamba"])
def test_batch_statistics_leave_padding_out(layer: str) -> None:
    """In training the statistics are those of the steps that are there, from the definition."""
    norm, parts = SequenceBatchNorm(2).double(), sequences()
    present = torch.arange(16) < torch.tensor(LENGTHS)[:, None]
    steps = torch.cat([part[0] for part in parts])
    out = norm(padded(parts, 7.0), present)
    expected = (steps - steps.mean(0)) / (steps.var(0, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(out[present], expected)
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, 0.1 * steps.mean(0))
    # And so a whole model learns the same from more or less padding.
    outcomes = []
    for fill, more in ((0.0, 0), (5.0, 20)):
        model = classifier(layer, norm="batch").train()
        u = torch.cat([padded(parts, fill), torch.full((4, more, 2), fill, dtype=torch.float64)], 1)
        loss = model(u, torch.tensor(LENGTHS)).square().sum()
        buffers = [b for name, b in model.named_buffers() if name.endswith(("mean", "var"))]
        outcomes.append([loss.detach(), *gradients(model, loss), *buffers])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: Bidirectional(LRU(3, 4), Mamba(3, 4)), lambda: S5(3, 4, bidirectional=True)])
def test_layers_that_read_backwards_reverse_within_the_length(make: Any) -> None:
    torch.manual_seed(0)
    layer, parts = make().double(), [torch.randn(1, length, 3, dtype=torch.float64) for length in LENGTHS]
    out = layer(padded(parts, 2.0), torch.tensor(LENGTHS))
    for i, part in enumerate(parts):
        torch.testing.assert_close(out[i : i + 1, : part.shape[1]], layer(part), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(layer(padded(parts, 2.0))[0, :9], layer(parts[0])[0])


def test_a_bidirectional_layer_put_into_a_classifier_is_told_too() -> None:
    model = classifier("lru").eval()
    torch.manual_seed(2)
    for block in model.blocks:
        block.ssm = Bidirectional(LRU(6, 4), LRU(6, 4)).double()
    alone = torch.cat([model(part) for part in sequences()])
    torch.testing.assert_close(model(padded(sequences(), 9.0), torch.tensor(LENGTHS)), alone, rtol=1e-9, atol=1e-10)


def test_reversal_is_that_of_each_sequence() -> None:
    u = torch.arange(12.0).view(2, 6, 1)
    assert reverse(u, torch.tensor([4, 6]))[..., 0].tolist() == [[3, 2, 1, 0, 4, 5], [11, 10, 9, 8, 7, 6]]
    assert torch.equal(reverse(reverse(u, torch.tensor([4, 1])), torch.tensor([4, 1])), u)
    assert torch.equal(reverse(u), u.flip(1))
    assert ends(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()).tolist() == [3, 0, 4]


@pytest.mark.parametrize("layer", ["lru", "mamba", "linear_attention"])
def test_step_by_step_a_sequence_that_is_over_stays_as_it_is(layer: str) -> None:
    model, parts = classifier(layer).eval(), sequences()
    state, logits = model.initial_state(4), torch.empty(0)
    state = torch.utils._pytree.tree_map(lambda t: t.double(), state)  # type: ignore[attr-defined]
    for t, now in enumerate(padded(parts, float("nan")).unbind(1)):
        logits, state = model.step(now, state, torch.tensor(LENGTHS) > t)
    torch.testing.assert_close(logits, torch.cat([model(part) for part in parts]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("padding", [0, 7, None])
def test_tokens_have_the_padding_that_was_chosen(padding: int | None, bidirectional: bool) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(
        1, 3, 6, 4, 2, dropout=0.0, layer="s5", vocabulary=9, padding=padding, bidirectional=bidirectional
    )
    model = model.double().eval()
    tokens = [torch.randint(1, 7, (1, length)) for length in LENGTHS]
    alone = torch.cat([model(t) for t in tokens])
    for fill in (0, 7):
        rows = padded(tokens, fill)
        same = torch.allclose(model(rows), alone, rtol=1e-9, atol=1e-10)
        assert same == (padding == fill)
        torch.testing.assert_close(model(rows, torch.tensor(LENGTHS)), alone, rtol=1e-9, atol=1e-10)
    again = SequenceClassifier(**model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert again.padding == padding
    assert torch.equal(again(padded(tokens, 7)), model(padded(tokens, 7)))


def test_a_configuration_from_before_keeps_its_meaning() -> None:
    old = {"d_input": 1, "n_classes": 3, "d_model": 8, "d_state": 4, "vocabulary": 20}
    assert SequenceClassifier(**old).padding == 0
    assert SequenceClassifier(2, 3, 8, 4).padding is None
    assert "padding" not in SequenceClassifier(2, 3, 8, 4).config
    assert LanguageModel(20, 8, 4).padding is None


def test_a_language_model_says_what_is_padding() -> None:
    torch.manual_seed(0)
    model = LanguageModel(9, 6, 4, padding=8).double().eval()
    tokens = [torch.randint(8, (1, length)) for length in LENGTHS]
    rows, lengths = padded(tokens, 8), torch.tensor(LENGTHS)
    out = model(rows, lengths)
    for i, part in enumerate(tokens):
        torch.testing.assert_close(out[i : i + 1, : part.shape[1]], model(part), rtol=1e-9, atol=1e-10)
    assert torch.equal(model.present(rows), model.present(rows, lengths))  # type: ignore[arg-type]
    assert model.config["padding"] == 8
    with pytest.raises(ValueError, match="padding token 8"):
        model.generate(rows, 2)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([3, 0]), r"lengths must be from 1 to 5, .*got 0 to 3"),
        (torch.tensor([3, 6]), r"got 3 to 6"),
        (torch.tensor([3.0, 2.0]), r"whole numbers of shape \(2,\)"),
        (torch.tensor([True, True]), r"whole numbers of shape \(2,\)"),
        (torch.tensor([[3], [2]]), r"got torch.int64 of shape \(2, 1\)"),
        (torch.tensor([3]), r"shape \(1,\)"),
        ([3, 2], r"must be a tensor .* shape \(2,\); got \[3, 2\]"),
    ],
)
def test_lengths_that_cannot_be(lengths: Any, message: str) -> None:
    for model in (classifier("lru"), Bidirectional(LRU(2, 4), LRU(2, 4)).double()):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(2, 5, 2, dtype=torch.float64), lengths)


@pytest.mark.parametrize(("padding", "vocabulary"), [(9, 9), (-1, 9), (True, 9), (0.5, 9), ("a", 9), (3, None)])
def test_padding_that_cannot_be(padding: Any, vocabulary: int | None) -> None:
    with pytest.raises(ValueError, match="padding"):
        SequenceClassifier(1, 3, 8, 4, vocabulary=vocabulary, padding=padding)
