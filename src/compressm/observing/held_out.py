"""Separate moments of both halves of the data, so that a cut can be measured on sequences that it was not made from.

A cut of a selective layer is fitted to the data. Its error on the same data is too small, and much too small if the
data are few, or if the inputs of a sequence are correlated, as in a random walk. So the sequences are assigned to two
halves alternately. The same cut is also computed from each half alone, and measured on the other half. The written cut
is computed from all data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressm.adapters import SelectiveAdapter, layers_that_need_data
from compressm.errors import UnsupportedModelError
from compressm.observing.expected import is_array
from compressm.observing.moments import Reading, Statistics, summed
from compressm.observing.over_data import observe_all
from compressm.runtime.processes import gathered
from compressm.theory.recurrence import Moments

Halves = tuple[dict[str, Moments], dict[str, Moments]]


class Dealer:
    """Assigns sequences to the two halves alternately, separately for every layer."""

    def __init__(self) -> None:
        self._dealt: defaultdict[str, int] = defaultdict(int)

    def halves(self, name: str, rows: int) -> Tensor:
        """The halves, 0 or 1, of the next sequences that a layer reads, shape ``(rows,)``."""
        first = self._dealt[name]
        self._dealt[name] += rows
        return (first + torch.arange(rows)) % 2


class HalvedStatistics(Statistics):
    """Moments of both halves of the sequences."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None, memory=1.0, strict=True)
        self._parts = tuple(Statistics(model, None, memory=1.0, strict=True) for _ in range(2))
        self._dealer = Dealer()

    @property
    def unseen(self) -> list[str]:
        """Names of the layers without moments in either half."""
        return [name for name in self.layers if all(name in part.unseen for part in self._parts)]

    def _look(self, name: str, layer: nn.Module, adapter: SelectiveAdapter, reading: Reading) -> None:
        """As the parent's, for each half."""
        half = self._dealer.halves(name, reading.hidden.shape[0]).to(reading.hidden.device)
        if reading.carried is not None:  # carried states are one value for all rows, whose form only the adapter knows
            half = half[:1].expand_as(half)
        for which, part in enumerate(self._parts):
            part._when, part._arguments = self._when, self._arguments
            rows = (half == which).nonzero()[:, 0]
            if len(rows):
                part._look(name, layer, adapter, reading.of(rows))

    def of_halves(self) -> Halves:
        """Moments of each half by layer name, over all processes; their ``tokens`` is 0 if a half got no sequence.

        Raises:
            UnsupportedModelError: a layer was never observed, or not completely; on all processes.
        """
        if problems := [line for lines in gathered(self.problems()) for line in lines]:
            raise UnsupportedModelError(problems[0])
        found = [{name: Moments(**value) for name, value in part.state_dict().items()} for part in self._parts]
        for name in self.layers:
            for mine, other in (found, found[::-1]):
                if name not in mine:
                    mine[name] = other[name].plus(other[name], -1.0)
        first, second = ({name: summed(half[name]) for name in self.layers} for half in found)
        return first, second


def gather_halves(model: nn.Module, data: Any) -> Halves:
    """Moments of every selective layer over each half of some data; see `compressm.observing.over_data.gather`."""
    statistics = HalvedStatistics(model)
    if statistics.layers:
        observe_all(statistics, model, data)
    return statistics.of_halves()


def joined(halves: Halves) -> dict[str, Moments]:
    """The moments over both halves."""
    return {name: value.plus(halves[1][name]) for name, value in halves[0].items()}


def twice_readable(model: nn.Module, data: Any) -> Any:
    """The same batches, in the same order at every reading.

    In another order the sequences would be assigned to other halves. Without selective layers the order does not
    matter, and batches are kept only if they cannot be read again.
    """
    ordered = bool(layers_that_need_data(model))
    whole = is_array(data) or isinstance(data, list | tuple | Mapping | str | bytes) or not isinstance(data, Iterable)
    if whole or not (ordered or isinstance(data, Iterator)):
        return data
    return list(cast("Iterable[Any]", data))


def halved(halves: Halves, name: str) -> bool:
    """Whether both halves have moments of a layer."""
    return all(name in half and float(half[name].tokens) > 0 for half in halves)


__all__ = ["Dealer", "Halves", "gather_halves", "halved", "joined", "twice_readable"]
