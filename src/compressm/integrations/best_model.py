"""A warning about a best model that is older than the last cut. Hosts reload it at the end of a training."""

from __future__ import annotations

from torch import nn

from compressm.cutting import state_dims
from compressm.runtime.warned import warn
from compressm.training.compressor import Compressor


class OlderModelWarning(UserWarning):
    """The model that a host has reloaded is from before a cut, so it has more states than training ended with."""


def warn_of_older_model(model: nn.Module, ended_with: dict[str, int], what: str, remedy: str) -> None:
    """Warn if a reloaded model has other state dimensions than the training ended with.

    Args:
        model: the model as it is now.
        ended_with: state dimension of every layer at the end of the training.
        what: the reloaded model, in words.
        remedy: what to do to get a model of the final size.
    """
    now = state_dims(model)
    differing = {name: (now[name], states) for name, states in ended_with.items() if now.get(name, states) != states}
    if differing:
        name, (states, final) = next(iter(differing.items()))
        warn(
            f"{what} is not of the size that training ended with: {name!r} has {states} states in it, and {final} "
            f"after the last cut; {remedy}",
            OlderModelWarning,
        )


def size_at_the_end(compressor: Compressor | None) -> dict[str, int]:
    """State dimension of every layer after a compressor's last event; {} without one."""
    return {} if compressor is None else dict(compressor.clock.phases[-1].state_dims)


__all__ = ["OlderModelWarning", "size_at_the_end", "warn_of_older_model"]
