from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import cont2discrete

import compressm
from compressm.layers import S4, S4D, GLUBlock, Hyena, LanguageModel, LongConvolution
from compressm.layers.s5 import hippo


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


def test_s4_is_legs_sampled_by_the_bilinear_transform() -> None:
    torch.manual_seed(3)
    layer, n = S4(2, 6, max_length=64).double(), 12
    root = np.sqrt(2 * np.arange(n) + 1)
    legs = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(n) + 1.0)  # Gu et al. 2020, theorem 2
    _, vectors = hippo(6)
    c_half = torch.complex(layer.C_re, layer.C_im).detach()
    for h in range(2):
        step = float(layer.log_step[h].detach().exp())
        A, *_ = cont2discrete((legs, root[:, None], np.eye(n), np.zeros((n, 1))), step, "bilinear")
        B = np.linalg.solve(np.eye(n) - step / 2 * legs, step * root)
        c = 2 * (c_half[h] @ vectors.mH).real.numpy()
        expected = [c @ np.linalg.matrix_power(A, j) @ B for j in range(64)]
        np.testing.assert_allclose(layer.filter(64)[:, h].detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_s4_steps_and_is_distilled() -> None:
    torch.manual_seed(4)
    model = GLUBlock("s4", 6, 8, 0.0, "layer", max_length=256, dt_min=2e-2)
    u = torch.randn(2, 200, 6)
    state, outputs = model.initial_state(2), []
    with torch.no_grad():
        before = model(u)
        for now in u.unbind(1):
            y, state = model.step(now, state)
            outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), before, atol=1e-4, rtol=1e-4)
    (report,) = compressm.distil(model, order=12)
    assert isinstance(model.ssm, S4D)
    assert report.relative_h2_error < 0.05
    with torch.no_grad():
        assert float((model(u) - before).norm() / before.norm()) < 0.05
    assert compressm.compress(model, states=5).state_dims == {"ssm": 5}
