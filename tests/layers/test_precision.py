"""Layers in half and double precision, against the same weights in double."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressm.layers import Mamba, Mamba2, RecurrentBlock
from layer_cases import LAYERS, WIDTH


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "s4"])  # PyTorch solves nothing in half precision
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_double_precision(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().to(dtype)
    exact = LAYERS[name]()
    exact.load_state_dict(layer.state_dict())
    u = torch.randn(2, 50, WIDTH, dtype=dtype)
    y, expected = layer(u), exact.double()(u.double())
    assert y.dtype == dtype
    assert (y - expected).norm() <= 20 * torch.finfo(dtype).eps * expected.norm()


def test_closed_gates_in_float16() -> None:
    """Where a gate is shut, nothing decays, and float16 has no smallest decay to divide by."""
    layer = RecurrentBlock(WIDTH, 4, n_blocks=2).half()
    with torch.no_grad():
        layer.rg_lru.recurrent_gate_bias.fill_(-30.0)
    exact = RecurrentBlock(WIDTH, 4, n_blocks=2)
    exact.load_state_dict(layer.state_dict())
    u = torch.randn(2, 50, WIDTH, dtype=torch.float16)
    y, expected = layer(u), exact.double()(u.double())
    assert (y - expected).norm() <= 0.01 * expected.norm()
    for gradient in torch.autograd.grad(y.float().sum(), list(layer.parameters())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("layer", [Mamba(WIDTH, 4), Mamba2(WIDTH, 4, head_dim=3)], ids=["mamba", "mamba2"])
def test_eigenvalues_in_double_precision(layer: Any) -> None:
    """An eigenvalue that float32 does not have changes the output by as much as it must."""
    layer = layer.double()
    u = torch.randn(2, 50, WIDTH, dtype=torch.float64)

    def moved(step: float) -> torch.Tensor:
        with torch.no_grad():
            layer.A_log.add_(step)
            y = layer(u)
            layer.A_log.sub_(step)
        return y

    along = torch.ones_like(layer.A_log)
    (slope,) = torch.autograd.grad(layer(u)[1, 40, 2], layer.A_log)
    difference = (moved(1e-9) - moved(-1e-9))[1, 40, 2] / 2e-9
    torch.testing.assert_close(difference, (slope * along).sum(), rtol=1e-3, atol=1e-7)
