from __future__ import annotations

import pytest
import torch

from compressm.layers import Hyena, LanguageModel, LongConvolution


def test_the_convolution_is_its_sum() -> None:
    torch.manual_seed(0)
    layer, u = LongConvolution(3, max_length=50).double(), torch.randn(2, 40, 3, dtype=torch.float64)
    h = layer.filter(40)
    expected = layer.D * u
    for t in range(40):
        for j in range(t + 1):
            expected[:, t] = expected[:, t] + h[j] * u[:, t - j]
    torch.testing.assert_close(layer(u), expected)
    leaves = dict(layer.named_parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: layer(x), (u[:, :9].requires_grad_(), *leaves.values()), fast_mode=True
    )


@pytest.mark.parametrize("d_state", [0, 4])
def test_step_by_step_is_the_sequence(d_state: int) -> None:
    torch.manual_seed(1)
    layer, u = Hyena(6, d_state, max_length=64), torch.randn(3, 60, 6)
    assert layer.d_state == d_state
    state, outputs = layer.initial_state(3), []
    for now in u.unbind(1):
        y, state = layer.step(now, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(u), atol=1e-5, rtol=1e-5)


def test_nothing_of_the_future_is_seen() -> None:
    torch.manual_seed(2)
    model = LanguageModel(9, 8, 0, 2, layer="hyena", max_length=32).eval()
    tokens = torch.randint(9, (2, 30))
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 9
    torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="d_state at least 0; got 4, 3, 1024 and -1"):
        Hyena(4, -1)
    with pytest.raises(ValueError, match="33 steps is longer than max_length=32"):
        LongConvolution(2, max_length=32)(torch.randn(1, 33, 2))
