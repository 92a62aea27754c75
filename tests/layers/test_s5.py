from __future__ import annotations

import pytest
import torch
from scipy.linalg import expm

from compressm.layers import S5, SequenceClassifier, parameter_groups
from compressm.layers.s5 import hippo, zero_order_hold


def test_hippo_is_the_normal_part_of_legs() -> None:
    n = 6
    index = torch.arange(2 * n, dtype=torch.float64)
    root = (2 * index + 1).sqrt()
    A = -(root[:, None] * root[None, :]).tril(-1) - torch.diag(index + 1)
    normal = A + 0.5 * root[:, None] * root[None, :]
    frequency, vectors = hippo(n)
    assert bool((frequency > 0).all())
    lam = torch.complex(torch.full((n,), -0.5, dtype=torch.float64), frequency)
    torch.testing.assert_close(normal.to(vectors) @ vectors, vectors * lam)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(n, dtype=torch.complex128))


def test_zero_order_hold_is_the_matrix_exponential() -> None:
    log_decay, frequency, log_step = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    hold_re, hold_im, a, b = zero_order_hold(log_decay, frequency, log_step)
    for k in range(5):
        lam = complex(-log_decay[k].exp(), frequency[k])
        held = expm([[lam * log_step[k].exp(), log_step[k].exp()], [0, 0]])  # of the system and a constant input
        assert held[0, 1] == pytest.approx(complex(hold_re[k], hold_im[k]))
        assert held[0, 0] == pytest.approx(torch.complex(a[k], b[k]).exp().item())


def test_small_steps_keep_their_digits() -> None:
    parameters = torch.tensor([-0.7]), torch.tensor([1e-3]), torch.tensor([-16.0])
    single = torch.stack(zero_order_hold(*parameters)[:2])
    double = torch.stack(zero_order_hold(*(x.double() for x in parameters))[:2])
    torch.testing.assert_close(single[0].double(), double[0], rtol=1e-6, atol=0)


def test_steps_one_by_one_equal_the_sequence() -> None:
    torch.manual_seed(0)
    layer = S5(4, 9).double()
    u = torch.randn(3, 40, 4, dtype=torch.float64)
    state, outputs = layer.initial_state(3), []
    for k in range(40):
        y, state = layer.step(u[:, k], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(u))


def test_forward_is_the_continuous_system_with_held_inputs() -> None:
    torch.manual_seed(0)
    layer = S5(3, 4).double()
    u = torch.randn(1, 12, 3, dtype=torch.float64)
    lam = torch.complex(-layer.log_decay.exp(), layer.frequency).detach()
    step = layer.log_step.exp().detach()
    B, C = torch.complex(layer.B_re, layer.B_im).detach(), torch.complex(layer.C_re, layer.C_im).detach()
    x, outputs = torch.zeros(4, dtype=torch.complex128), []
    for value in u[0]:
        for _ in range(1000):  # Euler's method, a thousand steps each
            x = x + step / 1000 * (lam * x + B @ value.to(B))
        outputs.append(2 * (C @ x).real + layer.D.detach() * value)
    torch.testing.assert_close(layer(u)[0], torch.stack(outputs), rtol=2e-3, atol=2e-3)


def test_in_a_classifier() -> None:
    model = SequenceClassifier(2, 3, d_model=6, d_state=[8, 5], n_layers=2, layer="s5", dt_max=0.2)
    model(torch.randn(4, 30, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    rebuilt = SequenceClassifier(**model.config)
    rebuilt.load_state_dict(model.state_dict())
    groups = {group["name"]: group for group in parameter_groups(model, 1e-2, ssm_lr_factor=0.1)}
    assert len(groups["ssm"]["params"]) == 2 * 5


@pytest.mark.parametrize(("arguments", "message"), [({"d_state": 0}, "d_state"), ({"dt_min": 0.2}, "dt_min")])
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S5(4, **{"d_state": 3, **arguments})  # type: ignore[arg-type]
