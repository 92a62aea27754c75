"""A metric of Lightning's validation by its name, computed whenever a cut has to be judged."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from compressm.errors import EvaluationError, InvalidRankRuleError


def named_metric(trainer: Trainer, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments ``evaluate`` and ``mode`` of `Compressor` for a metric that ``validation_step`` logs.

    Args:
        trainer: about to train.
        name: as it is logged, for example ``"val_loss"``. A smaller value is better if it ends with ``loss``, unless
            ``mode`` is given.
        arguments: of the callback.

    Raises:
        InvalidRankRuleError: the Trainer has no validation data, or several sets of them.
    """
    loaders: Any = trainer.val_dataloaders
    if loaders is None or isinstance(loaders, list | tuple | dict):
        found = (
            "no validation data in its first epoch" if loaders is None else f"{len(loaders)} sets of validation data"
        )
        raise InvalidRankRuleError(
            f"evaluate={name!r} is a metric of the validation, and the Trainer has {found}: give fit one DataLoader, "
            "or CompressionCallback a function of the module"
        )
    mode = arguments.get("mode", "min" if name.endswith("loss") else "max")
    return {"evaluate": lambda module: validated(trainer, module, name), "mode": mode}


@torch.no_grad()
def validated(trainer: Trainer, module: LightningModule, name: str) -> float:
    """The mean over the validation data of what ``validation_step`` logs as ``name``. No callbacks are called, and
    nothing reaches the Trainer's loggers.

    Raises:
        EvaluationError: nothing of this name is logged.
    """
    module.eval()
    seen = _Logged()
    loader: Any = trainer.val_dataloaders
    count = trainer.num_val_batches[0]
    with _logging_to(module, seen):
        module.on_validation_epoch_start()
        for index, batch in enumerate(islice(loader, None if count == float("inf") else int(count))):
            placed = trainer.strategy.batch_to_device(batch)
            seen.size = _size(placed)
            with trainer.strategy.precision_plugin.val_step_context():
                module.validation_step(placed, index)
        seen.size = 1
        module.on_validation_epoch_end()
    if name not in seen.sums:
        known = ", ".join(sorted(seen.sums)) or "nothing"
        raise EvaluationError(f"validation_step logs no {name!r}, it logs {known}: log it, or choose one of these")
    total: Any = trainer.strategy.reduce(seen.total(name, module.device), reduce_op="sum")
    return float(total[0] / total[1])


class _Logged:
    """What a module logs: sums over the examples, and their numbers; or torchmetrics' objects, which know their own.

    Attributes:
        sums: by name.
        size: examples of the batch at hand.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.size = 1

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """In place of `LightningModule.log`."""
        if hasattr(value, "compute"):
            self.sums[name] = value
            return
        count = batch_size or self.size
        total, examples = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(value) * count, examples + count)

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """In place of `LightningModule.log_dict`."""
        for name, value in dictionary.items():
            self.log(name, value, batch_size=batch_size)

    def total(self, name: str, device: torch.device) -> torch.Tensor:
        """Sum and number of examples, shape ``(2,)``."""
        found = self.sums[name]
        if isinstance(found, tuple):
            return torch.tensor(found, dtype=torch.float32, device=device)
        value = float(found.compute())
        found.reset()
        return torch.tensor([value, 1.0], device=device)


@contextmanager
def _logging_to(module: LightningModule, seen: _Logged) -> Generator[None]:
    """Let a module log there."""
    before = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    vars(module).update(log=seen.log, log_dict=seen.log_dict)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]
        vars(module).update(before)


def _size(batch: Any) -> int:
    """Examples in a batch; 1 if they cannot be counted."""
    try:
        return int(extract_batch_size(batch))
    except MisconfigurationException:
        return 1


__all__ = ["named_metric", "validated"]
