"""Adam's averages after a cut, held against the gradients that autograd finds at the new parameters.

After one step Adam keeps ``(1 - beta1) g`` and ``(1 - beta2) g^2``. With a rate of zero the point stays where it is. A
cut at full order is a change of coordinates, so that the carried average must be ``(1 - beta1)`` times the new
gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values
from compressm.cutting.carry import carry_state
from compressm.layers import LinearAttention, SequenceClassifier
from compressm.theory.balancing import balance, truncate

BETAS = (0.8, 0.95)
ADAMS: dict[str, Any] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.0, betas=BETAS),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0, betas=BETAS, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.0, betas=BETAS, amsgrad=True),
}


def loss(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(4, 25, 2, dtype=torch.float64, generator=generator)
    return F.cross_entropy(model(u), torch.tensor([0, 1, 2, 0]))


def gradients(model: nn.Module, layer: nn.Module, of: Any = loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    of(model).backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize("layer", ["lru", "s5", "s4d"])
def test_first_moments_are_gradients_of_the_new_parameters(layer: str, adam: str) -> None:
    torch.manual_seed(1)
    options = {} if layer == "lru" else {"dt_max": 0.02}
    model = SequenceClassifier(2, 3, d_model=6, d_state=12, dropout=0.0, norm="layer", layer=layer, **options).double()
    optimizer = ADAMS[adam](model.parameters())
    ssm = model.get_submodule("blocks.0.ssm")
    old = gradients(model, ssm)
    optimizer.step()
    for name, gradient in old.items():  # what Adam keeps, by its definition
        state = optimizer.state[ssm.get_parameter(name)]
        torch.testing.assert_close(state["exp_avg"], 0.2 * gradient)
        torch.testing.assert_close(state["exp_avg_sq"], 0.05 * gradient.square())
    ((_, adapter),) = find_layers(ssm).values()
    reduction = truncate(balance(adapter.read(layer_values(ssm))), 12, exceed=True)  # type: ignore[union-attr]
    change = adapter.plan(layer_values(ssm), reduction)  # type: ignore[union-attr, arg-type]
    carry_state(optimizer, ssm, change, "transform")
    new = gradients(model, ssm)
    moved = 0
    for name in change.values():
        carried, gradient = optimizer.state[ssm.get_parameter(name)]["exp_avg"], 0.2 * new[name]
        size = float(gradient.abs().max())
        torch.testing.assert_close(carried, gradient, rtol=1e-4, atol=1e-4 * size, msg=name)
        moved += carried.shape != old[name].shape or not torch.allclose(carried, 0.2 * old[name], rtol=0.1)
        assert (optimizer.state[ssm.get_parameter(name)]["exp_avg_sq"] >= 0).all()
    assert moved == len(change.values())  # by a change of basis that leaves none of them as it was


@pytest.mark.parametrize("adam", ADAMS)
def test_first_moments_follow_keys_and_queries_through_a_cut_that_loses_nothing(adam: str) -> None:
    # Keys and queries of which half are zero: the cut to the other half, in another basis, changes no output.
    torch.manual_seed(2)
    layer = LinearAttention(8, 6, 2).double()
    with torch.no_grad():
        for projection in (layer.k_proj, layer.q_proj):
            projection.weight.unflatten(0, (2, 6))[:, 3:] = 0
    u, weight = torch.randn(3, 20, 8, dtype=torch.float64), torch.randn(3, 20, 8, dtype=torch.float64)

    def weighted(model: nn.Module) -> torch.Tensor:
        return (model(u) * weight).sum()

    optimizer = ADAMS[adam](layer.parameters())
    gradients(layer, layer, weighted)
    optimizer.step()
    before = layer(u).detach()
    (report,) = compressm.compress(layer, states=3, data=[u], optimizer=optimizer).layers
    assert report.outcome == "cut"
    torch.testing.assert_close(layer(u).detach(), before, rtol=1e-6, atol=1e-8)
    new = gradients(layer, layer, weighted)
    for name in ("k_proj.weight", "q_proj.weight"):
        carried, gradient = optimizer.state[layer.get_parameter(name)]["exp_avg"], 0.2 * new[name]
        torch.testing.assert_close(carried, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)
