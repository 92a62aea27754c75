"""Builds and loads the compiled CPU kernels (``kernels/``).

They are compiled once, on first use, with the machine's own C++ compiler and for its own processor (a few seconds),
and kept in ``$COMPRESSM_CACHE``, by default ``~/.cache/compressm``. Where that does not work, one warning says so and
the scans run on plain PyTorch. ``COMPRESSM_NATIVE=0`` asks for that without a warning; ``COMPRESSM_CXXFLAGS`` holds
further options of the compiler, for example ``-march=x86-64-v3`` for one build that serves a mixed cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).with_name("kernels")
_SOURCE = _FOLDER / "kernels.cpp"  # includes all the others
# No -ffast-math: NaN and Inf must come out as they went in, so that a diverging training is seen.
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)


_vector_bytes = 0  # until `library` has the kernels
_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


class NativeKernelWarning(UserWarning):
    """The compiled kernels cannot be had; plain PyTorch, which is slower, takes over."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    if os.environ.get("COMPRESSM_NATIVE", "1") == "0":
        return None
    global _vector_bytes  # torch.compile reads a global number as a constant
    try:
        kernels = ctypes.CDLL(str(_built()))
        _vector_bytes = int(kernels.vector_size())
        return kernels
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr.strip()[-300:] if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(
            f"compressm's CPU kernels could not be built; the scans run on plain PyTorch, which is slower: {detail}. "
            "Install a C++ compiler (g++ or clang++, or set CXX), or set COMPRESSM_NATIVE=0 to stop this warning.",
            NativeKernelWarning,
            stacklevel=2,
        )
        return None


def call(name: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call ``name_f32`` or ``name_f64``, by the dtype of ``like``. Tensors are handed over as pointers.

    Every tensor must be contiguous, on the CPU and of that dtype: the callers see to it.
    """
    kernels = library()
    assert kernels is not None
    assert like.dtype in (torch.float32, torch.float64), like.dtype
    for watcher in _watchers:
        watcher(name, arguments)
    function = getattr(kernels, f"{name}_{'f32' if like.dtype == torch.float32 else 'f64'}")
    function(*(_converted(argument) for argument in arguments), ctypes.c_int(torch.get_num_threads()))


@contextlib.contextmanager
def watched(watcher: Callable[[str, tuple[Any, ...]], None]) -> Generator[None, None, None]:
    """Inside, ``watcher`` is told name and arguments of every `call`, which PyTorch's own counters do not see."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _converted(argument: Tensor | int | float | None) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels exist and take these tensors: on the CPU, of a floating dtype (half precision is widened)."""
    floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return all(t is None or (t.device.type == "cpu" and t.dtype in floating) for t in tensors) and available()


def vector_bytes() -> int:
    """Size of the kernels' vectors, which are as long as the processor's registers: 64, 32 or 16 bytes."""
    assert available()
    return _vector_bytes


def available() -> bool:
    """Whether the kernels exist; builds them if need be."""
    return library() is not None


def threads() -> int:
    """PyTorch's number of threads."""
    return torch.get_num_threads()


# torch.compile asks once, and does not look inside. torch.compiler.assume_constant_result does just this, but for
# importing the compiler, which takes longer than PyTorch itself.
available._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
threads._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _built() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    source = b"".join(path.read_bytes() for path in sorted(_FOLDER.iterdir()))
    key = hashlib.sha256(source + repr((_FLAGS, _further_flags(), version, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("COMPRESSM_CACHE") or Path.home() / ".cache" / "compressm")
    built = folder / f"native-{key}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        started = time.perf_counter()
        print("compressm: building the CPU kernels (once) ...", end=" ", file=sys.stderr, flush=True)
        _compile(compiler, built)
        print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return built


def _further_flags() -> list[str]:
    return shlex.split(os.environ.get("COMPRESSM_CXXFLAGS", ""))


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def _compile(compiler: str, target: Path) -> None:
    """Compile next to the target, then rename: a second process that builds at the same time does no harm."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        # Apple's Clang knows no -fopenmp, some compilers no -march=native: less is slower, and still right.
        attempts = (("-fopenmp", "-march=native"), ("-march=native",), ())
        for attempt in attempts:
            try:
                command = [compiler, *_FLAGS, *attempt, *_further_flags(), str(_SOURCE), "-o", name]
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
                break
            except subprocess.CalledProcessError:
                if attempt == attempts[-1]:
                    raise
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
