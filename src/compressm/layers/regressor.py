"""The model for numbers: of a whole sequence, or of every step of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compressm.layers.models import SequenceClassifier
from compressm.layers.padding import blank


class SequenceRegressor(SequenceClassifier):
    """The encoder, blocks and decoder of `SequenceClassifier`, whose outputs are numbers instead of logits.

    Args:
        d_input: channels of the input sequence.
        d_output: channels of the output.
        d_model: width H.
        d_state: state dimension n of every block, or one number per block.
        per_step: whether there is an output for every step, without a mean over time, as in forecasts and system
            identification. The output at a step depends on the inputs up to that step, unless the layer reads in both
            directions.
        options: further arguments of `SequenceClassifier`, and of the layer.

    Shape:
        input ``(batch, length, d_input)``; output ``(batch, d_output)``, or ``(batch, length, d_output)`` per step.
    """

    def __init__(
        self, d_input: int, d_output: int, d_model: int, d_state: Any, *, per_step: bool = False, **options: Any
    ) -> None:
        super().__init__(d_input, d_output, d_model, d_state, **options)
        self.d_output, self.per_step = d_output, per_step

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this model as it is now, with its present state dimensions."""
        arguments = super().config
        return {"d_output": arguments.pop("n_classes"), "per_step": self.per_step, **arguments}

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Numbers; see the class.

        Args:
            u: sequences. Shorter ones are padded at their end.
            lengths: length of each sequence, as for `SequenceClassifier.forward`. Outputs per step at padding are
                meaningless.
        """
        if not self.per_step:
            return super().forward(u, lengths)
        z, _ = self._through_blocks(u, lengths)
        return self.decoder(self.norm(z))

    def step(self, u: Tensor, state: dict[str, Any], present: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """One time step, in evaluation mode: as `SequenceClassifier.step`, or to the output of this step."""
        if not self.per_step:
            return super().step(u, state, present)
        if present is not None:
            u = blank(u, present)
        z, blocks = self._step_through_blocks(u, state["blocks"])
        return self.decoder(self.norm(z)), {**state, "blocks": blocks}

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The state of `step` before the first input: the blocks' states, and without ``per_step`` what is averaged."""
        state = super().initial_state(batch)
        return {"blocks": state["blocks"]} if self.per_step else state


__all__ = ["SequenceRegressor"]
