"""Residual blocks, and the sequence classifier and the language model built from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.hyena import Hyena
from compressm.layers.linear_attention import DeltaNet, GatedLinearAttention, LinearAttention
from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.narrow import batch_norm, gated_residual, linear, unhooked
from compressm.layers.rg_lru import RecurrentBlock
from compressm.layers.s4 import S4
from compressm.layers.s4d import S4D
from compressm.layers.s5 import S5

# Layers without a gate of their own; their block has one.
TIME_INVARIANT: dict[str, Callable[..., Any]] = {"lru": LRU, "s5": S5, "s4": S4, "s4d": S4D}
GATED: dict[str, Callable[..., Any]] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "linear_attention": LinearAttention,
    "gated_linear_attention": GatedLinearAttention,
    "delta_net": DeltaNet,
    "rg_lru": RecurrentBlock,
    "hyena": Hyena,
}


class SequenceBatchNorm(nn.BatchNorm1d):
    """Batch norm of ``(batch, length, channels)``, with statistics over batch and time.

    Also of one step ``(batch, channels)``, by the running statistics: in evaluation mode only.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.with_input(input)[0]

    def with_input(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and the input for a residual connection: see `batch_norm`."""
        if input.ndim == 2 and self.training:
            raise RuntimeError("a single step has no batch statistics over time: call model.eval() before model.step()")
        return batch_norm(self, input)


def sequence_norm(kind: str, width: int) -> nn.Module:
    """``"batch"`` (over batch and time, as in the CompreSSM paper's models), ``"layer"`` or ``"rms"``."""
    kinds = {"batch": SequenceBatchNorm, "layer": nn.LayerNorm, "rms": lambda width: nn.RMSNorm(width, eps=1e-5)}
    if kind not in kinds:
        raise ValueError(f"norm must be one of {', '.join(kinds)}; got {kind!r}")
    return kinds[kind](width)


class GLUBlock(nn.Module):
    """Norm, a time-invariant layer, GELU, GLU, with dropout, around a residual connection (Orvieto et al. 2023, figure
    1; the blocks of S4D and S5 have the same form).

        z = GELU(layer(norm(u)));   v = W1 z;   out = u + dropout(v * sigmoid(W2 z))

    Args:
        layer: a key of `TIME_INVARIANT`.
        d_model: width H.
        d_state: state dimension n.
        dropout: probability of dropping an activation, after the GELU and after the GLU.
        norm: see `sequence_norm`.
        options: of that layer.
    """

    def __init__(
        self, layer: str, d_model: int, d_state: int, dropout: float = 0.1, norm: str = "batch", **options: Any
    ) -> None:
        super().__init__()
        self.norm = sequence_norm(norm, d_model)
        self.ssm = TIME_INVARIANT[layer](d_model, d_state, **options)
        self.glu = nn.Linear(d_model, 2 * d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u: Tensor) -> Tensor:
        if isinstance(self.norm, SequenceBatchNorm) and unhooked(self.norm):
            z, u = self.norm.with_input(u)
        else:
            z = self.norm(u)
        return gated_residual(u, self.ssm(z), self.glu, self.dropout.p, self.training)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state of `step`."""
        return self.ssm.initial_state(batch)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        z, state = self.ssm.step(self.norm(u), state)
        return gated_residual(u, z, self.glu, self.dropout.p, self.training), state


class ResidualBlock(nn.Module):
    """Norm and a layer around a residual connection: ``out = u + dropout(layer(norm(u)))``.

    Args:
        layer: a key of `GATED`.
        d_model: width.
        d_state: state dimension n.
        dropout: probability of dropping an activation.
        norm: see `sequence_norm`.
        options: of that layer.
    """

    def __init__(
        self, layer: str, d_model: int, d_state: int, dropout: float = 0.0, norm: str = "rms", **options: Any
    ) -> None:
        super().__init__()
        self.norm = sequence_norm(norm, d_model)
        self.ssm = GATED[layer](d_model, d_state, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.dropout(self.ssm(self.norm(u)))

    def initial_state(self, batch: int) -> Any:
        """The zero state of `step`."""
        return self.ssm.initial_state(batch)

    def step(self, u: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        z, state = self.ssm.step(self.norm(u), state)
        return u + self.dropout(z), state


def build_blocks(
    layer: str, d_model: int, dims: Sequence[int], dropout: float, norm: str | None, options: dict[str, Any]
) -> nn.ModuleList:
    """A stack of blocks with state dimensions ``dims``; the layer's own norm where ``norm`` is None."""
    if layer in TIME_INVARIANT:
        return nn.ModuleList(GLUBlock(layer, d_model, n, dropout, norm or "batch", **options) for n in dims)
    if layer not in GATED:
        raise ValueError(f"layer must be one of {', '.join((*TIME_INVARIANT, *GATED))}; got {layer!r}")
    return nn.ModuleList(ResidualBlock(layer, d_model, n, dropout, norm or "rms", **options) for n in dims)


def _state_dims(d_state: int | Sequence[int], n_layers: int) -> list[int]:
    dims = [d_state] * n_layers if isinstance(d_state, int) else list(d_state)
    if len(dims) != n_layers:
        raise ValueError(f"d_state lists {len(dims)} state dimensions for n_layers={n_layers} blocks")
    return dims


class SequenceClassifier(nn.Module):
    """Encoder, a stack of blocks, mean over time, linear decoder; with a norm before the decoder but for
    time-invariant layers.

    Args:
        d_input: channels of the input sequence.
        n_classes: number of classes.
        d_model: width H.
        d_state: state dimension n of every block, or one number per block.
        n_layers: number of blocks.
        dropout: probability of dropping an activation in the blocks.
        norm: see `sequence_norm`; by default ``"batch"`` for LRU, S5 and S4D and ``"rms"`` for the others.
        layer: a key of `TIME_INVARIANT` (`GLUBlock`) or of `GATED` (`ResidualBlock`).
        vocabulary: number of tokens, where the input is tokens; 0 pads sequences at the end, and does not count.
        options: of the layer, for example ``r_min`` of `LRU`, ``expand`` of `Mamba`, ``head_dim`` of `Mamba2`.

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
        **options: Any,
    ) -> None:
        super().__init__()
        dims = _state_dims(d_state, n_layers)
        self._arguments: dict[str, Any] = {
            "d_input": d_input,
            "n_classes": n_classes,
            "d_model": d_model,
            "n_layers": n_layers,
            "dropout": dropout,
            "norm": norm,
            "layer": layer,
            "vocabulary": vocabulary,
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

    def present(self, u: Tensor) -> Tensor | None:
        """Which of the inputs are tokens and which padding, bool, shape ``(batch, length)``; None where all are."""
        return None if self._arguments["vocabulary"] is None else u != 0

    def forward(self, u: Tensor) -> Tensor:
        z = linear(self.encoder, u)
        for block in self.blocks:
            z = block(z)
        z = self.norm(z)
        present = self.present(u)
        if present is None:
            return self.decoder(
                z.sum(1) / max(z.shape[1], 1)
            )  # the gradient of a sum is no tensor of that size; a mean's is
        present = present.to(z.dtype)
        return self.decoder(torch.einsum("blh,bl->bh", z, present) / present.sum(1, keepdim=True).clamp_min(1))

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The state of `step` before the first input: the blocks' states, and mean and number of the steps so far."""
        return {
            "blocks": [block.initial_state(batch) for block in self.blocks],  # type: ignore[operator]
            "mean": self.decoder.bias.new_zeros(batch, self.decoder.in_features),
            "steps": self.decoder.bias.new_zeros(batch, 1),
        }

    def step(self, u: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step, in evaluation mode.

        ``u`` of shape ``(batch, d_input)``, or tokens ``(batch,)``, to the logits of the sequence so far, shape
        ``(batch, n_classes)``, and the next state. After the last input they are those of the whole sequence.
        """
        z, blocks = self.encoder(u), list[Any]()
        for block, before in zip(self.blocks, state["blocks"], strict=True):
            z, after = block.step(z, before)  # type: ignore[operator]
            blocks.append(after)
        present = self.present(u)
        counts = torch.ones_like(state["steps"]) if present is None else present[:, None].to(z.dtype)
        steps = state["steps"] + counts
        mean = state["mean"] + counts * (self.norm(z) - state["mean"]) / steps.clamp_min(1)
        return self.decoder(mean), {"blocks": blocks, "mean": mean, "steps": steps}


class LanguageModel(nn.Module):
    """Embedding, a stack of `ResidualBlock`, norm, and logits by the embedding's own weights.

    Args:
        vocabulary: number of tokens.
        d_model: width.
        d_state: state dimension n of every block, or one number per block.
        n_layers: number of blocks.
        dropout: probability of dropping an activation in the blocks.
        layer: a key of `GATED`.
        options: of the layer.

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
        **options: Any,
    ) -> None:
        super().__init__()
        if layer not in GATED:
            raise ValueError(f"layer must be one of {', '.join(GATED)}; got {layer!r}")
        dims = _state_dims(d_state, n_layers)
        self._arguments: dict[str, Any] = {
            "vocabulary": vocabulary,
            "d_model": d_model,
            "n_layers": n_layers,
            "dropout": dropout,
            "layer": layer,
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

    def forward(self, tokens: Tensor) -> Tensor:
        z = self.embedding(tokens)
        for block in self.blocks:
            z = block(z)
        return F.linear(self.norm(z), self.embedding.weight)

    def initial_state(self, batch: int) -> list[Any]:
        """The zero state of `step`, one entry per block."""
        return [block.initial_state(batch) for block in self.blocks]  # type: ignore[operator]

    def step(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token each: ``(batch,)`` to the logits of the next, ``(batch, vocabulary)``, and the next state."""
        z, after = self.embedding(tokens), list[Any]()
        for block, before in zip(self.blocks, state, strict=True):
            z, new = block.step(z, before)  # type: ignore[operator]
            after.append(new)
        return F.linear(self.norm(z), self.embedding.weight), after

    @torch.no_grad()
    def generate(self, tokens: Tensor, length: int, temperature: float = 1.0) -> Tensor:
        """Continue sequences: ``(batch, given)`` with ``given >= 1`` to ``(batch, given + length)``, drawn from torch's
        random state; ``temperature=0`` takes the most likely token.

        Raises:
            ValueError: sequences of no token.
        """
        if tokens.shape[1] == 0:
            raise ValueError(f"generate continues sequences of at least one token; got tokens {tuple(tokens.shape)}")
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
    """Optimizer groups as SSMs are trained: the recurrence's parameters at a lower rate and without weight decay.

    The parameters ``lam`` (``nu_log``, ``theta_log``), ``B`` and ``gamma`` of every `LRU`, eigenvalues, time steps and
    ``B`` of every `S5`, `S4` (its low-rank term too) and `S4D`, and ``A_log`` of every `Mamba` and `Mamba2`, form the
    group ``"ssm"`` with learning rate ``lr * ssm_lr_factor`` and no decay; biases, norms and other parameters of one
    axis are not decayed either; everything else is. The other layers have no such parameters: their recurrences are
    made of projections.
    """
    ssm, plain, decayed = [], [], []
    recurrent = {
        "nu_log", "theta_log", "gamma_log", "log_decay", "frequency", "log_step", "B_re", "B_im", "A_log", "P_re",
        "P_im",
    }  # fmt: skip
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, LRU | S5 | S4 | S4D | Mamba | Mamba2) and name in recurrent:
                ssm.append(parameter)
            elif parameter.ndim < 2:
                plain.append(parameter)
            else:
                decayed.append(parameter)
    groups = [
        {"name": "ssm", "params": ssm, "lr": lr * ssm_lr_factor, "weight_decay": 0.0},
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
    "SequenceClassifier",
    "parameter_groups",
]
