"""Snapshots of a training, and the return to them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from compressm.cutting.carry import forget_sizes
from compressm.cutting.copies import copied_state
from compressm.cutting.fitting import fit
from compressm.cutting.optimizers import Several, Together
from compressm.runtime.processes import gathered, rank
from compressm.runtime.random_state import rng_state, set_rng_state


class Stateful(Protocol):
    """An object with torch's state protocol, such as a learning rate scheduler or a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


Schedulers = Stateful | Sequence[Stateful]


@dataclass(frozen=True)
class Training:
    """The parts of a training. ``followers`` are averaged copies of the model; the others are as in `Compressor`."""

    model: nn.Module
    optimizer: Optimizer | Together
    followers: Sequence[nn.Module] = ()
    scheduler: Schedulers | None = None
    scaler: Stateful | None = None

    def snapshot(self) -> dict[str, Any]:
        """Copies of all states, and the random states of all ranks: nested dicts and lists of tensors and numbers."""
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copied_state(self.optimizer.state_dict()),
            "followers": [copy.deepcopy(follower.state_dict()) for follower in self.followers],
            "scheduler": None if self.scheduler is None else copy.deepcopy(_as_one(self.scheduler).state_dict()),
            "scaler": None if self.scaler is None else copy.deepcopy(self.scaler.state_dict()),
            "rng": gathered(rng_state()),
        }

    def restore(self, snapshot: Mapping[str, Any], rewind: bool = True) -> None:
        """Go back to a snapshot.

        Args:
            snapshot: from `snapshot`.
            rewind: also restore scheduler, learning rates, scaler and random states. Otherwise only weights, the
                optimizer's state and averages are restored.
        """
        # Copies, because the optimizer keeps the tensors that it loads, and a snapshot may be used again.
        snapshot = {
            key: copied_state(value) if key == "optimizer" else copy.deepcopy(value) for key, value in snapshot.items()
        }
        fit(self.model, snapshot["model"]).load_state_dict(snapshot["model"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(snapshot["optimizer"])
        forget_sizes(self.optimizer)
        for follower, state in zip(self.followers, snapshot["followers"], strict=True):
            fit(follower, state).load_state_dict(state)
        if not rewind:
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(values)
            return
        for part, state in ((self.scheduler, snapshot["scheduler"]), (self.scaler, snapshot["scaler"])):
            if part is not None and state is not None:
                _as_one(part).load_state_dict(state)
        states = snapshot["rng"]
        set_rng_state(states[rank() % len(states)])


def _as_one(part: Schedulers) -> Stateful:
    """A part of a training, or several in a list, as one."""
    return Several(part) if isinstance(part, Sequence) else part


__all__ = ["Schedulers", "Stateful", "Training"]
