"""Compression inside Lightning."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from compressm.cutting.choosing import choose
from compressm.cutting.fitting import fit_any_size
from compressm.cutting.sizes import resized_parameters
from compressm.errors import InvalidRankRuleError, MissingExtraError, UnsupportedModelError
from compressm.integrations.best_model import size_at_the_end, warn_of_older_model
from compressm.training.compressor import Compressor
from compressm.training.goal import initial_dims_of, started_with
from compressm.training.history import Event
from compressm.training.twin import refuse_twin

try:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    from compressm.integrations.lightning_metric import named_metric
except ImportError as error:
    raise MissingExtraError('this needs Lightning 2.6 or later: pip install "compressm[lightning]"') from error

log = logging.getLogger(__name__)
_LONG = 1_000_000  # steps of a training that fast_dev_run tries out


class CompressionCallback(Callback):
    """Shrinks the state space layers of a `LightningModule` while Lightning's Trainer trains it.

        trainer = Trainer(..., callbacks=[CompressionCallback(tolerance=0.02)])

    Optimizer, scheduler, accumulation, clipping, mixed precision, DDP and `WeightAveraging` callbacks keep working
    after a cut. Training resumes from checkpoints of every size (``fit(ckpt_path=...)``), and they can be reloaded
    (``test(ckpt_path="best")``). The order of the Trainer's callbacks does not matter. The Trainer's loggers log each
    cut. A roll-back restores the weights. It does not reset Lightning's count of steps, since the data of these steps
    have been read; see ``rewind`` in `Compressor`.

    ``evaluate`` may also be the name of a metric that ``validation_step`` logs, such as ``"val_loss"``; its mean over
    the validation data is computed whenever a cut is judged. A smaller one is better if the name ends with ``loss`` or
    if ``mode="min"`` says so.

    Of several optimizers, the one that trains the state space layers is used. With ``fast_dev_run`` the layers are
    observed, and no cut is made. If a model that is tested or validated afterwards is from before the last cut, as
    ``ckpt_path="best"`` may be, a warning says so.

    Args:
        **arguments: arguments of `Compressor`, for example ``tolerance=0.02``. By default ``total_steps`` is the
            Trainer's estimate of its number of steps. Give it where the Trainer has none: with ``max_epochs=-1`` and
            no ``max_steps``, with an `IterableDataset` without a length, and with manual optimisation.

    Attributes:
        compressor: the `Compressor`, once training has begun.

    Raises:
        UnsupportedModelError: the model has no layer that compressm knows, is sharded, or several optimizers train its
            state space layers.
        InvalidRankRuleError: ``control="twin"``; when training begins, for arguments that `Compressor` refuses, and
            without ``total_steps`` where the Trainer has no estimate.
    """

    def __init__(self, **arguments: Any) -> None:
        refuse_twin(arguments, "Lightning")
        self.compressor: Compressor | None = None
        self._arguments = arguments
        self._loaded: dict[str, Any] | None = None
        self._interrupted: Compressor | None = None  # whose training has begun and not ended
        self._global_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the model load weights of any size. Lightning calls this before it loads a checkpoint."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UnsupportedModelError(
                f"{type(trainer.strategy).__name__} shards the model, and shards cannot be resized in place: use one "
                "device or strategy='ddp', or compress between trainings with "
                "compressm.integrations.sharding.compress_sharded"
            )
        if stage == "fit" and not pl_module.automatic_optimization and "total_steps" not in self._arguments:
            raise InvalidRankRuleError(
                f"{type(pl_module).__name__} optimises manually, so the Trainer does not know how many steps its "
                "optimizer makes: give CompressionCallback total_steps="
            )
        fit_any_size(pl_module)
        for average in _averages(trainer):
            fit_any_size(average)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        arguments: dict[str, Any] = {"rewind": False, "followers": _averages(trainer), **self._arguments}
        if "total_steps" not in arguments:
            arguments["total_steps"] = _total_steps(trainer)
        if arguments.get("gramians") == "loss":  # Lightning divides the loss by the number of accumulated batches
            arguments.setdefault("loss_scale", 1 / trainer.accumulate_grad_batches)
            arguments.setdefault("scaler", getattr(trainer.precision_plugin, "scaler", None))  # of half precision
        if isinstance(name := arguments.get("evaluate"), str):
            arguments |= named_metric(trainer, name, arguments)
        record = self._loaded or self._of_an_earlier_fit(trainer, pl_module)
        before = self._interrupted
        started = None if before is None or before.model is not pl_module else before.initial_dims
        with started_with(started if record is None else initial_dims_of(record)):
            self.compressor = Compressor(pl_module, _optimizer(trainer, pl_module, arguments), **arguments)
        if record is not None:
            self.compressor.load_state_dict(record)
        self._global_step, self._loaded, self._interrupted = trainer.global_step, None, self.compressor

    def _of_an_earlier_fit(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        """The state of the compressor, if a second ``fit`` goes on with the steps of the first one."""
        goes_on = self.compressor is not None and self.compressor.model is pl_module
        if not goes_on or not trainer.global_step or trainer.global_step != self._global_step:
            return None
        assert self.compressor is not None
        return self.compressor.state_dict()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.compressor is not None
        if trainer.global_step == self._global_step:
            return  # gradients are being accumulated
        self._global_step = trainer.global_step
        seen = len(self.compressor.history)
        self.compressor.step()
        for event in self.compressor.history[seen:]:
            _log(trainer, event)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interrupted = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the model that was loaded for this is from before a cut."""
        self._warn_of_older_model(trainer, pl_module)

    on_predict_start = on_test_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before a test, outside of training."""
        if self._interrupted is None:
            self._warn_of_older_model(trainer, pl_module)

    def _warn_of_older_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_older_model(
            pl_module,
            size_at_the_end(self.compressor),
            f"the model that was loaded ({trainer.ckpt_path or 'from somewhere else'})",
            "to use one of the final size, pass ckpt_path='last', or let ModelCheckpoint compare models only after the "
            "last cut",
        )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.compressor is None else self.compressor.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = dict(state_dict) or None


def _total_steps(trainer: Trainer) -> int:
    """The Trainer's estimate of its optimizer steps.

    Raises:
        InvalidRankRuleError: it has none.
    """
    if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        log.info("fast_dev_run: layers are observed, and no cut is made")
        return _LONG
    try:
        estimate = trainer.estimated_stepping_batches
    except MisconfigurationException as error:
        raise InvalidRankRuleError(f"{error}: give CompressionCallback total_steps=") from error
    if not 0 < estimate < math.inf:
        raise InvalidRankRuleError(
            f"the Trainer's estimate of its steps is {estimate} (no max_steps, and max_epochs=-1 or data without a "
            "length): give CompressionCallback total_steps=, or the Trainer max_steps="
        )
    return int(estimate)


def _optimizer(trainer: Trainer, pl_module: LightningModule, arguments: Mapping[str, Any]) -> Optimizer:
    """The optimizer that trains the parameters whose shapes cuts change, of the layers that the arguments choose.

    Raises:
        UnsupportedModelError: several do.
    """
    with choose(pl_module, arguments.get("layers"), arguments.get("exclude")).scope():
        changed = {id(parameter) for parameter in resized_parameters(pl_module)}
    training = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(parameter) in changed for group in optimizer.param_groups for parameter in group["params"])
    ]
    if len(training) > 1:
        raise UnsupportedModelError(
            f"{len(training)} of {type(pl_module).__name__}'s {len(trainer.optimizers)} optimizers train parameters of "
            "its state space layers, and a cut carries the state of one: put all these parameters into one optimizer"
        )
    if not trainer.optimizers:
        raise UnsupportedModelError(
            f"{type(pl_module).__name__} has no optimizer: return one from configure_optimizers, or compress the model "
            "with compressm.compress"
        )
    return (training or trainer.optimizers)[0]


def _averages(trainer: Trainer) -> list[Any]:
    """The averaged models that WeightAveraging callbacks keep."""
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    found = (vars(callback).get("_average_model") for callback in callbacks if isinstance(callback, WeightAveraging))
    return [average for average in found if average is not None]


def _log(trainer: Trainer, event: Event) -> None:
    if metrics := event.metrics():
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


__all__ = ["CompressionCallback"]
