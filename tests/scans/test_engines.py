"""CUDA kernels of other packages: argument order, layout and scale, and which row is chosen.

The packages' kernels need a device, but fla has its definitions in plain PyTorch too, in the same layout. They take the
kernels' place here. mamba_ssm cannot be imported without a device: there its documented layout is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressm.scans import delta_scan, engines, gla_scan, selective_scan, ssd_scan
from scan_cases import arguments

SCANS: dict[str, Any] = {"ssd": ssd_scan, "selective": selective_scan, "gla": gla_scan, "delta": delta_scan}


def in_place_of_kernels(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setattr(engines, "_function", lambda *_: function)


def layout_of_fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor, output_final_state: bool,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fla's documented recurrence: states keys x values, ``h = exp(g) h + k v^T`` (delta rule: ``beta (v - h^T k)`` for
    ``v``), ``o = scale h^T q``."""
    assert output_final_state
    h, outputs = initial_state, []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()
        h = h * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhkv,bhk->bhv", h, k[:, t]))
        h = h + k[:, t, :, :, None] * value[..., None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", h, q[:, t]))
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("scan", ["ssd", "gla", "delta"])
def test_calls_of_fla_in_its_documented_layout(scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_kernels(monkeypatch, layout_of_fla)
    values = [value.float() for value in arguments(scan)]
    truth = SCANS[scan](*values, return_state=True, engine="loop")
    for a, b in zip(SCANS[scan](*values, return_state=True, engine="fla"), truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scan", ["ssd", "gla", "delta"])
def test_packed_sequences_reach_fla_as_decays_whose_sums_are_finite(scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(g: Tensor, **others: Any) -> Any:
        assert g.cumsum(1).isfinite().all()
        return layout_of_fla(g=g, **others)

    in_place_of_kernels(monkeypatch, kernel)
    values, starts = [value.float() for value in arguments(scan)], torch.zeros(2, 7, dtype=torch.bool)
    starts[0, 3] = starts[1, 0] = True
    truth = SCANS[scan](*values, engine="loop", starts=starts)
    torch.testing.assert_close(SCANS[scan](*values, engine="fla", starts=starts), truth)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scan", ["ssd", "gla", "delta"])
def test_calls_of_fla_against_its_own_definitions(scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have parts of the kernels' arguments; what is left out is checked above."""
    pytest.importorskip("fla")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    def gla(g: Tensor, scale: float, q: Tensor, **others: Any) -> Any:
        return naive_recurrent_gla(q=q * math.sqrt(q.shape[-1]) * scale, gk=g, **others)  # its scale is 1 / sqrt(n)

    in_place_of_kernels(
        monkeypatch, {"ssd": naive_chunk_simple_gla, "gla": gla, "delta": naive_recurrent_gated_delta_rule}[scan]
    )
    values = [value.float() for value in arguments(scan)]
    truth = SCANS[scan](*values, return_state=True, engine="loop")
    y, state = SCANS[scan](*values, return_state=True, engine="fla")
    torch.testing.assert_close(y, truth[0], rtol=1e-4, atol=1e-5)
    if scan != "ssd":  # its last state is that of the padded sequence, which is the same with a decay of 1 there only
        torch.testing.assert_close(state, truth[1], rtol=1e-4, atol=1e-5)


def test_call_of_mamba_ssm_in_its_documented_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """u, delta: (batch, d, length); A: (d, n); B, C: (batch, n, length); out like u."""

    def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        assert all(tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
        h, outputs = u.new_zeros(u.shape[0], *A.shape), []
        for t in range(u.shape[2]):
            h = (delta[..., t, None] * A).exp() * h + (delta * u)[..., t, None] * B[:, None, :, t]
            outputs.append((h * C[:, None, :, t]).sum(-1))
        return torch.stack(outputs, 2)

    in_place_of_kernels(monkeypatch, selective_scan_fn)
    *values, _ = (value.float() for value in arguments("selective"))
    truth = selective_scan(*values, engine="loop")
    torch.testing.assert_close(selective_scan(*values, engine="mamba_ssm"), truth)
    starts = torch.zeros(2, 7, dtype=torch.bool)
    starts[:, 3] = True
    halves = [values[0].half(), *values[1:]]  # float16 has no room for what the first step of a sequence is made of
    packed = selective_scan(*halves, engine="mamba_ssm", starts=starts)
    truth = selective_scan(*halves, engine="loop", starts=starts)
    torch.testing.assert_close(packed, truth, rtol=2e-3, atol=1e-3)
    with pytest.raises(ValueError, match="does not take this call"):
        selective_scan(*values, return_state=True, engine="mamba_ssm")


@pytest.mark.parametrize(
    ("scan", "dtype", "more", "installed", "chosen"),
    [
        ("ssd", torch.bfloat16, {}, {"fla", "triton"}, "fla"),
        ("ssd", torch.float32, {}, {"fla", "triton"}, "triton"),
        ("ssd", torch.float64, {}, {"fla", "triton"}, None),
        ("ssd", torch.bfloat16, {}, {"triton"}, "triton"),
        ("gla", torch.bfloat16, {}, {"fla"}, "fla"),
        ("gla", torch.float32, {}, {"fla"}, None),
        ("delta", torch.float16, {}, set(), None),
        ("selective", torch.float32, {}, {"mamba_ssm", "triton"}, "mamba_ssm"),
        ("selective", torch.float32, {"last": True}, {"mamba_ssm", "triton"}, "triton"),
        ("selective", torch.float32, {"initial": True}, {"mamba_ssm", "triton"}, "triton"),
    ],
)
def test_the_first_row_that_takes_the_call(
    scan: str, dtype: torch.dtype, more: dict[str, bool], installed: set[str], chosen: str | None
) -> None:
    call = engines.Call(dtype, 16, **more)
    rows = [row for row in engines.TABLE if row.scan == scan and row.engine in installed and row.takes(call)]
    assert (rows[0].engine if rows else None) == chosen


def test_every_row_has_a_reason_and_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(row.reason and row.engine in engines.NAMES[row.scan] for row in engines.TABLE)
    monkeypatch.setattr(engines, "_function", lambda *_: None)
    values = [value.float() for value in arguments("gla")]
    with pytest.raises(ValueError, match="pip install flash-linear-attention"):
        gla_scan(*values, engine="fla")
