"""One model, many sizes: states sorted by worth once, on data, and cut to any prefix later, without data.

`sort_states` changes the coordinates of every layer, not what it computes; see `compressm.theory.ordering`. The order
that it returns is saved beside the model (`StateOrder.save`), and `StateOrder.slice` cuts by it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressm.adapters import find_layers, layer_values
from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.changes import LayerChange
from compressm.adapters.plain import check_wrappers
from compressm.adapters.registry import check_plain, layers_that_need_data
from compressm.cutting.compression import check_model_sizes
from compressm.cutting.decisions import must_be_alike, unshared
from compressm.cutting.order_by_loss import best_orders
from compressm.cutting.plan import Plan
from compressm.cutting.report import LayerReport, Report
from compressm.cutting.serving import Memory, Serving
from compressm.cutting.sizes import sizes_for, state_dims
from compressm.cutting.spectrum import balance_layers
from compressm.errors import CheckpointError, InvalidRankRuleError, InvalidSystemError, UnsupportedModelError
from compressm.observing.held_out import twice_readable
from compressm.observing.loss_evidence import Loss
from compressm.observing.over_data import gather
from compressm.runtime.files import finite, write_json
from compressm.theory.ordering import order_states, prefix_errors
from compressm.theory.rank_rule import RankRule, check_choice
from compressm.theory.ranks import choose_ranks
from compressm.theory.recurrence import ErrorEstimate, Moments, SelectiveBalancing, SelectiveReduction, first_states
from compressm.theory.selection import Selection
from compressm.theory.targets import Target

ORDER_FILE = "compressm_states.json"
_FORMAT = 1


@dataclass(frozen=True)
class LayerOrder:
    """The order of one layer's states.

    Attributes:
        expected: relative error of the recurrence's output if the first 0, 1, ..., n states are kept, on the data that
            the states were sorted by.
        groups: groups of B and C, each of which was sorted by itself.
        order: old indices of the states in their new order, by group; None where the coordinates are mixed.
        seconds: second moments of the entries of B and C in the new order, by group, for layers that normalise them;
            empty for others.
    """

    expected: tuple[float, ...]
    groups: int
    order: tuple[tuple[int, ...], ...] | None
    seconds: Mapping[str, tuple[tuple[float, ...], ...]]

    @property
    def states(self) -> int:
        """State dimension n."""
        return len(self.expected) - 1

    def prefix(self, states: int) -> LayerOrder:
        """The order after a cut to the first states."""
        rows = None if self.order is None else tuple(row[:states] for row in self.order)
        seconds = {name: tuple(row[:states] for row in rows) for name, rows in self.seconds.items()}
        return LayerOrder(self.expected[: states + 1], self.groups, rows, seconds)

    def reduction(self, states: int) -> SelectiveReduction:
        """The cut to the first states, with the second moments that layers with norms of B and C need."""
        made = first_states(self.states, states, self.groups)
        if not self.seconds:
            return made
        V, W = (torch.diag_embed(torch.tensor(self.seconds[name], dtype=torch.float64)) for name in "BC")
        zeros = torch.zeros_like(V[..., 0])
        one = torch.ones((), dtype=torch.float64)
        return replace(made, moments=Moments(one, torch.zeros_like(V), W, V, zeros, zeros, zeros))


@dataclass(frozen=True)
class StateOrder:
    """The states of a model's layers, sorted by `sort_states`.

    Attributes:
        selection: what worth is.
        layers: by name.
        rises: the ways that were tried, the taken one first, each with the rises of the loss by its cuts to a half, a
            quarter and an eighth of the states; empty without a loss.
    """

    selection: str
    layers: Mapping[str, LayerOrder]
    rises: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])

    def slice(
        self,
        model: nn.Module,
        *,
        states: int | None = None,
        fraction: float | None = None,
        multiple_of: int = 1,
        target: Target | None = None,
        per_layer: bool = False,
    ) -> Report:
        """Cut a sorted model to the first states of every layer, in place and without data.

        The result has the weights of a cut that removes these states and compensates for them by nothing.

        Args:
            model: as `sort_states` left it, trained further or not.
            states: at most so many in every layer.
            fraction: at most this share of each layer's states.
            multiple_of: sizes that are preferred, as in `compress`.
            target: sizes that are allowed, as in `compress`.
            per_layer: whether layers may differ in size, as in `compress`.

        Returns:
            a report of each layer with the error that is expected on the data that the states were sorted by.

        Raises:
            InvalidRankRuleError: contradicting or impossible sizes.
            UnsupportedModelError: the order is that of another model, or a layer that cannot have this size.

        After an error the model is unchanged.
        """
        started = time.perf_counter()
        rule = RankRule(
            states=states, fraction=fraction, multiple_of=multiple_of, target=target, per_layer=per_layer,
            min_reduction=0.0,
        )  # fmt: skip
        self._check(model)
        check_model_sizes(model, rule)
        layers = layers_that_need_data(model)
        ranks = choose_ranks(
            {name: torch.zeros(one.states) for name, one in self.layers.items()},
            rule, alike=must_be_alike(layers, rule), legal=sizes_for(model, rule),
        )  # fmt: skip
        cut = {name: rank for name, rank in ranks.items() if rank < self.layers[name].states}
        changes = {
            name: layers[name][1]
            .planned(layers[name][0])(layer_values(layers[name][0]), self.layers[name].reduction(rank))
            .in_files()
            for name, rank in cut.items()
        }
        before = Memory.of(model)
        report = Report(tuple(self._told(name, rank) for name, rank in ranks.items()), time.perf_counter() - started)
        return replace(Plan(report, changes).apply(model), serving=Serving(before, Memory.of(model)))

    def of(self, model: nn.Module) -> StateOrder:
        """The order of a model that was sliced by this one."""
        dims = state_dims(model)
        return replace(self, layers={name: one.prefix(dims[name]) for name, one in self.layers.items()})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the order as ``compressm_states.json`` into the folder that the sorted model is saved in.

        Raises:
            ConfigError: it cannot be written.
        """
        layers = {name: vars(one) for name, one in self.layers.items()}
        write_json(
            Path(folder) / ORDER_FILE,
            finite({"format": _FORMAT, "selection": self.selection, "layers": layers, "rises": dict(self.rises)}),
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> StateOrder:
        """Read what `save` wrote.

        Raises:
            CheckpointError: nothing there, or damaged.
        """
        path = Path(folder) / ORDER_FILE
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}")
            layers = {str(name): _layer(entry) for name, entry in content["layers"].items()}
            rises = {str(way): tuple(map(float, one)) for way, one in content.get("rises", {}).items()}
            return cls(str(content["selection"]), layers, rises)
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} has no {ORDER_FILE}, so that its states are in no known order: sort them first, by "
                "compressm compress --sorted or compressm.sort_states"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); copy the folder again, or sort the states anew"
            ) from error

    def _check(self, model: nn.Module) -> None:
        dims, known = state_dims(model), {name: one.states for name, one in self.layers.items()}
        if dims != known:
            odd = sorted(name for name in {*dims, *known} if dims.get(name) != known.get(name))[0]
            raise UnsupportedModelError(
                f"{odd} has {dims.get(odd, 'no')} states, and {known.get(odd, 'none')} were sorted: the order is that "
                "of another model; sort this one by compressm.sort_states"
            )
        check_plain({name: layer for name, (layer, _) in find_layers(model).items()})

    def _told(self, name: str, rank: int) -> LayerReport:
        one = self.layers[name]
        if rank == one.states:
            return LayerReport(name, rank, rank, "kept", f"it has {rank} states already", None, ())
        return LayerReport(
            name, one.states, rank, "cut", "", ErrorEstimate(one.states, rank, one.expected[rank], math.nan), ()
        )


def _layer(entry: Mapping[str, Any]) -> LayerOrder:
    """An entry of the file, checked."""
    expected, groups = tuple(float(one) for one in entry["expected"]), int(entry["groups"])
    order = None if entry["order"] is None else tuple(tuple(int(i) for i in row) for row in entry["order"])
    seconds = {str(name): tuple(tuple(map(float, row)) for row in rows) for name, rows in entry["seconds"].items()}
    n = len(expected) - 1
    tables = [*seconds.values(), *([] if order is None else [order])]
    if n < 1 or groups < 1 or any(len(rows) != groups or any(len(row) != n for row in rows) for rows in tables):
        raise ValueError("sizes that do not fit together")
    return LayerOrder(expected, groups, order, seconds)


def sort_states(
    model: nn.Module, data: Any, *, selection: Selection = "hankel", loss: Loss | None = None
) -> StateOrder:
    """Sort the states of every layer by what they are worth, in place. The model computes the same function after it.

    Permutations leave the outputs as they are up to the order of sums. Where the family allows more, so do rotations
    (the delta rule with linear keys) and balanced coordinates (linear attention). Save the order beside the model:

        order = compressm.sort_states(model, data=batches)
        model.save_pretrained(folder)  # or compressm.save(model, folder)
        order.save(folder)
        ...
        StateOrder.load(folder).slice(model, states=64)

    Args:
        model: with selective layers only. A linear layer needs no data to be cut, and nothing to be sorted.
        data: what the worth is measured on, as in `compress`.
        selection: what worth is, as in `compress`.
        loss: as in `compress`. Layers whose states can only be permuted are then sorted by each of several criteria
            (see `compressm.cutting.picking`), the model runs with their cuts to a half, a quarter and an eighth of the
            states, and the order with the least geometric mean of the rises of the loss is taken.

    Returns:
        the order.

    Raises:
        UnsupportedModelError: a layer without data-dependent recurrence, or one that a cut could not write either.
        InvalidSystemError: parameters or data that are not finite.
        InvalidRankRuleError: an unknown selection, or one beside a loss.
        ConfigError: data that the model cannot take.

    After an error the model is unchanged.
    """
    check_choice("selection", selection, Selection)
    if loss is not None and selection != "hankel":
        raise InvalidRankRuleError(f"selection={selection!r} beside a loss, which tries several: leave one of them out")
    every, layers = find_layers(model), layers_that_need_data(model)
    if linear := [name for name in every if name not in layers]:
        raise UnsupportedModelError(
            f"{linear[0]} ({type(every[linear[0]][0]).__name__}) is a linear layer, whose states need no sorting: "
            "compressm.compress cuts it to any size without data"
        )
    if fixed := [name for name in layers if not layers[name][1].sorts]:
        raise UnsupportedModelError(
            f"{fixed[0]} ({type(layers[fixed[0]][0]).__name__}) has states in pairs at fixed places, which cannot be "
            "sorted: compressm.compress cuts it"
        )
    if loss is not None:
        data = twice_readable(model, data)
    balancings = _balanced(model, data)
    orders = _orders(model, balancings, partial(order_states, selection=selection))
    rises = dict[str, tuple[float, ...]]()
    if loss is not None:
        orders, rises = best_orders(model, balancings, orders, data, loss)
    _write(model, orders)
    found = {name: _ordered(balancings[name], one, layers[name][1]) for name, one in orders.items()}
    return StateOrder(next(iter(rises), selection), found, rises)


# The coordinates for a layer's states, from its moments, and whether it takes any map of them, or rotations; None to
# leave the layer as it is.
Coordinates = Callable[[SelectiveBalancing, bool, bool], SelectiveReduction | None]


def in_coordinates(model: nn.Module, data: Any, coordinates: Coordinates) -> dict[str, SelectiveReduction]:
    """Write the states of a model's selective layers in other coordinates, in place.

    Args:
        model: the model.
        data: what the moments are measured on.
        coordinates: chooses them; a reduction to as many states as there are.

    Returns:
        the coordinates of the layers that were changed, by name.
    """
    found = _orders(model, _balanced(model, data), coordinates)
    _write(model, found)
    return found


def _balanced(model: nn.Module, data: Any) -> dict[str, SelectiveBalancing]:
    """The moments of the selective layers of a model whose states can be written in other coordinates."""
    layers = layers_that_need_data(model)
    check_wrappers(model, {name: layer for name, (layer, _) in layers.items()}, list(layers))
    check_plain({name: layer for name, (layer, _) in layers.items()})
    found = balance_layers(model, moments=gather(model, data))
    return {name: one for name, one in found.items() if isinstance(one, SelectiveBalancing)}


def _orders(
    model: nn.Module, balancings: Mapping[str, SelectiveBalancing], coordinates: Coordinates
) -> dict[str, SelectiveReduction]:
    found: dict[str, SelectiveReduction] = {}
    for name, (layer, adapter) in layers_that_need_data(model).items():
        into, _, rotates = adapter.maps(layer)
        one = coordinates(balancings[name], into, rotates)
        if one is None:
            continue
        if not one.estimate.valid:
            raise InvalidSystemError(f"{name}: {'; '.join(one.estimate.failures)}")
        found[name] = one
    return found


def _write(model: nn.Module, orders: Mapping[str, SelectiveReduction]) -> None:
    layers = layers_that_need_data(model)
    changes = dict[str, LayerChange]()
    for name, one in orders.items():
        layer, adapter = layers[name]
        changes[name] = unshared(model, name, adapter.planned(layer)(layer_values(layer), one).in_files())
    Plan(Report((), 0.0), changes).apply(model)


def _ordered(balancing: SelectiveBalancing, found: SelectiveReduction, adapter: SelectiveAdapter) -> LayerOrder:
    """The order as it is recorded."""
    expected = prefix_errors(balancing, found)
    groups, seconds = found.into.shape[0], dict[str, tuple[tuple[float, ...], ...]]()
    order = None if found.kept is None else tuple(tuple(row) for row in found.kept.tolist())
    if adapter.normed and found.kept is not None and found.moments is not None:
        for name, moment in (("B", found.moments.V), ("C", found.moments.W)):
            diagonal = moment.diagonal(dim1=-2, dim2=-1).gather(1, found.kept) / found.moments.tokens
            seconds[name] = tuple(tuple(row) for row in diagonal.tolist())
    return LayerOrder(tuple(expected.tolist()), groups, order, seconds)


__all__ = ["ORDER_FILE", "LayerOrder", "StateOrder", "in_coordinates", "sort_states"]
