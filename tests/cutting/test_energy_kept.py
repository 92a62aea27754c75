"""The energy that a report says was kept, against Hankel singular values that scipy computes for the real system."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_discrete_lyapunov
from tests.helpers import real_matrices
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.layers import LRU, S5


def hankel_singular_values(layer: nn.Module) -> NDArray[np.float64]:
    """Of the real system that has two states for every complex one, decreasing."""
    [(_, adapter)] = find_layers(layer).values()
    system = adapter.system(layer)
    assert system is not None
    A, B, C = real_matrices(system)
    P, Q = solve_discrete_lyapunov(A, B @ B.T), solve_discrete_lyapunov(A.T, C.T @ C)
    return np.sqrt(np.clip(np.sort(np.linalg.eigvals(P @ Q).real)[::-1], 0, None))


@pytest.mark.parametrize("family", [LRU, S5])
def test_it_is_the_share_of_the_singular_values_that_the_truncation_keeps(family: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(family(4, 16) for _ in range(3))).double()
    before = [hankel_singular_values(layer) for layer in model]
    report = compressm.compress(model, tolerance=0.05)
    assert report.cut
    for layer, cut, hsv in zip(model, report.layers, before, strict=True):
        after = hankel_singular_values(layer)
        order = int((after > 1e-7 * after[0]).sum())  # a real pole without a partner has one real state, not two
        if cut.outcome == "kept":
            assert cut.reason == "the rule keeps all 16 states"
            continue
        np.testing.assert_allclose(cast("float", cut.energy_kept), hsv[:order].sum() / hsv.sum(), rtol=1e-7)
