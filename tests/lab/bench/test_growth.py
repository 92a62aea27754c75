"""A guard against regressions that no clock is needed for: operations, kernel calls and bytes kept by a training step.

They are held at or below the numbers in counts.json. After a change that lowers them, or one that raises them and is
worth it, ``python benchmarks/growth.py --counts`` writes the file anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressm.lab.bench.counting import BASE, SIZES, count, count_family
from compressm.layers.families import FAMILIES
from compressm.scans import native

STORED = json.loads(Path(__file__).with_name("counts.json").read_text(encoding="utf-8"))
# S4 computes its kernel in stages, whose number grows with the logarithm of the length.
LOOPING = {"s4"}
# One head at the base width, two at the wider one: gradients of what heads share are then sums.
SUMS = {"mamba3": 3}
ROOM = 1.05  # for other machines, whose vectors, and what is padded to them, are shorter or longer


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_stay_at_or_below_the_stored_ones(family: str) -> None:
    if not native.available():
        pytest.skip("the numbers are those of the compiled kernels")
    found = count_family(family)
    for size in SIZES:
        for what, value in STORED[family][size].items():
            assert found[size][what] <= ROOM * value, f"{family}, {size}: {what}"
    base = found["base"]
    for size in ("longer", "more sequences", "wider"):
        assert found[size]["kernels"] == base["kernels"], size
        more = SUMS.get(family, 0) if size == "wider" else 0
        equal = found[size]["operations"] == base["operations"] + more
        assert equal or (family in LOOPING and size == "longer"), size
    # Four times the length keeps about four times the bytes, not sixteen: no matrix of length x length. Likewise for
    # four times the sequences, and twice the width.
    for size, times in (("longer", 4), ("more sequences", 4), ("wider", 2)):
        assert found[size]["kept_bytes"] <= 1.08 * times * base["kept_bytes"], size
    layers, between = SIZES["more layers"]["layers"], 4 * BASE["batch"] * BASE["length"] * BASE["width"]
    assert found["more layers"]["kernels"] == layers * base["kernels"]
    assert found["more layers"]["operations"] <= layers * base["operations"]
    assert found["more layers"]["kept_bytes"] <= layers * base["kept_bytes"] + (layers - 1) * between


class _Loop(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        state = torch.zeros_like(u[:, 0])
        for now in u.unbind(1):
            state = torch.tanh(state + now)
        return state


def test_a_loop_over_time_is_noticed() -> None:
    short, long = (count(_Loop(), torch.randn(2, length, 3, requires_grad=True)) for length in (5, 10))
    assert long.operations >= short.operations + 10
    assert (short.kept_bytes, long.kept_bytes) == (5 * 6 * 4, 10 * 6 * 4)  # each tanh keeps its result
