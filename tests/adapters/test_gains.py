"""The gain of a layer's recurrence: with the gate and the columns of the output projection it is the layer's output.

A layer with the output ``out_proj(v)`` is followed to v: by the definition of `Signals.gain` a channel of v, times the
norm of its column in ``out_proj``, is the recurrence's output times the gain. Norms that divide all channels of a token
(of a head, of a group) by one number are the only thing that is left out. So that number is the same over the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.layers import DeltaNet, GatedLinearAttention, LinearAttention, Mamba, Mamba2
from compressm.theory.recurrence import Signals


def recurrence(s: Signals) -> Tensor:
    """What the recurrence gives for its signals, by a loop over time, shape ``(batch, length, d)``."""
    (batch, length, d), (groups, n) = s.x.shape, s.B.shape[2:]
    B, C = (vectors.repeat_interleave(d // groups, 2) for vectors in (s.B, s.C))
    h, outputs = s.x.new_zeros(batch, d, n), []
    for t in range(length):
        if s.step.ndim == 4:
            decay = torch.exp(-s.step[:, t].repeat_interleave(d // groups, 1))
        else:
            decay = torch.exp(-s.step[:, t, :, None] * s.rates)
        h = decay * h
        if s.erase is not None:
            share = s.erase[:, t].repeat_interleave(d // groups, 1)[..., None]
            h = h - share * (h * B[:, t]).sum(-1, keepdim=True) * B[:, t]
        h = h + s.x[:, t, :, None] * B[:, t]
        outputs.append((h * C[:, t]).sum(-1))
    return torch.stack(outputs, 1)


@torch.no_grad()
def divided_by(
    layer: nn.Module, adapter: Any, hidden: Tensor, past: Callable[[Signals], Tensor | float], parts: int
) -> Tensor:
    """By what number the channels of each part were divided, shape ``(batch, length, parts)``; that it is one number.

    Args:
        layer: with an ``out_proj``.
        adapter: of the layer.
        hidden: its input.
        past: what passes the recurrence by and is added to its output: ``D u``.
        parts: of the channels, one after the other.
    """
    entered: list[Tensor] = []
    hook = layer.get_submodule("out_proj").register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    layer(hidden)
    hook.remove()
    signals = adapter.signals(layer, hidden)
    assert signals.gain is not None
    norms = layer.get_parameter("out_proj.weight").norm(dim=0)
    said = ((recurrence(signals) + past(signals)) * signals.gain / norms).unflatten(-1, (parts, -1))
    v = entered[0].unflatten(-1, (parts, -1))
    ratio = (said * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
    # Transformers computes its scans and some norms in single precision, whatever the weights are.
    torch.testing.assert_close(said, ratio * v, rtol=1e-3, atol=1e-4 * float(said.abs().max()))
    return ratio[..., 0]


HEADS = 2
MATRIX_STATES: dict[str, Callable[[], nn.Module]] = {
    "no decay": lambda: LinearAttention(8, 5, HEADS, decay="none"),
    "fixed": lambda: LinearAttention(8, 5, HEADS, expand=2, decay="fixed"),
    "gated": lambda: LinearAttention(8, 5, HEADS),
    "gla": lambda: GatedLinearAttention(8, 5, HEADS, gate_rank=3),
    "delta": lambda: DeltaNet(8, 5, HEADS),
    "gated delta": lambda: DeltaNet(8, 5, HEADS, gated=True),
}


@pytest.mark.parametrize("name", MATRIX_STATES)
def test_linear_attention(name: str) -> None:
    torch.manual_seed(0)
    layer = MATRIX_STATES[name]().double()
    nn.init.normal_(layer.norm_weight)  # type: ignore[arg-type]
    ((_, adapter),) = find_layers(layer).values()
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    ratios = divided_by(layer, adapter, hidden, lambda _: 0.0, HEADS)
    # And that number is the root mean square over the head of what the recurrence says.
    with torch.no_grad():
        said = recurrence(adapter.signals(layer, hidden)).unflatten(-1, (HEADS, -1))  # type: ignore[union-attr]
    size = (said.square().mean(-1) + 1e-5).sqrt()
    torch.testing.assert_close(ratios, size, rtol=1e-6, atol=0.0)


def test_mamba() -> None:
    torch.manual_seed(0)
    layer = Mamba(6, 5).double()
    nn.init.normal_(layer.D)
    ((_, adapter),) = find_layers(layer).values()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    ratios = divided_by(layer, adapter, hidden, lambda s: layer.D * s.x / s.step, layer.D.shape[0])
    torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=1e-3, atol=0.0)


def feed_through(layer: nn.Module) -> Callable[[Signals], Tensor]:
    """``D x`` of an SSD layer: the step of its clock is ``exp(A_log) delta``, and what enters is ``delta x``."""

    def past(signals: Signals) -> Tensor:
        D, rates = (layer.get_parameter(name) for name in ("D", "A_log"))
        width = signals.x.shape[-1] // D.shape[0]
        delta = signals.step / rates.exp().repeat_interleave(width)
        return D.repeat_interleave(width) * signals.x / delta

    return past


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups: int) -> None:
    torch.manual_seed(0)
    layer = Mamba2(8, 5, head_dim=4, n_groups=groups).double()
    for parameter in (layer.D, layer.norm.weight):
        nn.init.normal_(parameter)
    ((_, adapter),) = find_layers(layer).values()
    divided_by(layer, adapter, torch.randn(2, 7, 8, dtype=torch.float64), feed_through(layer), groups)


@pytest.mark.parametrize("family", ["Mamba2", "Bamba", "FalconH1", "GraniteMoeHybrid", "NemotronH", "Zamba2"])
@given(data=st.data())
@settings(max_examples=2)
def test_ssd_layers_of_hugging_face(family: str, data: st.DataObject) -> None:
    pytest.importorskip("transformers")
    from hf_models import hf_models

    model = data.draw(hf_models(family)).double()
    for layer, adapter in find_layers(model).values():
        hidden = torch.randn(2, 9, model.config.hidden_size, dtype=torch.float64)
        groups: Any = layer.n_groups
        parts = int(groups) if family in ("FalconH1", "NemotronH", "Zamba2") else 1
        ratios = divided_by(layer, adapter, hidden, feed_through(layer), parts)
        if family == "FalconH1" and not model.config.mamba_rms_norm:  # nothing is divided there
            torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=1e-3, atol=0.0)
