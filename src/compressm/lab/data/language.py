"""Text as a data set for language models: its bytes, in windows of one length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from compressm.errors import ConfigError
from compressm.lab.data.sequences import SequenceData, Split
from compressm.lab.data.text import pieces

_WIKITEXT = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")


def text_data(path: Path, length: int, validation: float) -> SequenceData:
    """Text in three consecutive parts: the last tenth is the test data, what comes before it the validation data.

    Args:
        path: a text file, a folder of ``.txt`` files, or one of the library datasets with a column ``text``.
        length: bytes per sequence.
        validation: share of the training data that is held out for validation.

    Raises:
        ConfigError: no text, or too little.
    """
    rows = _windows(b"".join(pieces(path)), length)
    test = max(1, len(rows) // 10)
    held_out = max(1, round(validation * (len(rows) - test)))
    if len(rows) < test + held_out + 1:
        raise ConfigError(
            f"data {path} holds {len(rows)} sequences of {length} bytes, too few to hold some out: give more text, or "
            "a smaller data.max_length"
        )
    first, second = len(rows) - test - held_out, len(rows) - test
    return _assembled(path.stem, rows[:first], rows[first:second], rows[second:])


def wikitext(root: Path, length: int) -> SequenceData:
    """WikiText-2 (Merity et al. 2017, arXiv 1609.07843) byte by byte, with its own splits.

    Args:
        root: holds ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens``, or a folder ``wikitext-2`` or
            ``wikitext2`` with them.
        length: bytes per sequence.

    Raises:
        ConfigError: a file is missing.
    """
    folders = (root, root / "wikitext-2", root / "wikitext2")
    folder = next((one for one in folders if all((one / name).is_file() for name in _WIKITEXT)), None)
    if folder is None:
        raise ConfigError(f"data.root: neither {root} nor {root / 'wikitext-2'} holds {', '.join(_WIKITEXT)}")
    return _assembled("WikiText-2, bytes", *(_windows((folder / name).read_bytes(), length) for name in _WIKITEXT))


def _windows(content: bytes, length: int) -> torch.Tensor:
    count = len(content) // length
    return torch.from_numpy(np.frombuffer(content, np.uint8, count * length).copy()).view(count, length)


def _assembled(label: str, *rows: torch.Tensor) -> SequenceData:
    train, held_out, test = (Split(one[..., None], one) for one in rows)
    scale = torch.zeros(1), torch.ones(1)
    return SequenceData(label, train, held_out, test, *scale, 256, 256, padding=None, task="language")


__all__ = ["text_data", "wikitext"]
