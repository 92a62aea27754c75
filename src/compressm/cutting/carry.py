"""The optimizer's state across a change of basis.

Momentum and Adam's first moments are averages of gradients. Gradients are covectors: under ``old = W new`` the gradient
with respect to the new parameters is ``W^T`` times the old one. Second moments are averages of squared entries. The
optimizer does not store covariances between entries, so the squared magnitudes ``(W^T)^2`` carry the second moments
over as if entries were uncorrelated. What other optimizers keep follows from these two;
`compressm.cutting.optimizer_state` has the table, and `register_optimizer_state` extends it.

Two other modes exist. ``"slice"`` keeps the first r entries, as the CompreSSM paper's code does; it pairs moments with
states to which they do not belong, and is there for comparison. ``"reset"`` gives the cut parameters the state of a
newly built optimizer.

`check_optimizer` tries all this on a copy of a layer before training begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters import find_layers
from compressm.adapters.changes import LayerChange, write
from compressm.adapters.registry import tell_written
from compressm.cutting.carried import begin_anew, prepare_carry
from compressm.cutting.examination import check_optimizer, check_trained
from compressm.cutting.moves import Carry
from compressm.cutting.optimizer_state import register_optimizer_state
from compressm.cutting.optimizers import Together, forget_sizes, unwrap_optimizer
from compressm.errors import UnsupportedModelError


def carry_state(optimizer: Optimizer | Together, layer: nn.Module, change: LayerChange, mode: Carry) -> None:
    """Write a change into a layer, and carry the optimizer's state of its parameters over, in place.

    Raises:
        UnsupportedOptimizerError: a part of the state is of unknown kind. Nothing is changed then.
    """
    store = prepare_carry(optimizer, dict(layer.named_parameters()), change, mode)
    write(layer, change)
    store()


def paired_layers(follower: nn.Module, model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a copy of a model, by their names in the model.

    Raises:
        UnsupportedModelError: it has other layers than the model.
    """
    theirs, ours = find_layers(follower), find_layers(model)
    if [type(layer) for layer, _ in theirs.values()] != [type(layer) for layer, _ in ours.values()]:
        raise UnsupportedModelError(
            f"followers: {type(follower).__name__} has {len(theirs)} state space layers and the model has {len(ours)}, "
            "or of other kinds; pass averaged copies of the same model"
        )
    return {name: layer for name, (layer, _) in zip(ours, theirs.values(), strict=True)}


def follow(follower: nn.Module, model: nn.Module, changes: Mapping[str, LayerChange]) -> None:
    """Apply a cut of a model to an averaged copy of it, in place.

    A cut changes the basis of the states, so averages over values from before and after it have no meaning. Parameters
    that the cut changed are set to the model's new values, from which averaging restarts. All others keep their
    averages. An average that counts its steps (``n_averaged``) has one count for all parameters; the count restarts, so
    these averages then weigh as much as one step.

    Args:
        follower: a copy of the model, or a wrapper of one, such as `torch.optim.swa_utils.AveragedModel`.
        model: the model.
        changes: what was written into the model's layers, by their names in it.
    """
    layers = paired_layers(follower, model)
    for name, change in changes.items():
        write(layers[name], change)
    tell_written(follower)
    # With the old count, the first new value would get the weight of all steps before the cut.
    count = getattr(follower, "n_averaged", None)
    if isinstance(count, Tensor):
        count.clamp_(max=1)


__all__ = [
    "Carry",
    "Together",
    "begin_anew",
    "carry_state",
    "check_optimizer",
    "check_trained",
    "follow",
    "forget_sizes",
    "paired_layers",
    "prepare_carry",
    "register_optimizer_state",
    "unwrap_optimizer",
]
