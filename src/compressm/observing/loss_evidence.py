"""Evidence of a model's layers from data and the loss, gathered in passes of its own or taken from an observer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressm.errors import ConfigError
from compressm.observing.expected import is_array
from compressm.observing.inputs import Call, calls_and_batches
from compressm.observing.labels import Likelihood, fisher_probes, prediction_of
from compressm.observing.observer import Kept, Observer
from compressm.observing.padding import TELLS, mask_in
from compressm.runtime.modes import modes_kept
from compressm.runtime.processes import raised_on_all
from compressm.runtime.random_state import rng_state, set_rng_state
from compressm.theory.evidence import Covariances
from compressm.theory.fisher import MaskFisher

# What balances a linear layer: white noise at its input and output; or its states on data, and the loss's gradients.
Gramians = Literal["white", "loss"]
SAMPLES = 400  # sequences that are kept to predict the rise of the loss
# Probes of every sequence that makes a single prediction, each in a pass of its own. Few of its sequences decide what a
# cut costs a classifier, and one probe of each left the prediction 60 % too large once. The tokens of a longer output
# have a probe each, and average.
_PROBES = 4
Loss = Likelihood | Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class LossEvidence:
    """What a model's layers do on data, and how the loss depends on it.

    Attributes:
        covariances: second moments of states and adjoint states, by name of the linear layers.
        fishers: Fisher matrices of the masks, per prediction, by name of the selective layers.
        samples: for predictions by `damage`, by layer name; see `Observer.samples`.
        predictions: how many predictions the loss of a sequence sums.
    """

    covariances: Mapping[str, Covariances]
    fishers: Mapping[str, MaskFisher]
    samples: Mapping[str, Sequence[Kept]]
    predictions: float = 1.0

    @classmethod
    def of(cls, observer: Observer) -> LossEvidence:
        """What an observer has seen; in several processes all of them must call this.

        Raises:
            UnsupportedModelError: a layer was never observed.
            ConfigError: all predictions were at padding.
        """
        seen, predictions = observer.evidence(), observer.predictions_per_sequence
        if not predictions:
            raise ConfigError("the data make no prediction that is not at padding: pass more sequences")
        return cls(
            {name: one for name, one in seen.items() if isinstance(one, Covariances)},
            {name: one.per(predictions) for name, one in seen.items() if isinstance(one, MaskFisher)},
            observer.samples(),
            predictions,
        )


def gather_evidence(
    model: nn.Module,
    data: Any,
    loss: Loss = "classification",
    sequences: int | None = None,
    keep: int = 0,
) -> Observer:
    """Evidence of every layer of a model that can be observed, over some data.

    Args:
        model: called in evaluation mode. The modes of all its parts, gradients and the random state are restored.
        data: a batch of the model's inputs, or an iterable of batches; see `compressm.observing.inputs`.
        loss: ``"classification"`` or ``"regression"``, for the Fisher information of the model's own predictions, see
            `labels`; or a function of the model's output and the batch that returns the loss of every sequence, shape
            ``(batch,)``, for example with the batch's own labels.
        sequences: how many sequences of each batch are used; by default all.
        keep: the number of sequences whose samples are kept for predictions; see `Observer`.

    Returns:
        an observer that has seen the data; see its `Observer.evidence`.

    Raises:
        UnsupportedModelError: no layer that compressm knows.
        ConfigError: data that the model cannot take, or an output that does not fit the likelihood.
    """
    observer = Observer(model, "sum", sequences, memory=1.0, keep=keep)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng = rng_state()
    try:
        with modes_kept(model), torch.enable_grad():
            model.eval()
            for parameter in trained:  # only gradients of activations are needed
                parameter.requires_grad_(False)
            for call, batch in calls_and_batches(model, data):
                if _observed(observer, model, call, batch, loss):
                    observer.keep = keep * _PROBES
                    for _ in range(_PROBES - 1):
                        _observed(observer, model, call, batch, loss)
    finally:
        observer.close()
        for parameter in trained:
            parameter.requires_grad_()
        set_rng_state(rng)
    return observer


def _observed(observer: Observer, model: nn.Module, call: Call, batch: Any, loss: Loss) -> bool:
    """Observe one pass over a batch. Returns whether other probes of it would tell more: of a likelihood, if every
    sequence makes a single prediction."""
    observer.observe_next(training_only=False, frozen=True)
    output = call(model)
    losses = losses_of(model, output, batch, call, loss)
    made = predictions(model, output, call, loss)
    observer.count(len(losses), made)
    if observer.layers:  # otherwise nothing in the model has a gradient
        _check_losses(losses)
        losses.sum().backward()
    return made == len(losses)


def evidence_on(model: nn.Module, batches: Any, loss: Loss) -> LossEvidence:
    """Evidence over some data, with samples for predictions; over all processes, each with its share of the data."""
    return LossEvidence.of(raised_on_all(lambda: gather_evidence(model, batches, loss, keep=SAMPLES)))


def losses_of(model: nn.Module, output: Any, batch: Any, call: Call, loss: Loss) -> Tensor:
    """The loss of every sequence of a batch, or with a likelihood its `fisher_probes`, in nats, shape ``(batch,)``."""
    if not callable(loss):
        return fisher_probes(output, loss, mask_of(model, call))
    losses = loss(output, batch)
    rows = next(value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)).shape[:1]
    if not isinstance(losses, Tensor) or losses.shape != rows:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"loss must return the loss of every sequence, shape {tuple(rows)}; got {got}: use reduction='none', and "
            "sum over tokens"
        )
    return losses


def _check_losses(losses: Tensor) -> None:
    """Refuse losses without a gradient, or that are not finite."""
    if not losses.requires_grad:
        raise ConfigError(
            "the losses have no gradient: compute them from the model's output with differentiable operations, without "
            "detach(), item() or no_grad()"
        )
    if not bool((finite := torch.isfinite(losses)).all()):
        row = int((~finite).nonzero()[0])
        raise ConfigError(
            f"the loss of sequence {row} of a batch is {float(losses[row].detach())}; expected a finite number"
        )


def predictions(model: nn.Module, output: Any, call: Call, loss: Loss) -> float | None:
    """How many predictions a batch's output makes: one per sequence, or one per token that is not padding. None if the
    loss is a function, which tells the loss of a sequence alone."""
    if callable(loss):
        return None
    shape, present = prediction_of(output).shape[:-1], mask_of(model, call)
    return float(present.sum()) if present is not None and present.shape == shape else float(math.prod(shape))


def mask_of(model: nn.Module, call: Call) -> Tensor | None:
    """1 for tokens and 0 for padding, shape ``(batch, length)``, if the call's arguments or the model tell.

    Of the last tokens only, where a call of a model of transformers asks for their predictions (``logits_to_keep``).
    """
    if isinstance(model, TELLS):
        return model.present(*call.args, **call.kwargs)
    mask, kept = mask_in(call.kwargs), call.kwargs.get("logits_to_keep")
    return mask if mask is None or not isinstance(kept, int) else mask[:, -kept:]  # 0 for all


def divided(model: nn.Module, data: Any) -> tuple[list[Any], list[Any]]:
    """Data in two parts: every fourth batch is held out, and the others are for evidence.

    If there are fewer than four batches, each is divided into four by its rows first.

    Raises:
        ConfigError: data that the model cannot take, or fewer than four sequences.
    """
    batches = [batch for _, batch in calls_and_batches(model, data)]
    if len(batches) < 4:
        batches = [part for batch in batches for part in _quarters(batch)]
    if len(batches) < 4:
        raise ConfigError(
            "data hold fewer than four sequences, and a part of them is held out to check the cut: pass at least four, "
            "better some hundreds"
        )
    return [one for index, one in enumerate(batches) if index % 4 != 3], batches[3::4]


def _quarters(batch: Any) -> list[Any]:
    """A batch divided by its rows."""
    arrays = _arrays(batch)
    rows = len(arrays[0])
    bounds = [rows * quarter // 4 for quarter in range(5)]
    return [_rows(batch, rows, slice(*ends)) for ends in pairwise(bounds) if ends[0] < ends[1]]


def _arrays(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        values: Any = batch.values()
    else:
        values = batch if isinstance(batch, list | tuple) else [batch]
    return [value for value in values if is_array(value) and value.ndim > 0]


def _rows(batch: Any, count: int, rows: slice) -> Any:
    """Some rows of a batch: of every array in it that has ``count``."""
    if isinstance(batch, Mapping):
        return {key: _rows(value, count, rows) for key, value in batch.items()}
    if isinstance(batch, list) and len(batch) == count and not any(is_array(value) for value in batch):
        return batch[rows]  # labels, lengths or names, one for each row
    if isinstance(batch, list | tuple):
        return tuple(_rows(value, count, rows) for value in batch)
    return batch[rows] if is_array(batch) and batch.ndim > 0 and len(batch) == count else batch


__all__ = ["Gramians", "Loss", "LossEvidence", "divided", "evidence_on", "gather_evidence", "losses_of", "mask_of"]
