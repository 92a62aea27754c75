"""Compression inside Hugging Face's Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import nn

from compressm.cutting.fitting import fit_any_size
from compressm.cutting.metrics import Better, as_metric
from compressm.errors import EvaluationError, InvalidRankRuleError, MissingExtraError, UnsupportedModelError
from compressm.saving.checkpoint import load_tree, save_tree
from compressm.training.compressor import Compressor
from compressm.training.history import Event

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError('this needs transformers: pip install "compressm[transformers]"') from error

log = logging.getLogger(__name__)
_RECORD = "compressm"
# The parts of the compressor's state that are tensors. The Trainer's own state is JSON, so they are saved beside it.
_TENSORS = ("observed", "probe", "moments", "samples", "looks", "after")


class CompressionCallback(TrainerCallback):
    """Shrinks the model's state space layers while a `transformers.Trainer` trains it.

    After ``trainer = Trainer(...)`` and before ``trainer.train()`` add

        trainer.add_callback(CompressionCallback(trainer, tolerance=0.02))

    Optimizer, scheduler, accumulation, clipping, mixed precision and DistributedDataParallel keep working after a cut.
    Training resumes from checkpoints of every size, and reloads them (``load_best_model_at_end``). The Trainer logs
    each cut.

    With ``max_drop`` and no ``evaluate`` the metric is the Trainer's own: ``metric_for_best_model`` on the
    ``eval_dataset``, the loss by default. Whether a larger one is better follows ``greater_is_better``. ``evaluate``
    may also be the name of another metric of the Trainer's evaluation; a smaller one is better if its name ends with
    ``loss`` or if ``mode="min"`` says so. A roll-back restores the weights. It does not reset the Trainer's count of
    steps, since the data of these steps have been read; see ``rewind`` in `Compressor`.

    Args:
        trainer: the Trainer that the callback is added to.
        **arguments: arguments of `Compressor`, for example ``tolerance=0.02``.

    Attributes:
        compressor: the `Compressor`, once training has begun.

    Raises:
        UnsupportedModelError: the model has no layer that compressm knows, or is sharded.
        InvalidRankRuleError: when training begins, for arguments that `Compressor` refuses.
    """

    def __init__(self, trainer: Trainer, **arguments: Any) -> None:
        self.trainer = trainer
        self.compressor: Compressor | None = None
        self._arguments = arguments
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise UnsupportedModelError(
                "Trainer shards the model with DeepSpeed or FSDP, and shards cannot be resized in place: train with "
                "DistributedDataParallel, or compress between two trainings with "
                "compressm.integrations.sharding.compress_sharded"
            )
        fit_any_size(self._model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        arguments: dict[str, Any] = {"rewind": False, **self._arguments}
        evaluate = arguments.get("evaluate")
        if isinstance(evaluate, str) or (evaluate is None and arguments.get("max_drop") is not None):
            name = self._metric_name(evaluate)
            self._check_metric(name)
            arguments = {"mode": self._mode(name), **arguments, "evaluate": lambda _: self._evaluate(name)}
        self.compressor = Compressor(self._model, self.trainer.optimizer, state.max_steps, **arguments)
        if _RECORD in _records(state):
            self._resume(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.compressor is not None
        seen = len(self.compressor.history)
        self.compressor.step()
        for event in self.compressor.history[seen:]:
            self._log(event)
        # A checkpoint of this step holds this record; on_save adds its tensors.
        record = self.compressor.state_dict()
        _records(state)[_RECORD] = {key: value for key, value in record.items() if key not in _TENSORS}
        _records(state)[_RECORD]["beside"] = [key for key in _TENSORS if record[key]]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.compressor is not None:
            record = self.compressor.state_dict()
            tensors = {key: record[key] for key in _TENSORS if record[key]}
            if tensors and (folder := _checkpoint(args, state)).is_dir():
                save_tree(folder / _RECORD, tensors)

    @property
    def _model(self) -> nn.Module:
        return cast("nn.Module", self.trainer.model)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.compressor is not None
        nothing: dict[str, Any] = {
            "observed": None, "probe": {}, "moments": {}, "samples": {}, "looks": [], "after": [],
        }  # fmt: skip
        record = {**nothing, **_records(state)[_RECORD]}
        folder = _checkpoint(args, state) / _RECORD
        if folder.is_dir():
            record.update(load_tree(folder))
        elif "observed" in record["beside"]:
            log.warning("%s is not there: the last cut can no longer be undone, and is kept", folder)
        self.compressor.load_state_dict(record)

    def _log(self, event: Event) -> None:
        if metrics := event.metrics():
            self.trainer.log(metrics)

    def _check_metric(self, name: str) -> None:
        """Refuse, before training, a metric that the evaluation does not return."""
        if self.trainer.eval_dataset is None:
            raise InvalidRankRuleError(
                "max_drop needs a metric: give the Trainer an eval_dataset, or CompressionCallback evaluate="
            )
        if isinstance(self.trainer.eval_dataset, dict):
            names = ", ".join(self.trainer.eval_dataset)
            raise InvalidRankRuleError(
                f"max_drop needs one metric, and the Trainer's eval_dataset is a dict ({names}): give "
                "CompressionCallback evaluate=, a function of the model"
            )
        if name != "eval_loss" and self.trainer.compute_metrics is None:
            raise InvalidRankRuleError(
                f"metric_for_best_model={self.trainer.args.metric_for_best_model!r}: the Trainer has no "
                f"compute_metrics that returns {name!r}; pass one, or leave the loss as the metric"
            )

    def _metric_name(self, asked: str | None) -> str:
        name = asked or self.trainer.args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    def _mode(self, name: str) -> Better:
        """Whether a larger value of this metric is better; losses are better if smaller."""
        best, larger = self.trainer.args.metric_for_best_model, self.trainer.args.greater_is_better
        if larger is None or (best is not None and name != self._metric_name(None)):
            larger = not name.endswith("loss")
        return "max" if larger else "min"

    def _evaluate(self, name: str) -> float:
        """A metric of the Trainer's evaluation. No callbacks are called.

        Raises:
            EvaluationError: the evaluation does not return this metric.
        """
        output = self.trainer.evaluation_loop(self.trainer.get_eval_dataloader(), description="Cut")
        metrics = output.metrics or {}
        if name not in metrics:
            raise EvaluationError(
                f"the Trainer's evaluation has no {name!r} (metric_for_best_model), only {', '.join(sorted(metrics))}: "
                "let compute_metrics return it, or see that the model returns a loss for the eval_dataset"
            )
        return as_metric(metrics[name])


def _records(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks in ``trainer_state.json``, by name."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


__all__ = ["CompressionCallback"]
