"""Moments of both halves of the data apart, so that a cut can be tried on sequences that it was not made from.

A cut of a selective layer is fitted to the data. On those data its error is too small, by much where they are few or
where the inputs of a sequence are alike, as in a random walk. So the sequences are dealt out to two halves in turn; the
same cut is also planned from each half alone, and measured on the other one. The cut that is written is made from all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressm.adapters import SelectiveAdapter, find_layers
from compressm.distributed import gathered
from compressm.errors import UnsupportedModelError
from compressm.selective import Moments
from compressm.statistics import Statistics, not_seen, observe_all, summed

Halves = tuple[dict[str, Moments], dict[str, Moments]]


class Dealer:
    """Deals sequences out to halves in turn, for every layer on its own."""

    def __init__(self) -> None:
        self._dealt: defaultdict[str, int] = defaultdict(int)

    def halves(self, name: str, rows: int) -> Tensor:
        """0 or 1 for the next sequences that a layer reads, shape ``(rows,)``."""
        first = self._dealt[name]
        self._dealt[name] += rows
        return (first + torch.arange(rows)) % 2


class HalvedStatistics(Statistics):
    """Moments of both halves of the sequences."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None, memory=1.0)
        self._parts = (Statistics(model, None, memory=1.0), Statistics(model, None, memory=1.0))
        self._dealer = Dealer()

    def observe(
        self,
        name: str,
        layer: nn.Module,
        adapter: SelectiveAdapter,
        hidden: Tensor,
        present: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> None:
        """As the parent's, for each half."""
        present = self._present if present is None else present
        present = None if present is None or present.shape != hidden.shape[:2] else present
        half = self._dealer.halves(name, hidden.shape[0]).to(hidden.device)
        for which, part in enumerate(self._parts):
            rows = (half == which).nonzero()[:, 0]
            if len(rows):
                some = (None if value is None else value[rows] for value in (present, starts))
                part.observe(name, layer, adapter, hidden[rows], *some)

    def of_halves(self) -> Halves:
        """Moments of each half by layer name, over all processes; of no tokens where a half got no sequence.

        Raises:
            UnsupportedModelError: a layer was never observed; on all processes.
        """
        found = [{name: Moments(**value) for name, value in part.state_dict().items()} for part in self._parts]
        unseen = [name for name in self.layers if not any(name in half for half in found)]
        if missing := [name for names in gathered(unseen) for name in names]:
            raise UnsupportedModelError(not_seen(missing[0]))
        for name in self.layers:
            for mine, other in (found, found[::-1]):
                if name not in mine:
                    mine[name] = other[name].plus(other[name], -1.0)
        first, second = ({name: summed(half[name]) for name in self.layers} for half in found)
        return first, second


def gather_halves(model: nn.Module, data: Iterable[Any]) -> Halves:
    """Moments of every selective layer over each half of some data; see `compressm.statistics.gather`."""
    statistics = HalvedStatistics(model)
    if statistics.layers:
        observe_all(statistics, model, data)
    return statistics.of_halves()


def joined(halves: Halves) -> dict[str, Moments]:
    """Over all data."""
    return {name: value.plus(halves[1][name]) for name, value in halves[0].items()}


def twice_readable(model: nn.Module, data: Iterable[Any]) -> Iterable[Any]:
    """The same batches, in the same order whenever they are read.

    Halves of data in another order would be other halves. Without selective layers the order makes no difference, and
    only what cannot be read again is kept.
    """
    ordered = any(isinstance(adapter, SelectiveAdapter) for _, adapter in find_layers(model).values())
    if isinstance(data, list | tuple) or not (ordered or isinstance(data, Iterator)):
        return cast("Iterable[Any]", data)
    return list(data)


def halved(halves: Halves, name: str) -> bool:
    """Whether both halves hold anything of a layer."""
    return all(name in half and float(half[name].tokens) > 0 for half in halves)


__all__ = ["Dealer", "Halves", "gather_halves", "halved", "joined", "twice_readable"]
