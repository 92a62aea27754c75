from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.optim import Optimizer

from compressm.adapters import find_layers
from compressm.adapters.base import layer_values, write
from compressm.balancing import balance, truncate
from compressm.carry import carry_state, check_optimizer, unwrap_optimizer
from compressm.compressor import Compressor
from compressm.errors import UnsupportedOptimizerError
from compressm.layers import LRU, SequenceClassifier, parameter_groups
from compressm.reduce import compress

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
}


def trained(make: Callable[[Any], Optimizer], steps: int = 3) -> tuple[SequenceClassifier, Optimizer]:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 3, d_model=6, d_state=20, n_layers=2, dropout=0.0, norm="layer", r_min=0.9)
    optimizer = make(parameter_groups(model, 1e-3))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: SequenceClassifier, optimizer: Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(torch.randn(8, 30, 2)), torch.randint(0, 3, (8,)))
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("mode", ["transform", "slice", "reset"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_cut_the_next_step_moves_every_tensor(name: str, mode: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    last = step(model, optimizer)  # held, with its graph, as most training loops do
    report = compress(model, states=9, optimizer=optimizer, carry=mode)  # type: ignore[arg-type]
    assert report.cut
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer)
    for key, parameter in model.named_parameters():
        assert (parameter != before[key]).any(), key
        assert torch.isfinite(parameter).all()
        for value in optimizer.state[parameter].values():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == parameter.shape
    assert torch.isfinite(last)


@pytest.mark.parametrize("layer", ["lru", "s5", "s4d"])
def test_momentum_of_one_gradient_is_pulled_back_like_the_gradient(layer: str) -> None:
    # After one step of plain momentum the buffer is the gradient. A cut at full order is a pure change of basis, so the
    # carried buffer must be the gradient of the new parameters at the point where the old gradient was taken: also that
    # of the phases, half of which change their sign, since of every conjugate pair the new state is the upper one.
    torch.manual_seed(1)
    options = {} if layer == "lru" else {"dt_max": 0.02}  # slow enough that no frequency is another one's alias
    model = SequenceClassifier(2, 3, d_model=6, d_state=12, dropout=0.0, norm="layer", layer=layer, **options).double()
    if layer != "lru":
        model.get_parameter("blocks.0.ssm.frequency").data[..., ::2] *= -1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # rate zero: the point stays where it is
    u, target = torch.randn(4, 25, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(model(u), target).backward()
    optimizer.step()
    ssm = model.get_submodule("blocks.0.ssm")
    adapter = find_layers(model)["blocks.0.ssm"][1]
    reduction = truncate(balance(adapter.read(layer_values(ssm))), 12, exceed=True)
    change = adapter.plan(layer_values(ssm), reduction)
    write(ssm, change)
    carry_state(optimizer, ssm, change, "transform")
    carried = {name: optimizer.state[ssm.get_parameter(name)]["momentum_buffer"] for name in change.values()}
    model.zero_grad()
    F.cross_entropy(model(u), target).backward()
    for name, buffer in carried.items():
        gradient = ssm.get_parameter(name).grad
        torch.testing.assert_close(buffer, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("layer", ["lru", "s5", "s4d"])
def test_second_moments_have_the_size_of_the_gradients_after_the_cut(layer: str) -> None:
    # Adam divides by their roots: one that is five times too small makes steps that are five times too long.
    torch.manual_seed(0)
    options = {"r_min": 0.9, "max_phase": 0.6} if layer == "lru" else {}
    model = SequenceClassifier(1, 4, d_model=6, d_state=64, dropout=0.0, norm="layer", layer=layer, **options).double()
    data = [(torch.randn(8, 60, 1, dtype=torch.float64).cumsum(1) / 4, torch.randint(0, 4, (8,))) for _ in range(30)]
    ssm = model.get_submodule("blocks.0.ssm")

    def squares() -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for u, y in data:
            model.zero_grad()
            F.cross_entropy(model(u), y).backward()
            for name, parameter in ssm.named_parameters():
                sums[name] = sums.get(name, 0) + parameter.grad.square() / len(data)
        return sums

    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for name, value in squares().items():
        zero = torch.zeros_like(value)
        optimizer.state[ssm.get_parameter(name)] = {"step": torch.tensor(9.0), "exp_avg": zero, "exp_avg_sq": value}
    assert compress(model, states=24, optimizer=optimizer).cut
    actual = squares()
    for name in ("log_decay", "nu_log", "frequency", "theta_log", "gamma_log"):
        if name in actual:
            true, carried = actual[name], optimizer.state[ssm.get_parameter(name)]["exp_avg_sq"]
            seen = true > 1e-12 * true.max()
            ratio = (carried[seen] / true[seen]).sqrt()
            assert 0.5 < float(ratio.median()) < 2, name
            assert float(((ratio > 0.2) & (ratio < 5)).double().mean()) > 0.75, name


def test_second_moments_stay_non_negative_and_slices_are_slices() -> None:
    model, optimizer = trained(OPTIMIZERS["adam-amsgrad"])
    layer = model.get_submodule("blocks.0.ssm")
    old = copy.deepcopy(optimizer.state[layer.get_parameter("B_re")])
    sliced, sliced_optimizer = copy.deepcopy((model, optimizer))
    compress(model, states=9, optimizer=optimizer)
    for parameter in layer.parameters():
        assert (optimizer.state[parameter]["exp_avg_sq"] >= 0).all()
        assert (optimizer.state[parameter]["max_exp_avg_sq"] >= 0).all()
    compress(sliced, states=9, optimizer=sliced_optimizer, carry="slice")
    new = sliced_optimizer.state[sliced.get_submodule("blocks.0.ssm").get_parameter("B_re")]
    assert torch.equal(new["exp_avg"], old["exp_avg"][: new["exp_avg"].shape[0]])
    assert new["step"] == old["step"]


def test_reset_starts_from_zero() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw"])
    compress(model, states=9, optimizer=optimizer, carry="reset")
    state = optimizer.state[model.get_submodule("blocks.1.ssm").get_parameter("C_im")]
    assert state["exp_avg"].abs().sum() == 0
    assert state["exp_avg_sq"].abs().sum() == 0


def test_optimizer_with_unknown_state_is_refused_before_anything_is_written() -> None:
    model, optimizer = trained(lambda p: torch.optim.Adagrad(p, lr=1e-2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnsupportedOptimizerError, match=r"Adagrad keeps 'sum' for blocks\.0\.ssm\.nu_log.*carry='reset'"
    ):
        compress(model, states=9, optimizer=optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert compress(model, states=9, optimizer=optimizer, carry="reset").cut
    step(model, optimizer)


def test_wrappers_are_unwrapped_and_others_refused() -> None:
    model, optimizer = trained(OPTIMIZERS["sgd"])
    from accelerate import Accelerator

    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert unwrap_optimizer(wrapped) is optimizer
    with pytest.raises(UnsupportedOptimizerError, match="got SequenceClassifier"):
        unwrap_optimizer(model)


@pytest.mark.parametrize("mode", ["transform", "slice", "reset"])
def test_half_of_a_pair_may_have_no_state(mode: str) -> None:
    torch.manual_seed(0)
    layer = LRU(4, 16)
    layer.B_im.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3)

    def train() -> None:
        optimizer.zero_grad()
        layer(torch.randn(2, 9, 4)).square().mean().backward()
        optimizer.step()

    train()
    old, first = layer.B_re.detach().clone(), optimizer.state[layer.B_re]["exp_avg"].clone()
    compress(layer, states=8, optimizer=optimizer, carry=mode)  # type: ignore[arg-type]
    assert layer.B_im not in optimizer.state
    assert optimizer.state[layer.B_re]["exp_avg"].shape == (8, 4)
    assert old.shape == first.shape == (16, 4)
    if mode == "transform":  # as if the other half's average were zero
        assert optimizer.state[layer.B_re]["exp_avg"].abs().max() > 0
    train()
    assert layer.B_re.isfinite().all()


def test_an_optimizer_is_asked_before_its_first_step() -> None:
    layer = LRU(4, 16)
    with pytest.raises(UnsupportedOptimizerError, match=r"RMSprop keeps 'square_avg' for the_layer\.nu_log"):
        check_optimizer(torch.optim.RMSprop(layer.parameters()), {"the_layer": layer})
    for make in OPTIMIZERS.values():
        check_optimizer(optimizer := make(layer.parameters()), {"the_layer": layer})
        assert not optimizer.state


def test_factored_moments_begin_anew() -> None:
    layer = LRU(4, 16)
    optimizer = torch.optim.Adafactor(layer.parameters(), lr=1e-3)
    for states in (16, 8):
        compress(layer, states=states, optimizer=optimizer, carry="reset")
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(2, 9, 4)).square().mean().backward()
            optimizer.step()
    assert optimizer.state[layer.B_re]["row_var"].shape == (8, 1)


def test_all_that_a_cut_changes_must_be_in_the_optimizer() -> None:
    layer = LRU(4, 16)
    rest = [p for name, p in layer.named_parameters() if name != "C_im"]
    optimizer = torch.optim.AdamW(rest)
    with pytest.raises(UnsupportedOptimizerError, match=r"^C_im is a parameter that a cut changes"):
        Compressor(layer, optimizer, 100, states=4)
    layer.C_im.requires_grad_(False)
    Compressor(layer, optimizer, 100, states=4)
