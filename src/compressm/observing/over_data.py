"""Moments of a model's selective layers over data that the caller has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compressm.errors import ConfigError, InvalidSystemError
from compressm.observing.inputs import calls
from compressm.observing.moments import Statistics
from compressm.runtime.modes import modes_kept
from compressm.runtime.processes import gathered
from compressm.theory.recurrence import Moments


def gather(model: nn.Module, data: Any, sequences: int | None = None) -> dict[str, Moments]:
    """Moments of every selective layer of a model over some data; empty where there is no such layer.

    Args:
        model: called in evaluation mode; the modes of all its parts are restored.
        data: a batch, or an iterable of batches: tensors or arrays, pairs with labels, or mappings of keyword
            arguments; see `compressm.observing.inputs`. Ignored if there is no selective layer.
        sequences: how many sequences of each batch are used; by default all.

    For every layer the number of operations is the number of tokens, times the layer's width, times the square of its
    state dimension. The memory holds one state of every sequence of a batch. Pass fewer or smaller batches to use less.

    In several processes all of them must call this, each with its share of the data.

    Raises:
        UnsupportedModelError: no layer that compressm knows, or a layer that no data reached.
        InvalidSystemError: the data, or a layer's values on them, are not finite.
        ConfigError: data without a batch, or that the model cannot take; in all processes.
    """
    statistics = Statistics(model, sequences, memory=1.0, strict=True)
    if not statistics.layers:
        return {}
    observe_all(statistics, model, data)
    return statistics.moments()


def observe_all(statistics: Statistics, model: nn.Module, data: Any) -> None:
    """Let a model read some data, in evaluation mode, while its selective layers are observed; see `gather`.

    Raises:
        InvalidSystemError, ConfigError: as `gather`.
    """
    unfit = None
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for index, call in enumerate(calls(model, data)):
                statistics.observe_next(training_only=False, when=f"batch {index} of data")
                call(model)
    except (ConfigError, InvalidSystemError) as error:
        unfit = error
    finally:
        statistics.close()
    # Tell the other processes, which would otherwise wait for this one's moments for ever.
    if all_unfit := [error for error in gathered(unfit) if error is not None]:
        raise unfit or all_unfit[0]
