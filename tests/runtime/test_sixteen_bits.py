"""Linear layers in 16 bits by float32: what a product in float64 rounds to, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.runtime import sixteen_bits


def draw(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", sixteen_bits.HALVES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("entries", [1, 20, 2**23])  # a row, two rows, the whole weight at a time
def test_products_are_rounded_once(
    dtype: torch.dtype, biased: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sixteen_bits, "_SLICE", entries)
    given = [draw(dtype, 2, 3, 8, seed=0), draw(dtype, 5, 8, seed=1), *([draw(dtype, 5, seed=2)] if biased else [])]
    exact = [one.double().requires_grad_() for one in given]
    leaves = [one.clone().requires_grad_() for one in given]
    sent = draw(dtype, 2, 3, 5, seed=3)
    y, wanted = sixteen_bits.linear(*leaves), F.linear(*exact)
    y.backward(sent)
    wanted.backward(sent.double())
    half_a_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), wanted, rtol=1.01 * half_a_unit, atol=1e-5)
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1.01 * half_a_unit, atol=1e-5)


@pytest.mark.parametrize("slow", [True, False])
def test_only_a_processor_that_is_slow_in_16_bits_goes_by_float32(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = list[int]()
    monkeypatch.setattr(sixteen_bits, "slower", lambda _: slow)
    monkeypatch.setattr(sixteen_bits, "linear", lambda *a: used.append(1) or F.linear(*a))
    half, whole = nn.Linear(3, 2).bfloat16(), nn.Linear(3, 2)
    for layer, count in ((half, slow), (whole, False)):
        used.clear()
        with sixteen_bits.quick_products(layer):
            layer(torch.ones(1, 3, dtype=layer.weight.dtype))
        layer(torch.ones(1, 3, dtype=layer.weight.dtype))
        assert len(used) == count
