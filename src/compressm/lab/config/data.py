"""The section ``data`` of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compressm.lab.config.section import Section


class DataConfig(Section):
    """Which data, and where they are.

    Attributes:
        name: ``digits`` (comes with scikit-learn), ``smnist``, ``psmnist``, ``scifar``, ``imdb``, ``fsdd`` (spoken
            digits, sample by sample), ``listops`` (generated), ``mackey-glass`` (forecasts, generated), ``mqar``
            (associative recall, generated), ``text`` (any text, byte by byte) or ``wikitext``.
        source: data of your own instead: ``package.module:function``, a file or a folder; see docs/own.md.
        root: the directory with the files, where any are needed; by default that in the environment variable
            ``COMPRESSM_DATA``. Of ``text`` also a file.
        task: of ``source``: ``classification``, ``regression`` or ``language``. By default text is for a language
            model, labels that are whole numbers or names are classes, and others are numbers to predict.
        validation: share of the training data that is held out for validation. ``fsdd`` and ``wikitext`` have
            validation data of their own.
        pool: average square blocks of so many pixels a side, for shorter sequences: 2 makes MNIST's 784 steps 196. Of
            ``fsdd``: average so many samples.
        max_length: of ``imdb`` and ``listops``: longer reviews are cut off (default: 4096); expressions have a quarter
            to all of so many tokens (2000). Of text: bytes per sequence (256). Of ``fsdd``: samples, later ones are
            left out (4000, half a second). Of ``mackey-glass``: steps per sequence (200). Of ``mqar``: tokens per
            sequence, at least ``4 * pairs``, which is the default.
        examples: of ``listops``: how many for training (96,000); 2000 each are for validation and test. Of
            ``mackey-glass``: 512, and 128 each. Of ``mqar``: 50,000, and 500 each.
        pairs: of ``mqar``: how many pairs of a key and a value a sequence holds. In training, equal shares of the
            sequences hold 1, 2, 4 and so on up to that.
        horizon: of ``mackey-glass``: how many steps ahead the forecast is.
    """

    name: (
        Literal[
            "digits", "smnist", "psmnist", "scifar", "imdb", "fsdd", "listops", "mackey-glass", "mqar", "text",
            "wikitext",
        ]
        | None
    ) = None  # fmt: skip
    root: str | None = None
    validation: float = Field(0.1, gt=0, lt=1)
    pool: Literal[1, 2, 4] = 1
    max_length: int | None = Field(None, ge=8)
    examples: int | None = Field(None, ge=1)
    source: str | None = Field(None, min_length=1)
    task: Literal["classification", "regression", "language"] | None = None
    horizon: int = Field(32, ge=1)
    pairs: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if (self.name is None) == (self.source is None):
            both = "is given beside data.source" if self.name else "is missing, and so is data.source"
            raise ValueError(f"data.name|{both}; give one: a data set that compressm knows, or your own data")
        if self.pool > 1 and self.name not in ("smnist", "psmnist", "scifar", "fsdd"):
            where = "images of 28 and 32 pixels a side and fsdd"
            raise ValueError(f"data.pool|is for {where}, not for {self.name}; leave it at 1")
        of_length = ("imdb", "fsdd", "listops", "mackey-glass", "mqar", "text", "wikitext")
        if self.max_length is not None and self.source is None and self.name not in of_length:
            raise ValueError(f"data.max_length|is for {', '.join(of_length)} and data.source, not for {self.name}")
        if self.examples is not None and self.name not in (generated := ("listops", "mackey-glass", "mqar")):
            raise ValueError(f"data.examples|is for {', '.join(generated)}, not for {self.name}")
        if self.name == "mqar" and self.max_length is not None and self.max_length < 4 * self.pairs:
            raise ValueError(f"data.max_length|must be at least 4 * data.pairs = {4 * self.pairs}: pairs, then queries")
        if self.task is not None and self.source is None:
            raise ValueError(f"data.task|is for data.source; the task of {self.name} is known")
        return self


__all__ = ["DataConfig"]
