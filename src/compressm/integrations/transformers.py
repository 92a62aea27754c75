"""Compression inside Hugging Face's Trainer."""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from compressm.cutting.fitting import fit_any_size
from compressm.cutting.metrics import Better, as_metric
from compressm.errors import (
    CheckpointError,
    EvaluationError,
    InvalidRankRuleError,
    MissingExtraError,
    UnsupportedModelError,
)
from compressm.integrations.best_model import size_at_the_end, warn_of_older_model
from compressm.saving.checkpoint import load_tree, save_tree
from compressm.training.compressor import Compressor
from compressm.training.goal import initial_dims_of, started_with
from compressm.training.history import Event
from compressm.training.twin import refuse_twin

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingExtraError('this needs transformers: pip install "compressm[transformers]"') from error

log = logging.getLogger(__name__)
_RECORD = "compressm"
# The parts of the compressor's state that are tensors. The Trainer's own state is JSON, so they are saved beside it.
_TENSORS = ("observed", "probe", "moments", "samples", "gradients", "looks", "after")


class CompressionCallback(TrainerCallback):
    """Shrinks the model's state space layers while a `transformers.Trainer` trains it.

    After ``trainer = Trainer(...)`` and before ``trainer.train()`` add

        trainer.add_callback(CompressionCallback(trainer, tolerance=0.02))

    Optimizer, scheduler, accumulation, clipping, mixed precision and DistributedDataParallel keep working after a cut.
    Training resumes from checkpoints of every size, and reloads them (``load_best_model_at_end``). The Trainer logs
    each cut. Tensors of the compressor's state are in the checkpoint's folder, and are read from the folder that is
    resumed from. If the model that ``load_best_model_at_end`` reloads is from before the last cut, a warning says so.

    With ``max_drop`` and no ``evaluate`` the metric is the Trainer's own: ``metric_for_best_model`` on the
    ``eval_dataset``, the loss by default. Whether a larger one is better follows ``greater_is_better``. ``evaluate``
    may also be the name of another metric of the Trainer's evaluation; a smaller one is better if its name ends with
    ``loss`` or if ``mode="min"`` says so. A roll-back restores the weights. It does not reset the Trainer's count of
    steps, since the data of these steps have been read; see ``rewind`` in `Compressor`.

    With ``gramians="loss"`` accumulated batches and the gradient scaler are known, and the loss of a ``ForCausalLM``
    is taken for a mean over tokens unless ``loss_terms`` says otherwise.

    Args:
        trainer: the Trainer that the callback is added to.
        **arguments: arguments of `Compressor`, for example ``tolerance=0.02``.

    Attributes:
        compressor: the `Compressor`, once training has begun.

    Raises:
        UnsupportedModelError: the model has no layer that compressm knows, or is sharded.
        InvalidRankRuleError: ``control="twin"``; and when training begins, for arguments that `Compressor` refuses.
    """

    def __init__(self, trainer: Trainer, **arguments: Any) -> None:
        self.trainer = trainer
        self.compressor: Compressor | None = None
        self._arguments = arguments
        self._call = _Call(trainer)
        self._interrupted: Compressor | None = None  # whose training has begun and not ended
        refuse_twin(arguments, "the Trainer")
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
        if arguments.get("gramians") == "loss":  # the Trainer divides the loss by the number of accumulated batches
            arguments.setdefault("loss_scale", 1 / args.gradient_accumulation_steps)
            arguments.setdefault("scaler", self.trainer.accelerator.scaler)  # of half precision; None without it
            if "ForCausalLM" in type(self._model).__name__:  # also peft's; their loss is the mean over tokens
                arguments.setdefault("loss_terms", "tokens")
        record = _records(state).get(_RECORD)
        with started_with(self._initial_dims(record)):
            self.compressor = Compressor(self._model, self.trainer.optimizer, state.max_steps, **arguments)
        if record is not None:
            self._resume(record, self._call.resumed_from or self._checkpoint(state))
        self._interrupted = self.compressor

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.compressor is not None
        seen = len(self.compressor.history)
        self.compressor.step()
        due = control.should_log
        for event in self.compressor.history[seen:]:
            self._log(event)
        control.should_log = due  # `Trainer.log` takes the Trainer's own entry of this step for written
        # A checkpoint of this step holds this record; on_save adds its tensors.
        record = self.compressor.state_dict()
        _records(state)[_RECORD] = {key: value for key, value in record.items() if key not in _TENSORS}
        _records(state)[_RECORD]["beside"] = [key for key in _TENSORS if record.get(key)]
        _records(state)[_RECORD]["mark"] = secrets.token_hex(8)  # the tensors beside it bear the same

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.compressor is not None:
            record = self.compressor.state_dict()
            tensors = {key: record[key] for key in _TENSORS if record.get(key)}
            if tensors and (folder := self._checkpoint(state)).is_dir():
                save_tree(folder / _RECORD, {**tensors, "mark": _records(state).get(_RECORD, {}).get("mark")})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._interrupted = None
        warn_of_older_model(
            self._model,
            size_at_the_end(self.compressor),
            f"the best model ({state.best_model_checkpoint}, reloaded by load_best_model_at_end)",
            "to keep a model of the final size, let evaluations begin after the last cut (eval_delay), or pass "
            "load_best_model_at_end=False",
        )

    @property
    def _model(self) -> nn.Module:
        return cast("nn.Module", self.trainer.model)

    def _initial_dims(self, record: dict[str, Any] | None) -> dict[str, int] | None:
        """State dimensions before the first cut, if the model has been cut before this training begins or goes on.

        ``auto_find_batch_size`` begins again with the model that the first attempt left behind.
        """
        if record is not None:
            return initial_dims_of(record)
        before = self._interrupted
        return None if before is None or before.model is not self._model else before.initial_dims

    def _resume(self, record: dict[str, Any], checkpoint: Path) -> None:
        assert self.compressor is not None
        nothing: dict[str, Any] = {
            "observed": None, "probe": {}, "moments": {}, "samples": {}, "looks": [], "after": [],
        }  # fmt: skip
        folder, record = checkpoint / _RECORD, {**nothing, **record}
        if not record["beside"]:
            pass
        elif not folder.is_dir():
            lost = "the last cut can no longer be undone, and is kept" if "observed" in record["beside"] else ""
            log.warning("%s is not there: %s", folder, lost or "layers are observed anew")
        else:
            record.update(_tensors_of(folder, record.get("mark")))
        self.compressor.load_state_dict(record)

    def _checkpoint(self, state: TrainerState) -> Path:
        """The folder of a checkpoint of this step; in a hyperparameter search every trial has a folder of its own."""
        return Path(self.trainer._get_output_dir(self._call.trial)) / f"checkpoint-{state.global_step}"  # pyright: ignore[reportPrivateUsage]

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


class _Call:
    """The arguments of the present ``trainer.train(...)``, which callbacks are not told, and models that it builds.

    Attributes:
        resumed_from: the checkpoint that training was resumed from; None for none.
        trial: the trial of a hyperparameter search.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.resumed_from: Path | None = None
        self.trial: Any = None
        self._trainer, self._train = trainer, trainer.train
        self._build: Callable[[Any], Any] = trainer.call_model_init
        trainer.train = self.train
        trainer.call_model_init = self.build

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """``trainer.train``."""
        given = inspect.signature(self._train).bind(*args, **kwargs).arguments
        folder = given.get("resume_from_checkpoint")
        if folder is True:
            folder = get_last_checkpoint(str(self._trainer.args.output_dir))
        self.resumed_from, self.trial = Path(folder) if folder else None, given.get("trial")
        return self._train(*args, **kwargs)

    def build(self, trial: Any = None) -> Any:
        """``trainer.call_model_init``: the model may have to load a checkpoint of another size."""
        return fit_any_size(self._build(trial))


def _tensors_of(folder: Path, mark: str | None) -> dict[str, Any]:
    """The tensors that were saved with a ``trainer_state.json``. Earlier versions wrote no mark.

    Raises:
        CheckpointError: they belong to another step or run.
    """
    tensors: dict[str, Any] = load_tree(folder)
    found = tensors.pop("mark", None)
    if mark is not None and found != mark:
        raise CheckpointError(
            f"{folder} was not saved with the trainer_state.json that training is resumed from: files of two "
            "checkpoints are mixed; resume from another one"
        )
    return tensors


__all__ = ["CompressionCallback"]
