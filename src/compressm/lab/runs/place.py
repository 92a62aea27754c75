"""Where a run computes: its processes and their device, and their random states at the start."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from compressm.errors import ConfigError
from compressm.lab.config import RunConfig


def accelerator(run: RunConfig) -> Accelerator:
    """Accelerate on the device that the configuration asks for.

    Raises:
        ConfigError: no such device, or a batch that the processes cannot share.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device = 'cuda': torch sees no CUDA device here; use run.device=auto or cpu")
    made = Accelerator(cpu=run.device == "cpu" or not torch.cuda.is_available())
    if run.batch_size % made.num_processes:
        raise ConfigError(
            f"run.batch_size = {run.batch_size}: {made.num_processes} processes cannot share it evenly; choose a "
            "multiple"
        )
    return made


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def memory_told(batch_size: int, step: Callable[[], int]) -> Generator[None]:
    """Turn an error for want of memory into one that says what to do.

    Args:
        batch_size: of the run.
        step: returns the step that the run has come to.

    Raises:
        ConfigError: in place of that error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not should_reduce_batch_size(cast("Exception", error)) and not isinstance(error, MemoryError):
            raise
        raise ConfigError(
            f"run.batch_size = {batch_size}: out of memory at step {step()}; lower it, or free memory and go on with "
            "--resume"
        ) from error


__all__ = ["accelerator", "device_name", "memory_told"]
