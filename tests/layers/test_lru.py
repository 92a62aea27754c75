from __future__ import annotations

import pytest
import torch

from compressm.layers import LRU, GLUBlock, SequenceClassifier, parameter_groups
from compressm.scans.lti import lti_scan
from helpers import lru


def test_initialisation_draws_radius_and_phase_as_stated() -> None:
    layer = lru(0, d_state=4000, r_min=0.5, r_max=0.9)
    squared = (-2 * layer.nu_log.detach().exp()).exp()
    assert squared.min() >= 0.25 * (1 - 1e-5)
    assert squared.max() <= 0.81 * (1 + 1e-5)
    assert float(squared.mean()) == pytest.approx(
        (0.25 + 0.81) / 2, abs=0.01
    )  # uniform: 4000 draws, standard error 0.0026
    torch.testing.assert_close(layer.gamma_log.exp().square(), 1 - squared)


def test_steps_one_by_one_equal_the_sequence() -> None:
    layer = lru(1).double()
    u = torch.randn(3, 40, 8, dtype=torch.float64)
    state, outputs = layer.initial_state(3), []
    for k in range(40):
        y, state = layer.step(u[:, k], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(u))


def test_forward_is_the_recurrence() -> None:
    layer = lru(2, d_state=10).double()
    u = torch.randn(2, 30, 8, dtype=torch.float64)
    gamma = layer.gamma_log.exp()[:, None]
    B = (gamma * layer.B_re, gamma * layer.B_im)
    y = lti_scan(u, -layer.nu_log.exp(), layer.theta_log.exp(), *B, layer.C_re, layer.C_im, engine="loop")
    torch.testing.assert_close(layer(u), y + layer.D * u)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_classifier_shapes_and_per_layer_states(norm: str) -> None:
    model = SequenceClassifier(3, 7, d_model=6, d_state=[9, 4], n_layers=2, norm=norm)
    assert model(torch.randn(5, 20, 3)).shape == (5, 7)
    assert model.config["d_state"] == [9, 4]
    rebuilt = SequenceClassifier(**model.config)
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(rebuilt.eval()(torch.ones(2, 9, 3)), model.eval()(torch.ones(2, 9, 3)))


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = SequenceClassifier(1, 2, d_model=4, d_state=3, n_layers=2)
    groups = {group["name"]: group for group in parameter_groups(model, 1e-2, weight_decay=0.1, ssm_lr_factor=0.25)}
    ids = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert len(groups["ssm"]["params"]) == 2 * 5
    assert (groups["ssm"]["lr"], groups["ssm"]["weight_decay"]) == (2.5e-3, 0.0)
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert (groups["decay"]["lr"], groups["decay"]["weight_decay"]) == (1e-2, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_state": 0}, "d_state"),
        ({"d_state": 3, "r_min": 0.9, "r_max": 0.5}, "r_min"),
        ({"d_state": 3, "r_max": 1.0}, "r_max"),
        ({"d_state": 3, "max_phase": 7.0}, "max_phase"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRU(4, **arguments)  # type: ignore[arg-type]


def test_bad_model_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="norm"):
        GLUBlock("lru", 4, 3, norm="group")
    with pytest.raises(ValueError, match="2 state dimensions for n_layers=3"):
        SequenceClassifier(1, 2, 4, [3, 3], n_layers=3)
