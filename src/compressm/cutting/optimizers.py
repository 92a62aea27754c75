"""The optimizers of one training: one, a wrapper of one, or several that share the model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from compressm.errors import UnsupportedOptimizerError

# Optimizers that hold a part of each parameter or of its state. A process never has the whole of it.
_SHARDED = ("ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")


class Several:
    """Several parts of a training that make their steps together, such as schedulers, used as one.

    Args:
        members: each keeps its own settings and state.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members: tuple[Any, ...] = tuple(members)

    def step(self) -> None:
        """One step of each member, in order."""
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of each member."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)


class Together(Several):
    """Several optimizers of one model, such as Muon for the matrices and AdamW for all other parameters."""

    members: tuple[Optimizer, ...]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members, in order."""
        return [group for member in self.members for group in member.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for member in self.members:
            member.zero_grad()


def unwrap_optimizer(optimizer: Any) -> Optimizer | Together:
    """The torch optimizer inside wrappers such as Accelerate's; of a list or tuple, all of them as one.

    Raises:
        UnsupportedOptimizerError: not a torch optimizer, or one that shards its state.
    """
    if isinstance(optimizer, Together):
        return optimizer
    if isinstance(optimizer, (list, tuple)):
        members: list[Optimizer] = [_unwrapped(one) for one in optimizer]
        if not members:
            raise UnsupportedOptimizerError("optimizer is an empty list; pass the optimizers that train the model")
        return members[0] if len(members) == 1 else Together(members)
    return _unwrapped(optimizer)


def _unwrapped(optimizer: Any) -> Optimizer:
    inner = optimizer
    while True:
        refuse_sharded(inner)
        if isinstance(inner, Optimizer) and type(inner).__name__ != "AcceleratedOptimizer":
            return inner
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise UnsupportedOptimizerError(
                "optimizer must be a torch.optim.Optimizer, a wrapper with one in .optimizer, or a list of these; "
                f"got {type(optimizer).__name__}"
            )


def refuse_sharded(optimizer: Any) -> None:
    """Refuse ZeRO.

    Raises:
        UnsupportedOptimizerError: the optimizer holds a shard of its state.
    """
    name = type(optimizer).__name__
    if name in _SHARDED:
        raise UnsupportedOptimizerError(
            f"{name} (ZeRO) holds a shard of its state in every process, and a cut needs all of it: use the plain "
            "optimizer with DDP, or FSDP2 with compressm.integrations.sharding.compress_sharded"
        )


def members_of(optimizer: Optimizer | Together) -> tuple[Optimizer, ...]:
    """The optimizers themselves."""
    return optimizer.members if isinstance(optimizer, Together) else (optimizer,)


def forget_sizes(optimizer: Optimizer | Together) -> None:
    """Let L-BFGS count its parameters' entries again, which it does only once by itself."""
    for member in members_of(optimizer):
        if isinstance(member, torch.optim.LBFGS):
            member._numel_cache = None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


__all__ = ["Several", "Together", "forget_sizes", "members_of", "refuse_sharded", "unwrap_optimizer"]
