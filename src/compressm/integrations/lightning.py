"""Compression inside Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressm.cutting.fitting import fit_any_size
from compressm.errors import MissingExtraError, UnsupportedModelError
from compressm.training.compressor import Compressor
from compressm.training.history import Event

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise MissingExtraError('this needs Lightning 2.6 or later: pip install "compressm[lightning]"') from error


class CompressionCallback(Callback):
    """Shrinks the state space layers of a `LightningModule` while Lightning's Trainer trains it.

        trainer = Trainer(..., callbacks=[CompressionCallback(tolerance=0.02)])

    Optimizer, scheduler, accumulation, clipping, mixed precision, DDP and `WeightAveraging` callbacks keep working
    after a cut. Training resumes from checkpoints of every size (``fit(ckpt_path=...)``), and they can be reloaded
    (``test(ckpt_path="best")``). The order of the Trainer's callbacks does not matter. The Trainer's loggers log each
    cut. A roll-back restores the weights. It does not reset Lightning's count of steps, since the data of these steps
    have been read; see ``rewind`` in `Compressor`.

    Args:
        **arguments: arguments of `Compressor`, for example ``tolerance=0.02``. By default ``total_steps`` is the
            Trainer's estimate of its number of steps.

    Attributes:
        compressor: the `Compressor`, once training has begun.

    Raises:
        UnsupportedModelError: the model has no layer that compressm knows, is sharded, or has several optimizers.
        InvalidRankRuleError: when training begins, for arguments that `Compressor` refuses.
    """

    def __init__(self, **arguments: Any) -> None:
        self.compressor: Compressor | None = None
        self._arguments = arguments
        self._loaded: dict[str, Any] | None = None
        self._global_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the model load weights of any size. Lightning calls this before it loads a checkpoint."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UnsupportedModelError(
                f"{type(trainer.strategy).__name__} shards the model, and shards cannot be resized in place: use one "
                "device or strategy='ddp', or compress between trainings with "
                "compressm.integrations.sharding.compress_sharded"
            )
        fit_any_size(pl_module)
        for average in _averages(trainer):
            fit_any_size(average)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise UnsupportedModelError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers, and CompressionCallback works "
                "with one: put all parameters of the state space layers into one of them, and call a "
                "compressm.Compressor with that one after its step"
            )
        arguments: dict[str, Any] = {
            "total_steps": int(trainer.estimated_stepping_batches),
            "rewind": False,
            "followers": _averages(trainer),
            **self._arguments,
        }
        if arguments.get("gramians") == "loss":  # Lightning divides the loss by the number of accumulated batches
            arguments.setdefault("loss_scale", 1 / trainer.accumulate_grad_batches)
        self.compressor = Compressor(pl_module, trainer.optimizers[0], **arguments)
        self._global_step = trainer.global_step
        if self._loaded is not None:
            self.compressor.load_state_dict(self._loaded)
            self._loaded = None

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

    def state_dict(self) -> dict[str, Any]:
        return {} if self.compressor is None else self.compressor.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = dict(state_dict) or None


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
