"""The section of the serving report about states in 8 bits, behind ``--state-bits 8``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressm.cutting.rounded_state import RoundedState, round_states
from compressm.cutting.serving import human
from compressm.errors import ConfigError
from compressm.observing.inputs import calls
from compressm.observing.loss_evidence import mask_of

TOKENS = 256  # of each sequence, which the model reads one by one


@dataclass(frozen=True)
class StateBits:
    """States in few bits, of one model or before and after a cut.

    Attributes:
        models: measurements by format, by what the model is: ``"uncut"``, ``"cut"``.
        tokens: how many were read by each.
    """

    models: Mapping[str, tuple[RoundedState, ...]]
    tokens: int

    def lines(self) -> list[str]:
        """A line per model and format."""
        lines = [f"  states rounded after every token, simulated on {self.tokens:,} tokens:"]
        for model, formats in self.models.items():
            lines += [
                f"    {model:5}  {one.format:8}  {human(one.bytes):>8} per sequence, perplexity {one.perplexity:.3f}, "
                f"{one.divergence:.2g} nats from exact states"
                for one in formats
            ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        models = {model: [one.to_dict() for one in formats] for model, formats in self.models.items()}
        return {"tokens": self.tokens, "models": models}

    def plus(self, name: str, model: nn.Module, batch: Mapping[str, Tensor]) -> StateBits:
        """With the measurements of another model.

        Args:
            name: what it is.
            model: in evaluation mode.
            batch: inputs; of each sequence the first `TOKENS` tokens count.
        """
        short = {
            key: value[:, :TOKENS] if value.ndim > 1 else value.clamp_max(TOKENS)  # of one axis are the lengths
            for key, value in batch.items()
        }
        (call,) = calls(model, [short])
        present = mask_of(model, call)
        count = next(iter(short.values())).numel() if present is None else int(present.sum())
        return StateBits({**self.models, name: round_states(model, [short], quiet=False)}, count)


def asked(bits: int | None, data: object) -> StateBits | None:
    """What ``--state-bits`` asks for, still empty; None if it is not given.

    Raises:
        ConfigError: another number than 8, or no data.
    """
    if bits is None:
        return None
    if bits != 8:
        raise ConfigError(f"--state-bits {bits}: only 8 is simulated, as int8 and as e4m3; give 8")
    if data is None:
        raise ConfigError("--state-bits measures predictions with rounded states: give text by --data")
    return StateBits({}, 0)


__all__ = ["TOKENS", "StateBits", "asked"]
