"""A data set as sequences in memory, and the order in which training goes through them.

Sequences stay the bytes that they come in. They are normalised when a batch is taken, which costs little and keeps the
largest set at 180 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compressm.errors import ConfigError

Task = Literal["classification", "regression", "language"]


@dataclass(frozen=True)
class Split:
    """Sequences and labels: ``x`` of shape ``(N, length, channels)``, often uint8; ``y`` by the task.

    Classes are int64 of shape ``(N,)``; numbers float32 of shape ``(N, outputs)``, or ``(N, length, outputs)`` where
    there is one for every step; of language models they are the tokens themselves, shape ``(N, length)``.

    Tokens have one channel, and end with zeros where a sequence is shorter than others. Sequences of numbers stand at
    the beginning of their rows, and ``lengths``, int64 of shape ``(N,)``, says how long they are; None where all are
    equal.
    """

    x: Tensor
    y: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return self.y.shape[0]


@dataclass(frozen=True)
class SequenceData:
    """A data set, split and ready to train on.

    Attributes:
        label: what results are to call it.
        train, validation, test: the splits. The test split is the canonical one where there is one.
        mean, std: normalisation per channel, shape ``(channels,)``.
        n_classes: number of classes; of tokens for language models; of outputs for numbers.
        vocabulary: number of different tokens, padding included; None where sequences are of numbers.
        padding: the token that pads; None where every token counts.
        task: what is learnt: a class per sequence, numbers, or the next token.
        class_names: the name of every class, where labels were names.
    """

    label: str
    train: Split
    validation: Split
    test: Split
    mean: Tensor
    std: Tensor
    n_classes: int
    vocabulary: int | None = None
    padding: int | None = 0
    task: Task = "classification"
    class_names: tuple[str, ...] | None = None

    @property
    def per_step(self) -> bool:
        """Whether numbers are to be predicted at every step."""
        return self.task == "regression" and self.train.y.ndim == 3

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the sequences, labels and lengths of all splits, by which other data are told from these."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for part in (split.x, split.y, split.lengths):
                digest.update(f"{None if part is None else (part.dtype, tuple(part.shape))}".encode())
                if part is not None:
                    digest.update(part.cpu().contiguous().numpy().data if part.numel() else b"")
        return digest.hexdigest()

    @property
    def channels(self) -> int:
        """Channels of a sequence."""
        return self.train.x.shape[2]

    def batch(self, split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences and their labels.

        Numbers are normalised: float32 of shape ``(len(indices), length, channels)``. Tokens are int64 of shape
        ``(len(indices), length)``. Both are as long as the longest of these sequences; see `lengths` for how long each
        is.
        """
        if self.vocabulary is not None:
            tokens = split.x.index_select(0, indices)[..., 0]
            if self.padding is not None:
                tokens = tokens[:, : int((tokens != self.padding).any(0).sum())]
            return tokens.long(), split.y[indices].long() if self.task == "language" else split.y[indices]
        x, lengths = split.x.index_select(0, indices), self.lengths(split, indices)
        if lengths is not None and len(lengths):
            x = x[:, : int(lengths.max())]
        y = split.y[indices]
        return (x.float() - self.mean) / self.std, y[:, : x.shape[1]] if self.per_step else y

    def lengths(self, split: Split, indices: Tensor) -> Tensor | None:
        """How long the sequences of a batch are, where a model has to be told: its ``lengths``, shape
        ``(len(indices),)``. None where rows are full, and for tokens, whose padding is a token of its own."""
        return None if self.vocabulary is not None or split.lengths is None else split.lengths[indices]

    def batches(self, split: Split, size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """All of a split in order, or every ``world``-th sequence of it, in batches of at most ``size``."""
        for indices in self.shares(split, size, rank, world):
            yield self.batch(split, indices)

    @staticmethod
    def shares(split: Split, size: int, rank: int = 0, world: int = 1) -> tuple[Tensor, ...]:
        """Indices of every ``world``-th sequence of a split, in batches of at most ``size``."""
        return torch.arange(rank, len(split), world, device=split.y.device).split(size) if rank < len(split) else ()

    def to(self, device: torch.device) -> SequenceData:
        """The same data on another device."""
        train, validation, test = (
            Split(s.x.to(device), s.y.to(device), None if s.lengths is None else s.lengths.to(device))
            for s in (self.train, self.validation, self.test)
        )
        return replace(
            self, train=train, validation=validation, test=test, mean=self.mean.to(device), std=self.std.to(device)
        )


class BatchOrder:
    """Which training sequences step number ``step`` sees: a pure function of seed and step, so a resume needs no state.

    Every epoch is a permutation of the training data drawn from ``(seed, epoch)``; a last partial batch is left out.

    Raises:
        ConfigError: fewer sequences than a batch.
    """

    def __init__(self, sequences: int, batch_size: int, seed: int) -> None:
        if sequences < batch_size:
            raise ConfigError(
                f"run.batch_size = {batch_size}: more than the {sequences} training sequences; choose at most that"
            )
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.steps_per_epoch = sequences // batch_size
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Indices of the sequences of a step, counted from 0: shape ``(batch_size,)``, on the CPU."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
            self._epoch, self._permutation = epoch, torch.randperm(self.sequences, generator=generator)
        return self._permutation[position * self.batch_size : (position + 1) * self.batch_size]


__all__ = ["BatchOrder", "SequenceData", "Split", "Task"]
