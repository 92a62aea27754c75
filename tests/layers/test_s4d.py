"""S4D, against S5, and both directions of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressm.layers import S4D, S5, Bidirectional, SequenceClassifier, parameter_groups


@pytest.mark.parametrize("init", ["legs", "lin"])
def test_s4d_is_one_s5_for_every_channel(init: Any) -> None:
    torch.manual_seed(1)
    layer, u = S4D(3, 6, init=init).double(), torch.randn(2, 40, 3, dtype=torch.float64)
    for h in range(3):
        alone = S5(1, 6).double()
        with torch.no_grad():
            alone.log_decay.copy_(layer.log_decay[h])
            alone.frequency.copy_(layer.frequency[h])
            alone.log_step.copy_(layer.log_step[h].expand(6))
            alone.B_re.fill_(1)
            alone.B_im.fill_(0)
            alone.C_re.copy_(layer.C_re[h : h + 1])
            alone.C_im.copy_(layer.C_im[h : h + 1])
            alone.D.copy_(layer.D[h : h + 1])
        torch.testing.assert_close(layer(u)[..., h : h + 1], alone(u[..., h : h + 1]))


def test_both_directions_are_added() -> None:
    torch.manual_seed(2)
    forwards, backwards, u = S5(3, 4), S4D(3, 5), torch.randn(2, 20, 3)
    expected = forwards(u) + backwards(u.flip(1)).flip(1)
    torch.testing.assert_close(Bidirectional(forwards, backwards)(u), expected)
    with pytest.raises(ValueError, match="two layers"):
        Bidirectional(forwards, forwards)


def test_a_bidirectional_s5_adds_the_reversed_sequence_read_by_the_same_states() -> None:
    torch.manual_seed(3)
    both, alone, u = S5(3, 7, bidirectional=True).double(), S5(3, 7).double(), torch.randn(2, 30, 3).double()
    values = {name: value for name, value in both.state_dict().items() if not name.startswith("C_")}
    outputs = []
    for rows in (slice(0, 3), slice(3, 6)):
        alone.load_state_dict({**values, "C_re": both.C_re[rows], "C_im": both.C_im[rows]})
        v = u if rows.start == 0 else u.flip(1)
        y = alone(v) - alone.D * v
        outputs.append(y if rows.start == 0 else y.flip(1))
    torch.testing.assert_close(both(u), outputs[0] + outputs[1] + both.D * u)
    with pytest.raises(ValueError, match="no single steps"):
        both.step(u[:, 0], both.initial_state(2))


@pytest.mark.parametrize(("layer", "own"), [("s5", 5), ("s4d", 3)])
def test_recurrent_parameters_are_a_group_of_their_own(layer: str, own: int) -> None:
    model = SequenceClassifier(1, 2, d_model=4, d_state=3, n_layers=2, layer=layer)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 1e-2)}
    assert len(groups["ssm"]) == 2 * own
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S4D(0, 3), "d_model"),
        (lambda: S4D(4, 3, dt_min=0.0), "dt_min=0.0"),
        (lambda: S4D(4, 3, init="random"), "init must be 'legs' or 'lin'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
