"""How the C library handles memory that PyTorch frees on the CPU."""

from __future__ import annotations

import ctypes
import functools
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_BYTES, _OLDER_BYTES = 1 << 30, 32 << 20  # older versions of glibc refuse more than the second as a threshold for mmap


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next allocations. Returns True if the C library is glibc and accepts
    this for tensors of any usual size.

    By default glibc returns tensors of more than some megabytes to the system as soon as they are freed. Every training
    step then allocates them again, page by page, which takes a tenth of the time of a small step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    agreed = bool(libc.mallopt(_MMAP_THRESHOLD, _BYTES))
    if not agreed:
        libc.mallopt(_MMAP_THRESHOLD, _OLDER_BYTES)
    return bool(libc.mallopt(_TRIM_THRESHOLD, _BYTES)) and agreed


__all__ = ["keep_freed_memory"]
