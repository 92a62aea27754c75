"""Layers of flash-linear-attention, where it is installed. Its kernels need a GPU; its own plain ones stand in here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import compressm
from compressm.adapters import find_layers
from compressm.adapters.rebind import rebound_forward

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, HEADS, STATES = 32, 2, 16


def gla() -> Any:
    from fla.layers import GatedLinearAttention

    return GatedLinearAttention(hidden_size=WIDTH, num_heads=HEADS, expand_k=1.0)


def delta_net() -> Any:
    from fla.layers import DeltaNet

    return DeltaNet(hidden_size=WIDTH, num_heads=HEADS, use_short_conv=False, use_gate=True)


def gated_delta_net() -> Any:
    from fla.layers import GatedDeltaNet

    return GatedDeltaNet(hidden_size=WIDTH, head_dim=STATES, num_heads=HEADS, expand_v=1.0, use_short_conv=False)


class Reached(Exception):
    pass


def outputs(layer: Any, u: torch.Tensor) -> torch.Tensor:
    """What the recurrence gives, with the layer's own forward up to it and fla's plain implementation of it; scaled as
    the norm after it would."""
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla

    found: list[torch.Tensor] = []

    def run_gla(q: Any, k: Any, v: Any, gk: Any = None, g: Any = None, **_: Any) -> None:
        found.append(naive_recurrent_gla(q, k, v, g if gk is None else gk)[0])
        raise Reached

    def run_delta(q: Any, k: Any, v: Any, beta: Any, **_: Any) -> None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
        found.append(delta_rule_recurrence(q, k, v, beta)[0].transpose(1, 2))
        raise Reached

    def run_gated(q: Any, k: Any, v: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any, **_: Any) -> None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        decay = -A_log.exp() * F.softplus(g + dt_bias)
        found.append(naive_recurrent_gated_delta_rule(q, k, v, beta.sigmoid(), decay)[0])
        raise Reached

    runs = {"gla": run_gla, "delta_rule": run_delta, "gated_delta_rule": run_gated}
    names = {
        f"{mode}_{name}": run for name, run in runs.items() for mode in ("chunk", "fused_recurrent", "fused_chunk")
    }
    with torch.no_grad(), pytest.raises(Reached):
        rebound_forward(layer, names)(u)
    return F.rms_norm(found[0].float(), found[0].shape[-1:])


@pytest.mark.parametrize("make", [gla, delta_net, gated_delta_net])
def test_states_are_cut_where_they_matter_least(make: Any) -> None:
    pytest.importorskip("fla")
    torch.manual_seed(0)
    layer = make()
    u = torch.randn(3, 80, WIDTH).cumsum(1) / 5
    before, parameters = outputs(layer, u), dict(layer.named_parameters())
    ((_, adapter),) = find_layers(layer).values()
    assert adapter.state_dim(layer) == STATES
    errors = {}
    for selection in ("hankel", "random"):
        cut = copy.deepcopy(layer)
        signals = adapter.signals(cut, u)  # type: ignore[union-attr]
        assert signals.B.shape == (3, 80, HEADS, STATES)
        report = _compress(cut, u, selection)
        assert report.state_dims == {"": STATES // 2}
        assert cut.head_k_dim == cut.k_proj.out_features // HEADS == STATES // 2
        errors[selection] = float((outputs(cut, u) - before).norm() / before.norm())
    assert errors["hankel"] < 0.9 * errors["random"]
    _compress(layer, u, "hankel")
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    assert all(now is parameters[name] for name, now in layer.named_parameters())


@pytest.mark.parametrize("make", [delta_net, gated_delta_net])
def test_what_the_delta_rule_erases_along_counts_as_read(make: Any) -> None:
    """Queries that read half of the key dimensions: the output does not see the others, but keys erase along them."""
    pytest.importorskip("fla")
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        layer.q_proj.weight.view(HEADS, STATES, WIDTH)[:, STATES // 2 :] = 0
    u = torch.randn(3, 80, WIDTH)
    cut = copy.deepcopy(layer)
    (report,) = _compress(cut, u, "hankel").layers
    before = outputs(layer, u)
    made = float((outputs(cut, u) - before).norm() / before.norm())
    assert made > 0.1
    assert 0.4 < report.certificate.relative_error / made < 2.5


def _compress(layer: Any, u: torch.Tensor, selection: Any) -> compressm.Report:
    """With moments gathered from the layer's inputs; its forward needs a GPU."""
    from compressm.cutting import plan_reduction
    from compressm.observing.moments import Statistics
    from compressm.theory.rank_rule import RankRule

    statistics = Statistics(layer, sequences=3)
    ((_, adapter),) = find_layers(layer).values()
    statistics.observe("", layer, adapter, u)  # type: ignore[arg-type]
    plan = plan_reduction(layer, RankRule(states=STATES // 2), moments=statistics.moments(), selection=selection)
    return plan.apply(layer)


def test_a_model_tells_its_config() -> None:
    pytest.importorskip("fla")
    from fla.models import GLAConfig, GLAForCausalLM

    config = GLAConfig(hidden_size=WIDTH, num_heads=HEADS, num_hidden_layers=2, expand_k=1.0, vocab_size=50)
    model = GLAForCausalLM(config)
    from compressm.cutting import resize_states, state_dims

    resize_states(model, dict.fromkeys(state_dims(model), 4))
    assert model.config.expand_k == 4 * HEADS / WIDTH
    again = GLAForCausalLM(model.config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in again.state_dict().items()} == shapes
