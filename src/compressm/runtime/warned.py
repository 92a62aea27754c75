"""Warnings that show the user's line, however deep in the package their cause is found."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the package: the caller of the outermost of its functions.

    Functions of PyTorch may lie between ours, such as hooks and ``no_grad``, so `warnings.warn` cannot be told to skip
    the package (and Python 3.11 has no ``skip_file_prefixes``).
    """
    frame, level, ours = inspect.currentframe(), 1, 1
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            ours = level
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=ours + 1)


__all__ = ["warn"]
