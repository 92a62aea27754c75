"""The sequence classifier and the language model, built from residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.blocks import (
    GATED,
    TIME_INVARIANT,
    GLUBlock,
    ResidualBlock,
    SequenceBatchNorm,
    build_blocks,
    normed,
    sequence_norm,
)
from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.narrow import linear
from compressm.layers.padding import blank, checked_padding, counted
from compressm.layers.s4 import S4
from compressm.layers.s4d import S4D
from compressm.layers.s5 import S5


def _state_dims(d_state: int | Sequence[int], n_layers: int) -> list[int]:
    dims = [d_state] * n_layers if isinstance(d_state, int) else list(d_state)
    if len(dims) != n_layers:
        raise ValueError(f"d_state lists {len(dims)} state dimensions for n_layers={n_layers} blocks")
    return dims


class SequenceClassifier(nn.Module):
    """Encoder, a stack of blocks, mean over time, linear decoder. Models of `GATED` layers have a norm before the
    decoder.

    Args:
        d_input: channels of the input sequence.
        n_classes: number of classes.
        d_model: width H.
        d_state: state dimension n of every block, or one number per block.
        n_layers: number of blocks.
        dropout: probability of dropping an activation in the blocks.
        norm: see `sequence_norm`; by default ``"batch"`` for LRU, S5 and S4D and ``"rms"`` for the others.
        layer: a key of `TIME_INVARIANT` (`GLUBlock`) or of `GATED` (`ResidualBlock`).
        vocabulary: number of tokens, if the input is tokens.
        padding: the token that pads sequences at their end and is ignored; None if every token counts. Padded sequences
            of numbers need ``lengths`` instead, see `forward`.
        options: options of the layer, for example ``r_min`` of `LRU`, ``expand`` of `Mamba`, ``head_dim`` of `Mamba2`.

    Shape:
        input ``(batch, length, d_input)``, real, or tokens ``(batch, length)``, int64; output logits
        ``(batch, n_classes)``.
    """

    def __init__(
        self,
        d_input: int,
        n_classes: int,
        d_model: int,
        d_state: int | Sequence[int],
        n_layers: int = 1,
        dropout: float = 0.1,
        norm: str | None = None,
        layer: str = "lru",
        vocabulary: int | None = None,
        padding: int | None = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        dims = _state_dims(d_state, n_layers)
        self.d_input, self.n_classes, self.vocabulary = d_input, n_classes, vocabulary
        self.padding = checked_padding(padding or None if vocabulary is None else padding, vocabulary)
        self._arguments: dict[str, Any] = {
            "d_input": d_input,
            "n_classes": n_classes,
            "d_model": d_model,
            "n_layers": n_layers,
            "dropout": dropout,
            "norm": norm,
            "layer": layer,
            "vocabulary": vocabulary,
            **({} if vocabulary is None else {"padding": padding}),
            **options,
        }
        self.encoder = nn.Linear(d_input, d_model) if vocabulary is None else nn.Embedding(vocabulary, d_model)
        self.blocks = build_blocks(layer, d_model, dims, dropout, norm, options)
        self.norm = nn.Identity() if layer in TIME_INVARIANT else sequence_norm(norm or "rms", d_model)
        self.decoder = nn.Linear(d_model, n_classes)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this model as it is now, with its present state dimensions."""
        arguments = {**self._arguments, "d_state": [block.ssm.d_state for block in self.blocks]}  # type: ignore[union-attr]
        if arguments["layer"] == "s4" and all(isinstance(block.ssm, S4D) for block in self.blocks):  # distilled
            arguments = {**arguments, "layer": "s4d"}
            arguments.pop("max_length", None)
        return arguments

    def present(self, u: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """False at padding, bool, shape ``(batch, length)``; None if there is none. ``lengths``, if given, decide
        alone; see `forward`."""
        return counted(u, lengths, self.padding)

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits, shape ``(batch, n_classes)``.

        Args:
            u: sequences, see the class. Shorter ones are padded at their end.
            lengths: length of each sequence, integers of at least 1, shape ``(batch,)``. Inputs after its end have no
                influence. None: rows are full, except for ``padding`` tokens.
        """
        z, present = self._through_blocks(u, lengths)
        z = normed(self.norm, z, present)
        if present is None:
            # A sum, not a mean: the gradient of a sum is an expanded view, that of a mean a tensor of full size.
            return self.decoder(z.sum(1) / max(z.shape[1], 1))
        present = present.to(z.dtype)
        return self.decoder(torch.einsum("blh,bl->bh", z, present) / present.sum(1, keepdim=True).clamp_min(1))

    def _through_blocks(self, u: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the last block returns, shape ``(batch, length, d_model)``, and where there is no padding."""
        present = self.present(u, lengths)
        z = linear(self.encoder, u if lengths is None else blank(u, present))
        for block in self.blocks:
            z = block(z) if present is None else block(z, present)
        return z, present

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The state of `step` before the first input: the blocks' states, and the mean and number of steps so far."""
        return {
            "blocks": [block.initial_state(batch) for block in self.blocks],  # type: ignore[operator]
            "mean": self.decoder.bias.new_zeros(batch, self.decoder.in_features),
            "steps": self.decoder.bias.new_zeros(batch, 1),
        }

    def step(self, u: Tensor, state: dict[str, Any], present: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """One time step, in evaluation mode.

        Maps ``u`` of shape ``(batch, d_input)``, or tokens ``(batch,)``, to the logits of the sequence so far, shape
        ``(batch, n_classes)``, and the next state. After the last input these are the logits of the whole sequence.

        ``present``, bool, shape ``(batch,)``, marks the sequences that have not ended. The logits of the others do not
        change. None: all sequences go on, except those whose token is ``padding``.
        """
        if present is not None:
            u = blank(u, present)
        z, blocks = self._step_through_blocks(u, state["blocks"])
        present = self.present(u) if present is None else present
        counts = torch.ones_like(state["steps"]) if present is None else present[:, None].to(z.dtype)
        steps = state["steps"] + counts
        mean = state["mean"] + counts * (self.norm(z) - state["mean"]) / steps.clamp_min(1)
        return self.decoder(mean), {"blocks": blocks, "mean": mean, "steps": steps}

    def _step_through_blocks(self, u: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """What the last block returns at one time step, shape ``(batch, d_model)``, and the blocks' next states."""
        z, blocks = self.encoder(u), list[Any]()
        for block, before in zip(self.blocks, states, strict=True):
            z, after = block.step(z, before)  # type: ignore[operator]
            blocks.append(after)
        return z, blocks


class LanguageModel(nn.Module):
    """Embedding, a stack of `ResidualBlock`, norm, and logits by the embedding's own weights.

    Args:
        vocabulary: number of tokens.
        d_model: width.
        d_state: state dimension n of every block, or one number per block.
        n_layers: number of blocks.
        dropout: probability of dropping an activation in the blocks.
        layer: a key of `GATED`.
        padding: the token that pads sequences at their end. It is left out when the model's states are observed. None
            if every token counts.
        options: options of the layer.

    Shape:
        input tokens ``(batch, length)``, int64; output logits ``(batch, length, vocabulary)``.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        d_state: int | Sequence[int],
        n_layers: int = 2,
        dropout: float = 0.0,
        layer: str = "mamba",
        padding: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if layer not in GATED:
            raise ValueError(f"layer must be one of {', '.join(GATED)}; got {layer!r}")
        dims = _state_dims(d_state, n_layers)
        self.vocabulary, self.padding = vocabulary, checked_padding(padding, vocabulary)
        self._arguments: dict[str, Any] = {
            "vocabulary": vocabulary,
            "d_model": d_model,
            "n_layers": n_layers,
            "dropout": dropout,
            "layer": layer,
            "padding": padding,
            **options,
        }
        self.embedding = nn.Embedding(vocabulary, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = build_blocks(layer, d_model, dims, dropout, "rms", options)
        self.norm = sequence_norm("rms", d_model)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this model as it is now, with its present state dimensions."""
        return {**self._arguments, "d_state": [block.ssm.d_state for block in self.blocks]}  # type: ignore[union-attr]

    def present(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """False at padding; see `SequenceClassifier.present`."""
        return counted(tokens, lengths, self.padding)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits, shape ``(batch, length, vocabulary)``. Their values at padding are meaningless.

        Args:
            tokens: see the class.
            lengths: length of each sequence, as for `SequenceClassifier.forward`. The layers are causal, so the logits
                at tokens do not depend on it.
        """
        z = self.embedding(tokens if lengths is None else blank(tokens, self.present(tokens, lengths)))
        for block in self.blocks:
            z = block(z)
        return F.linear(self.norm(z), self.embedding.weight)

    def initial_state(self, batch: int) -> list[Any]:
        """The zero state of `step`, one entry per block."""
        return [block.initial_state(batch) for block in self.blocks]  # type: ignore[operator]

    def step(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token each, ``(batch,)``, to the logits of the next one, ``(batch, vocabulary)``, and the next state."""
        z, after = self.embedding(tokens), list[Any]()
        for block, before in zip(self.blocks, state, strict=True):
            z, new = block.step(z, before)  # type: ignore[operator]
            after.append(new)
        return F.linear(self.norm(z), self.embedding.weight), after

    @torch.no_grad()
    def generate(self, tokens: Tensor, length: int, temperature: float = 1.0) -> Tensor:
        """Continue sequences: ``(batch, given)`` with ``given >= 1`` to ``(batch, given + length)``.

        Tokens are drawn by torch's random state; ``temperature=0`` takes the most likely token.

        Raises:
            ValueError: sequences of no token, or padding among the given tokens, which would be read as text.
        """
        if tokens.shape[1] == 0:
            raise ValueError(f"generate continues sequences of at least one token; got tokens {tuple(tokens.shape)}")
        if self.padding is not None and bool((tokens == self.padding).any()):
            raise ValueError(
                f"the given sequences hold the padding token {self.padding}: generate for sequences of one length at a "
                "time"
            )
        state, logits = self.initial_state(tokens.shape[0]), torch.empty(0)
        for token in tokens.unbind(1):
            logits, state = self.step(token, state)
        out = [tokens]
        for _ in range(length):
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
            else:
                token = logits.argmax(-1)
            out.append(token[:, None])
            logits, state = self.step(token, state)
        return torch.cat(out, 1)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, ssm_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups, as usual for SSMs: recurrence parameters have a lower learning rate and no weight decay.

    The parameters ``lam`` (``nu_log``, ``theta_log``), ``B`` and ``gamma`` of every `LRU`, eigenvalues, time steps and
    ``B`` of every `S5`, `S4` (its low-rank term too) and `S4D`, and ``A_log`` of every `Mamba` and `Mamba2`, form the
    group ``"ssm"`` with learning rate ``lr * ssm_lr_factor`` and no decay. Biases, norms and other parameters of one
    axis are not decayed either; all others are. The remaining layers have no such parameters, since their recurrences
    are computed by projections. A parameter that several modules share is in one group, once: an optimizer makes a step
    for every time that a parameter is listed.
    """
    recurrent = {
        "nu_log", "theta_log", "gamma_log", "log_decay", "frequency", "log_step", "B_re", "B_im", "A_log", "P_re",
        "P_im",
    }  # fmt: skip
    every, ssm = dict[int, nn.Parameter](), dict[int, nn.Parameter]()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            every[id(parameter)] = parameter
            if isinstance(module, LRU | S5 | S4 | S4D | Mamba | Mamba2) and name in recurrent:
                ssm[id(parameter)] = parameter
    others = [parameter for key, parameter in every.items() if key not in ssm]
    plain = [parameter for parameter in others if parameter.ndim < 2]
    decayed = [parameter for parameter in others if parameter.ndim >= 2]
    groups = [
        {"name": "ssm", "params": list(ssm.values()), "lr": lr * ssm_lr_factor, "weight_decay": 0.0},
        {"name": "no_decay", "params": plain, "lr": lr, "weight_decay": 0.0},
        {"name": "decay", "params": decayed, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


__all__ = [
    "GATED",
    "TIME_INVARIANT",
    "GLUBlock",
    "LanguageModel",
    "ResidualBlock",
    "SequenceBatchNorm",
    "SequenceClassifier",
    "parameter_groups",
]
