"""The data sets of `max_drop.py`: real ones, made short, with a part to learn from, one to validate on and one to test.

The folder ``COMPRESSM_DATA`` holds them: ``mnist/``, ``cifar10/``, ``fsdd/``, ``imdb/``, ``text/`` and ``sysid/``.
ListOps is generated. Test parts are those that the data sets come with; tiny Shakespeare has none, and its last tenth
is taken, with the tenth before it to validate on.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from byte_models import tokens
from cushion_curves import recordings
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import load_data
from compressm.lab.data.reviews import TABLES, read_tables
from compressm.layers import SequenceClassifier, SequenceRegressor

LEARNT, VALIDATED, TESTED = 20_000, 500, 2000  # examples at most
FEWEST = 10  # scores that a compressor takes
BYTES, WORDS, VOCABULARY = 64, 80, 2000  # bytes of a window, words of a review, and known words
WINDOW = 128  # samples of a simulation
WARM_UP = 48  # samples of a window in which a simulation may forget that it did not start where the system did

Kind = Literal["classes", "bytes", "simulation"]
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A data set in three parts, each of inputs and targets.

    Attributes:
        label: what tables are to call it.
        kind: ``classes``: ``y`` of shape ``(N,)``, scores are right or wrong; ``bytes``: ``x`` and ``y`` of shape
            ``(N, length)``, scores are bits per byte of each window; ``simulation``: both of shape ``(N, length, 1)``,
            scores are the fit of each window, 1 - RMSE / standard deviation of the training data.
        train, validation, test: the parts.
        classes: number of classes.
        vocabulary: number of tokens; None where inputs are numbers.
        lr: the learning rate.
    """

    label: str
    kind: Kind
    train: Part
    validation: Part
    test: Part
    classes: int = 10
    vocabulary: int | None = None
    lr: float = 1e-2

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the metric is a loss."""
        return "min" if self.kind == "bytes" else "max"

    def model(self, layer: str, width: int, states: int, **options: int) -> nn.Module:
        """Two blocks of a layer, with the ends that the task needs."""
        common = {"d_model": width, "d_state": states, "n_layers": 2, "layer": layer, "dropout": 0.0, "norm": "layer"}
        if self.kind == "classes":
            channels = 1 if self.vocabulary else self.train[0].shape[-1]
            return SequenceClassifier(channels, self.classes, vocabulary=self.vocabulary, **common, **options)  # type: ignore[arg-type]
        outputs = 256 if self.kind == "bytes" else 1
        tokenised = {"vocabulary": 256, "padding": None} if self.kind == "bytes" else {}
        return SequenceRegressor(1, outputs, per_step=True, **tokenised, **common, **options)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What training makes small."""
        out = model(x)
        if self.kind == "simulation":
            return (out - y)[:, WARM_UP:].square().mean()
        return F.cross_entropy(out.flatten(0, -2), y.flatten())

    @torch.no_grad()
    def scores(self, model: nn.Module, part: Part) -> Tensor:
        """One score per example, shape ``(N,)``; the metric is their mean."""
        model.eval()
        found = [self._scores(model(x), y) for x, y in zip(*(t.split(250) for t in part), strict=True)]
        model.train()
        return torch.cat(found)

    def evaluate(self, model: nn.Module) -> Tensor | float:
        """For the compressor: the scores of the validation part, or their mean where they are too few to compare."""
        scores = self.scores(model, self.validation)
        return scores if len(scores) >= FEWEST else float(scores.mean())

    def _scores(self, out: Tensor, y: Tensor) -> Tensor:
        if self.kind == "classes":
            return (out.argmax(-1) == y).float()
        if self.kind == "simulation":
            return 1 - (out - y)[:, WARM_UP:].square().mean((1, 2)).sqrt()
        return F.cross_entropy(out.mT, y, reduction="none").mean(1) / np.log(2)


def some(part: Part, count: int) -> Part:
    """So many examples, always the same ones."""
    chosen = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(0))[:count]
    return part[0][chosen].clone(), part[1][chosen].clone()


def three(*parts: Part) -> tuple[Part, Part, Part]:
    """The parts to learn from, to validate on and to test, of the sizes that are used."""
    train, validation, test = (some(part, n) for part, n in zip(parts, (LEARNT, VALIDATED, TESTED), strict=True))
    return train, validation, test


def folder() -> Path:
    """Where the data sets are."""
    return Path(os.environ.get("COMPRESSM_DATA", "data"))


def from_lab(label: str, config: DataConfig) -> Task:
    """A data set that `compressm train` knows."""
    found = load_data(config)
    splits = (found.train, found.validation, found.test)
    counts = (LEARNT, VALIDATED, TESTED)
    orders = [torch.randperm(len(s), generator=torch.Generator().manual_seed(0)) for s in splits]
    train, validation, test = (found.batch(s, o[:n]) for s, o, n in zip(splits, orders, counts, strict=True))
    return Task(label, "classes", train, validation, test, found.n_classes, found.vocabulary)


def smnist() -> Task:
    return from_lab("MNIST, 49 steps", DataConfig(name="smnist", pool=4, root=str(folder() / "mnist")))


def scifar() -> Task:
    return from_lab("CIFAR-10 (JPEG), 64 steps", DataConfig(name="scifar", pool=4, root=str(folder())))


def listops() -> Task:
    return from_lab("ListOps, 16 to 64 tokens", DataConfig(name="listops", max_length=64, examples=LEARNT))


def fsdd() -> Task:
    """Spoken digits with their own test part, takes 0 to 4 of each digit and speaker; takes 5 to 14 validate."""
    x, y, take = recordings(folder() / "fsdd" / "fsdd.tar.gz")
    train = take > 14
    x = (x - x[train].mean((0, 1))) / x[train].std((0, 1))
    parts = [(x[part], y[part]) for part in (train, (take > 4) & (take < 15), take < 5)]
    return Task("spoken digits, 40 frames", "classes", *three(*parts))


def imdb() -> Task:
    """The first words of reviews; words that are not frequent in the training part are one token."""
    (texts, labels), (test_texts, test_labels) = read_tables(*(folder() / "imdb" / name for name in TABLES.values()))
    words, test_words = (
        [re.findall(r"[a-z']+", text.lower())[:WORDS] for text in some] for some in (texts, test_texts)
    )
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    learnt, held = order[: len(order) * 9 // 10], order[len(order) * 9 // 10 :]
    counts = Counter(word for i in learnt.tolist() for word in words[i])
    number = {word: i for i, (word, _) in enumerate(counts.most_common(VOCABULARY), 2)}

    def encoded(rows: Sequence[list[str]]) -> Tensor:
        padded = [[number.get(word, 1) for word in row] + [0] * (WORDS - len(row)) for row in rows]
        return torch.tensor(padded)

    x, y, test = encoded(words), torch.tensor(labels), (encoded(test_words), torch.tensor(test_labels))
    parts = three((x[learnt], y[learnt]), (x[held], y[held]), test)
    return Task(f"IMDB, {WORDS} words", "classes", *parts, classes=2, vocabulary=VOCABULARY + 2)


def text(label: str, *parts: Tensor) -> Task:
    """The bytes of a text in windows; each predicts its next byte."""
    rows = [part[: (len(part) - 1) // BYTES * BYTES + 1].unfold(0, BYTES + 1, BYTES) for part in parts]
    return Task(label, "bytes", *three(*((row[:, :-1], row[:, 1:]) for row in rows)), vocabulary=256)


def wikitext() -> Task:
    where = folder() / "text" / "wikitext2"
    names = ("train.shuffled-articles", "valid", "test")
    return text("WikiText-2, bytes", *(tokens(where / f"wiki.{name}.tokens.xz") for name in names))


def shakespeare() -> Task:
    whole = tokens(folder() / "text" / "tinyshakespeare" / "input.txt")
    tenth = len(whole) // 10
    return text("tiny Shakespeare, bytes", whole[: 8 * tenth], whole[8 * tenth : 9 * tenth], whole[9 * tenth :])


def ukrainian() -> Task:
    where = folder() / "text" / "ukrainian"
    return text("Ukrainian, bytes", *(tokens(where / f"bruk_{part}.txt.xz") for part in ("train", "valid", "test")))


def simulated(label: str, stride: int, apart: int, *records: np.ndarray) -> Task:
    """Windows of input and output records ``(length, 2)``, scaled by the first, which is the one to learn from.

    Args:
        label: what tables are to call it.
        stride: steps between two windows to learn from.
        apart: steps between two others; with fewer than ``WINDOW - WARM_UP`` their counted samples overlap.
        records: to learn from, to validate on, to test.
    """
    mean, scale = records[0].mean(0), records[0].std(0)
    parts: list[Part] = []
    for i, record in enumerate(records):
        scaled = torch.tensor((record - mean) / scale, dtype=torch.float32)
        rows = scaled.unfold(0, WINDOW, apart if i else stride).mT
        parts.append((rows[..., :1], rows[..., 1:]))
    return Task(label, "simulation", *three(*parts))


def silverbox() -> Task:
    """The multisines: eight realisations to learn from, one to validate on and one to test."""
    table = np.genfromtxt(folder() / "sysid/silverbox/SNLS80mV.csv", delimiter=",", skip_header=1, usecols=(0, 1))
    return simulated(
        "Silverbox", 16, WINDOW - WARM_UP, table[40_700:110_000], table[110_000:118_600], table[118_600:127_400]
    )


def tanks() -> Task:
    """The estimation record, its last fifth to validate on, and the benchmark's validation record to test."""
    table = np.genfromtxt(folder() / "sysid/cascaded_tanks/dataBenchmark.csv", delimiter=",", skip_header=1)
    learnt = table[:, [0, 2]]
    return simulated("cascaded tanks", 4, 40, learnt[:820], learnt[820 - WARM_UP :], table[:, [1, 3]])


TASKS: dict[str, Callable[[], Task]] = {
    "smnist": smnist, "scifar": scifar, "fsdd": fsdd, "imdb": imdb, "wikitext": wikitext, "shakespeare": shakespeare,
    "ukrainian": ukrainian, "silverbox": silverbox, "tanks": tanks, "listops": listops,
}  # fmt: skip
