"""The rise of the loss that cuts of a model will cause, predicted in nats; see `compressm.observing.damage`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compressm.adapters import LayerAdapter
from compressm.cutting.made_cuts import MadeCuts
from compressm.observing.damage import changes_of, damage_curve, divergence
from compressm.observing.loss_evidence import LossEvidence
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Reduction
from compressm.theory.rank_rule import RankRule
from compressm.theory.recurrence import SelectiveReduction

Layers = Mapping[str, tuple[nn.Module, LayerAdapter]]


def damage_curves(
    layers: Layers, balancings: Mapping[str, Balanced], cuts: MadeCuts, loss: LossEvidence
) -> dict[str, Tensor]:
    """The predicted rise of the loss if a layer keeps 0, 1, ..., n states, by layer name.

    Args:
        layers: of the model.
        balancings: of these layers.
        cuts: of these balancings.
        loss: the evidence. Layers without samples are left out.

    Returns:
        nats per prediction, shape ``(n + 1,)`` each.
    """
    curves: dict[str, Tensor] = {}
    for name, (layer, _) in layers.items():
        if not loss.samples.get(name):
            continue

        def reduced(states: int, name: str = name) -> Reduction | SelectiveReduction | None:
            proposal = cuts.proposal(name, states, RankRule(states=states))
            return None if proposal is None else proposal.reduction

        curve = damage_curve(layer, balancings[name], loss.samples[name], reduced)
        curves[name] = curve / loss.predictions
    return curves


def predicted_rises(
    layers: Layers, reductions: Mapping[str, Reduction | SelectiveReduction], loss: LossEvidence
) -> tuple[float | None, dict[str, float]]:
    """The predicted rise of the loss of all cuts together, and of each one alone, in nats per prediction.

    The first is None if a layer that is cut has no samples.
    """
    changes = {
        name: changes_of(layers[name][0], layers[name][1].system(layers[name][0]), reduction, loss.samples[name])
        for name, reduction in reductions.items()
        if loss.samples.get(name)
    }
    alone = {name: divergence([change]) / loss.predictions for name, change in changes.items()}
    if len(changes) < len(reductions):
        return None, alone
    return (divergence(changes.values()) / loss.predictions if changes else 0.0), alone


__all__ = ["damage_curves", "predicted_rises"]
