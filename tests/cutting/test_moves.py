"""Changes of coordinates, and what a cut that only selects does with the entries of the states that go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressm.adapters.changes import ParameterChange
from compressm.cutting.moves import Basis, PartStates
from compressm.errors import UnsupportedOptimizerError

EYE = torch.eye(4, dtype=torch.float64)
PICKS = EYE[[2, 0]]  # states 2 and 0 stay, in this order


def change(matrix: Tensor) -> ParameterChange:
    return ParameterChange(("W",), (torch.zeros(2, 3),), 0, matrix, matrix.square())


@pytest.mark.parametrize(
    ("matrix", "kept"),
    [
        (PICKS, [2, 0]),
        (PICKS.to_sparse(), [2, 0]),
        (2 * PICKS, None),  # scales
        ((2 * PICKS).to_sparse(), None),
        (PICKS + EYE[[1, 1]], None),  # adds another state
        (PICKS.expand(3, 2, 4), None),  # every channel has states of its own
    ],
)
def test_only_a_cut_that_selects_has_entries_that_stay(matrix: Tensor, kept: list[int] | None) -> None:
    found = Basis(change(matrix), (torch.Size((4, 3)),)).kept()
    assert (found if found is None else found.tolist()) == kept


def test_what_is_not_finite_in_a_state_that_goes_does_not_reach_those_that_stay() -> None:
    average = torch.arange(12.0).view(4, 3)
    average[1] = torch.inf  # as a sum of products, 0 times this would be NaN
    unknown = UnsupportedOptimizerError("unknown")
    states = PartStates(
        change(PICKS), [torch.zeros(4, 3)], [{"m": average}], {"m": "linear"}, lambda _: {}, lambda _key, _i: unknown
    )
    assert torch.equal(states.carried()[0]["m"], average[[2, 0]])
