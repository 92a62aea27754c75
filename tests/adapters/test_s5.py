from __future__ import annotations

import copy

import pytest
import torch
from suite import AdapterSuite
from torch import Tensor

import compressm
from compressm.adapters import S5Adapter
from compressm.adapters.changes import layer_values, write
from compressm.layers import S5
from compressm.theory.balancing import balance, truncate
from compressm.theory.certificate import Certificate


def s5(seed: int, d_model: int = 5, d_state: int = 24) -> S5:
    torch.manual_seed(seed)
    layer = S5(d_model, d_state, dt_min=1e-2, dt_max=0.3)
    with torch.no_grad():  # away from the symmetry of the initialisation
        layer.log_decay += 0.5 * torch.randn(d_state)
    return layer


class TestS5(AdapterSuite):
    def layer(self, seed: int) -> S5:
        return s5(seed)

    def input(self, seed: int) -> Tensor:
        return torch.randn(3, 60, 5, generator=torch.Generator().manual_seed(seed))

    def test_new_time_steps_lie_among_the_old_ones(self) -> None:
        layer = self.layer(8)
        low, high = layer.log_step.min().item(), layer.log_step.max().item()
        adapter = S5Adapter()
        write(layer, adapter.plan(layer_values(layer), truncate(balance(adapter.read(layer_values(layer))), 6)))
        assert low - 1e-6 <= layer.log_step.min().item() <= layer.log_step.max().item() <= high + 1e-6


def test_the_bound_of_both_directions_is_that_of_their_sum() -> None:
    torch.manual_seed(0)
    layer = S5(1, 3, bidirectional=True, dt_min=0.02, dt_max=0.3).double()
    with torch.no_grad():
        layer.D.zero_()
    smaller = copy.deepcopy(layer)
    report = compressm.compress(smaller, states=1)
    certificate, length = report.layers[0].certificate, 600
    assert isinstance(certificate, Certificate)
    with torch.no_grad():  # the error's matrix, column by column: impulses at every time
        impulses = torch.eye(length, dtype=torch.float64)[..., None]
        error = (layer(impulses) - smaller(impulses))[..., 0].T
    gain = float(torch.linalg.matrix_norm(error, 2))
    assert gain <= certificate.bound
    single = torch.linalg.matrix_norm(error.triu(1), 2), torch.linalg.matrix_norm(error.tril(-1), 2)
    assert gain > 1.2 * float(max(single))  # one direction's bound would not do


def test_a_state_that_a_cut_leaves_real_can_learn_to_oscillate() -> None:
    torch.manual_seed(0)
    layer = S5(1, 2).double()
    with torch.no_grad():  # two real modes, of which the slow one stays
        for name, value in {"log_decay": [-1.0, 2.0], "frequency": [0.0, 0.0], "log_step": [-2.0, -2.0]}.items():
            getattr(layer, name).copy_(torch.tensor(value))
        for parameter in (layer.B_im, layer.C_im):
            parameter.zero_()
        layer.D.zero_()
    compressm.compress(layer, states=1)
    assert float((layer.frequency * layer.log_step.exp()).detach().abs()) < 1e-6
    impulse, time = torch.zeros(1, 60, 1, dtype=torch.float64), torch.arange(60, dtype=torch.float64)
    impulse[0, 0] = 1
    wanted = torch.exp(-0.05 * time) * torch.cos(0.3 * time)
    optimizer = torch.optim.Adam(layer.parameters(), 0.03)
    loss = torch.tensor(1.0)
    for _ in range(600):
        loss = (layer(impulse)[0, :, 0] - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1  # a real state leaves more than 0.5


def test_two_directions_that_err_alike_err_by_the_root_of_two_more_than_both_stacked() -> None:
    # Slow real modes, read in both directions by the same matrix: both errors are largest at frequency zero, where
    # they are the same real number E and add up to 2 E. Stacked, as one system with two outputs, they have sqrt(2) E.
    layer = S5(1, 3, bidirectional=True).double()
    with torch.no_grad():
        values = {"log_decay": [0.0, 0.5, 1.0], "frequency": [0.0] * 3, "log_step": [-3.0] * 3}
        for name, value in values.items():
            getattr(layer, name).copy_(torch.tensor(value))
        layer.B_re.copy_(torch.tensor([[1.0], [0.8], [0.6]]))
        layer.C_re.copy_(torch.tensor([[1.0, 0.7, 0.9]] * 2))
        for parameter in (layer.B_im, layer.C_im, layer.D):
            parameter.zero_()
    smaller, length = copy.deepcopy(layer), 2000
    certificate = compressm.compress(smaller, states=1).layers[0].certificate
    assert isinstance(certificate, Certificate)
    with torch.no_grad():
        impulse = torch.zeros(1, length, 1, dtype=torch.float64)
        impulse[0, length // 2] = 1
        error = (layer(impulse) - smaller(impulse))[0, :, 0]
    gain = float(error.sum().abs())  # at frequency zero
    assert gain == pytest.approx(float(torch.fft.fft(error).abs().max()), rel=1e-6)
    assert gain == pytest.approx(certificate.hinf_error, rel=1e-4)
    assert 0.75 * certificate.bound < gain <= certificate.bound * (1 + 1e-9)
