"""Compressed archives of data sets."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from compressm.errors import ConfigError


@contextmanager
def opened(path: Path) -> Generator[tarfile.TarFile]:
    """An archive ``.tar.gz``, to read from. What its files hold is decoded inside the block too.

    Raises:
        ConfigError: the archive, or what is read from it, is damaged.
    """
    try:
        with tarfile.open(path, mode="r:gz") as tar:
            yield tar
    except (OSError, EOFError, tarfile.TarError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"data.root: {path} is damaged ({error}); fetch it again") from error


__all__ = ["opened"]
