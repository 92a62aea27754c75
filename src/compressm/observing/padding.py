"""Padding among the tokens that a model reads, as known to the batch, the model or a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compressm.layers import Bidirectional, LanguageModel, SequenceClassifier
from compressm.observing.layer_calls import reversed_layers

TELLS = (SequenceClassifier, LanguageModel, Bidirectional)  # have present(u, lengths)


def mask_in(arguments: Mapping[str, Any]) -> Tensor | None:
    """1 for tokens and 0 for padding, shape ``(batch, length)``, if a call's arguments by name say so."""
    mask = arguments.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


class Padding:
    """The padding during a call of a model. A part of the model takes precedence over the model around it.

    Args:
        model: only read.

    Attributes:
        tellers: the modules that know which of their inputs are padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tellers = [module for module in model.modules() if isinstance(module, TELLS)]
        self._reversed = reversed_layers(model)
        self._said: list[tuple[Tensor | None, bool]] = [(None, False)]  # of tellers now called, innermost last

    def begin(self, present: Tensor | None = None) -> None:
        """A new call of the model begins.

        Args:
            present: from the batch itself, 1 for tokens and 0 for padding, shape ``(batch, length)``.
        """
        self._said = [(present, False)]

    def told(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """One of the ``tellers`` is called."""
        assert isinstance(module, TELLS)
        present = module.present(**arguments)
        # A layer that gets the lengths reverses each sequence within its length, so padding stays in place.
        stays = isinstance(module, Bidirectional) and present is not None
        self._said.append((self._said[-1][0] if present is None else present, stays))

    def silent(self) -> None:
        """One of the ``tellers`` is called, but its arguments do not count."""
        self._said.append(self._said[-1])

    def over(self) -> None:
        """The teller's call is over."""
        if len(self._said) > 1:
            self._said.pop()

    def of_layer(self, name: str) -> Tensor | None:
        """1 for tokens and 0 for padding, in the order in which a layer reads them; None for no padding."""
        present, stays = self._said[-1]
        return present.flip(1) if present is not None and name in self._reversed and not stays else present


__all__ = ["TELLS", "Padding", "mask_in"]
