"""What is observed of a model's layers while it trains: their states on the data, and the gradients of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from compressm.errors import InvalidRankRuleError
from compressm.observing.loss_evidence import Gramians, LossEvidence
from compressm.observing.moments import Sample, Statistics
from compressm.observing.observer import Observer, Scale, Terms
from compressm.theory.rank_rule import RankRule

# Sequences of each batch whose gradients are observed, and how many of the last ones are kept for predictions.
_SEQUENCES, _KEPT = 4, 200
_MEMORY = 0.98  # factor on all earlier gradients at every observation: about the last 50 count


class Observations:
    """Statistics of the selective layers, and an observer of the loss's gradients if these balance the layers.

    Args:
        model: the model that is trained.
        rule: the rule that cuts will follow.
        gramians, loss_terms: as in `Compressor`.

    Attributes:
        statistics: of the selective layers.
        observer: of the gradients; None under white noise.

    Raises:
        InvalidRankRuleError: ``max_loss`` for a model with layers whose effect on the loss cannot be observed.
    """

    def __init__(
        self, model: nn.Module, rule: RankRule, gramians: Gramians = "white", loss_terms: Terms = "sequences"
    ) -> None:
        self.statistics = Statistics(model)
        self.observer = (
            None if gramians == "white" else Observer(model, loss_terms, _SEQUENCES, memory=_MEMORY, keep=_KEPT)
        )
        if self.observer is not None and rule.max_loss is not None and self.observer.unsupported:
            raise InvalidRankRuleError(
                f"max_loss={rule.max_loss:g} needs the effect of every layer on the loss, and that of "
                f"{self.observer.unsupported[0]!r} cannot be observed: choose another rule"
            )

    @property
    def unseen(self) -> bool:
        """Whether a layer that needs data has not been observed since the last cut."""
        return bool(self.statistics.unseen)

    @property
    def empty(self) -> bool:
        """Whether nothing has been observed since the last cut."""
        kinds = (self.statistics,) if self.observer is None else (self.statistics, self.observer)
        return all(len(one.unseen) == len(one.layers) for one in kinds)

    def problems(self) -> list[str]:
        """Why layers could not be observed yet, one sentence each."""
        problems = [] if self.statistics.dropped else self.statistics.problems()
        if self.observer is not None and not self.observer.dropped:
            problems += [
                f"no gradient has passed through {name!r}, and gramians='loss' needs it at the first cut: see that the "
                "loss depends on this layer, and that the model is called as a whole and in training mode"
                for name in self.observer.unseen
            ]
        return problems

    def observe(self, states: bool, gradients: bool, step: int, loss_scale: Scale = 1.0) -> bool:
        """Switch observation on for the coming step, or off.

        Args:
            states: whether to observe the states of selective layers.
            gradients: whether to observe the gradients of the loss.
            step: the number of that step, for messages.
            loss_scale: the factor by which the loss will be multiplied before ``backward``, see `Observer`.

        Returns:
            whether anything will be observed, which takes time.
        """
        if states:
            self.statistics.observe_next(when=f"step {step}")
        else:
            self.statistics.close()
        if self.observer is not None:
            if gradients:
                self.observer.observe_next(loss_scale)
            else:
                self.observer.close()
        return (states and bool(self.statistics.layers)) or (gradients and self.observer is not None)

    def loss(self) -> LossEvidence | None:
        """The evidence from the gradients of the loss, over all processes; None under white noise.

        Raises:
            UnsupportedModelError: no gradient has passed through a layer.
        """
        return None if self.observer is None else LossEvidence.of(self.observer)

    def close(self) -> None:
        """Stop waiting for the coming step."""
        self.statistics.close()
        if self.observer is not None:
            self.observer.close()

    def reset(self) -> None:
        """Forget everything, after a cut."""
        self.statistics.reset()
        if self.observer is not None:
            self.observer.reset()

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs."""
        samples = {name: [one.hidden, one.present] for name, one in self.statistics.samples.items()}
        gradients = {} if self.observer is None else {"gradients": self.observer.state_dict()}
        return {"moments": self.statistics.state_dict(), "samples": samples, **gradients}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        if "moments" not in state_dict:  # as the first versions stored it with a cut under observation
            state_dict = {"moments": state_dict}
        self.statistics.load_state_dict(state_dict["moments"])
        self.statistics.samples = {name: Sample(*one) for name, one in state_dict.get("samples", {}).items()}
        if self.observer is not None and "gradients" in state_dict:
            self.observer.load_state_dict(state_dict["gradients"])


__all__ = ["Observations"]
