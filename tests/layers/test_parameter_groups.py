"""Which parameters weight decay may touch, by what one step of AdamW does to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressm.layers import parameter_groups
from layer_cases import LAYERS

# What makes eigenvalues, time steps and input matrices of a recurrence. Decay would pull them to no sensible place:
# to eigenvalues of modulus exp(-1), say.
RECURRENT = {
    "lru": {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"},
    "s5": {"log_decay", "frequency", "log_step", "B_re", "B_im"},
    "s5-both": {"log_decay", "frequency", "log_step", "B_re", "B_im"},
    "s4d": {"log_decay", "frequency", "log_step"},
    "hyena": {"log_decay", "frequency", "log_step"},
    "s4": {"log_decay", "frequency", "log_step", "B_re", "B_im", "P_re", "P_im"},
    "mamba": {"A_log"},
    "mamba2": {"A_log"},
}


def one_step_without_gradient(layer: nn.Module, lr: float, decay: float, factor: float) -> dict[str, torch.Tensor]:
    """What decay alone makes of every parameter, as a ratio to what it was (the median over its entries)."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.where(parameter == 0, 1.0, 0.0))  # a ratio to zero says nothing
    optimizer = torch.optim.AdamW(parameter_groups(layer, lr, decay, factor))
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name: (parameter.detach() / before[name]).median() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("name", LAYERS)
def test_decay_leaves_recurrences_and_vectors_alone_and_nothing_else(name: str) -> None:
    layer, lr, decay = LAYERS[name](), 0.1, 0.5
    ratios = one_step_without_gradient(layer, lr, decay, 0.25)
    present = {key.rpartition(".")[2] for key in ratios}
    assert RECURRENT.get(name, set()) <= present
    for key, parameter in layer.named_parameters():
        spared = key.rpartition(".")[2] in RECURRENT.get(name, set()) or parameter.ndim < 2
        if name == "bidirectional":  # an LRU and a Mamba
            spared |= key.rpartition(".")[2] in RECURRENT["lru"] | RECURRENT["mamba"]
        expected = 1.0 if spared else 1 - lr * decay
        assert float(ratios[key]) == pytest.approx(expected, abs=1e-5), key


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_decay_rates_of_mamba_learn_at_the_recurrence_s_rate(name: str) -> None:
    layer = LAYERS[name]()
    groups = {group["name"]: group for group in parameter_groups(layer, 1e-2, 0.1, ssm_lr_factor=0.25)}
    assert [parameter is layer.A_log for parameter in groups["ssm"]["params"]] == [True]
    assert groups["ssm"]["lr"] == pytest.approx(2.5e-3)
    assert groups["ssm"]["weight_decay"] == 0


def test_a_shared_parameter_makes_one_step_at_a_time() -> None:
    """Adam's first step is -lr * sign(g) whatever the gradient's size; a parameter that is listed twice makes two."""
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    first, second = LAYERS["mamba"](), LAYERS["mamba"]()
    second.A_log = first.A_log
    shared = nn.Parameter(first.D.detach().clone())
    first.D = second.D = shared
    model = nn.ModuleList([tied, first, second])
    groups = parameter_groups(model, lr=0.1, ssm_lr_factor=0.5)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(groups).step()
    for name, parameter in model.named_parameters():
        rate = 0.05 if name.endswith("A_log") else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] - rate, rtol=0, atol=1e-5)
