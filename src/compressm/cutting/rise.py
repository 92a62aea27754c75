"""The rise of the loss that a planned cut causes, measured on some data before anything is written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import LayerChange
from compressm.cutting.replay import cut_copy
from compressm.errors import ConfigError
from compressm.observing.inputs import Call, calls_and_batches
from compressm.observing.labels import divergences
from compressm.observing.loss_evidence import Loss, losses_of, mask_of
from compressm.runtime.modes import modes_kept
from compressm.runtime.processes import gathered


@dataclass(frozen=True)
class Rise:
    """A measured rise of the loss.

    Attributes:
        nats: mean over predictions (over sequences if the loss is a function).
        standard_error: of the mean; NaN for a single one.
        count: how many were compared.
    """

    nats: float
    standard_error: float
    count: int


def measured_rise(model: nn.Module, changes: Mapping[str, LayerChange], data: Any, loss: Loss) -> Rise:
    """The rise by one cut; see `measured_rises`."""
    return measured_rises(model, [changes], data, loss)[0]


@torch.no_grad()
def measured_rises(model: nn.Module, cuts: Sequence[Mapping[str, LayerChange]], data: Any, loss: Loss) -> list[Rise]:
    """Run the model without a cut and with each of several, on the same inputs.

    With a likelihood the rise is the Kullback-Leibler divergence of the cut model's predictions from those of the uncut
    one. It needs no labels, and is the expected rise of the loss under the uncut model's own predictions. If the loss
    is a function, the rise is the difference of its means.

    Args:
        model: the model before the changes; in evaluation mode while it runs.
        cuts: the changes of each, by layer name.
        data: batches; see `compressm.observing.inputs`.
        loss: as for `gather_evidence`.

    In several processes all of them must call this, each with its share of the data.

    Raises:
        ConfigError: the data make no prediction.
    """
    sums = torch.zeros(len(cuts), 3, dtype=torch.float64)
    with modes_kept(model):
        model.eval()
        for call, batch in calls_and_batches(model, data):
            before = call(model)
            for index, changes in enumerate(cuts):
                with cut_layers(model, changes) as smaller:
                    after = call(smaller)
                rises = _rises(model, before, after, batch, call, loss)
                sums[index] += torch.stack([rises.sum(), rises.square().sum(), rises.new_tensor(rises.numel())]).cpu()
    return [_mean(*one) for one in torch.stack(gathered(sums)).sum(0).tolist()]


def _rises(model: nn.Module, before: Any, after: Any, batch: Any, call: Call, loss: Loss) -> Tensor:
    """The rise of every prediction, or of every sequence if the loss is a function; float64."""
    if not callable(loss):
        return divergences(before, after, loss, mask_of(model, call))
    return (losses_of(model, after, batch, call, loss) - losses_of(model, before, batch, call, loss)).double()


def _mean(total: float, squares: float, count: float) -> Rise:
    if not count:
        raise ConfigError("the data make no prediction that is not at padding: pass more sequences")
    mean = total / count
    spread = math.sqrt(max(0.0, squares / count - mean**2) / (count - 1)) if count > 1 else math.nan
    return Rise(mean, spread, int(count))


@contextlib.contextmanager
def cut_layers(model: nn.Module, changes: Mapping[str, LayerChange]) -> Generator[nn.Module]:
    """The model with smaller copies in place of the layers that are to be cut, as long as the context is open.

    Args:
        model: the model, back as it was afterwards.
        changes: by layer name.

    Returns:
        the model; or the copy, if the model is itself such a layer.
    """
    copies = {id(model.get_submodule(name)): cut_copy(model.get_submodule(name), one) for name, one in changes.items()}
    if id(model) in copies:
        yield copies[id(model)]
        return
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()  # pyright: ignore[reportPrivateUsage]
        if child is not None and id(child) in copies  # `named_children` leaves out a layer's second place in one parent
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = copies[id(child)]  # pyright: ignore[reportPrivateUsage]
        yield model
    finally:
        for parent, name, child in places:
            parent._modules[name] = child  # pyright: ignore[reportPrivateUsage]


__all__ = ["Rise", "cut_layers", "measured_rise", "measured_rises"]
