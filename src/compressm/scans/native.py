"""Builds and loads the compiled CPU kernels (``kernels/``).

They are compiled once, on first use, by the machine's C++ compiler and for its processor, in ten to thirty seconds. The
scans with matrix-valued states are a unit of their own, compiled when the first of them runs. The result is stored in
``$COMPRESSM_CACHE``, by default the user's cache folder: on Linux ``$XDG_CACHE_HOME/compressm`` or
``~/.cache/compressm``. If compilation fails, there is one warning, and the scans run on plain PyTorch.
``COMPRESSM_NATIVE=0`` selects plain PyTorch without a warning. ``COMPRESSM_CXXFLAGS`` adds options of the compiler, for
example ``-march=x86-64-v3`` for one build that serves a mixed cluster.
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
# Each unit is a file of the folder that includes others. Names of kernels begin with the scan's.
_UNITS = {"ssd": "matrix_states", "gla": "matrix_states", "delta": "matrix_states", "norm": "matrix_states"}
_MAIN = "kernels"
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}  # bfloat16: the gated norm alone
# No -ffast-math: NaN and Inf must propagate, so that a diverging training is noticed.
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


_vector_bytes = 0  # set when `library` loads the kernels
_failures: list[str] = []  # a unit that could not be built; the others are not tried then, and nothing is said twice
_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


class NativeKernelWarning(UserWarning):
    """The compiled kernels are not available. Plain PyTorch, which is slower, is used instead."""


def library(unit: str = _MAIN) -> ctypes.CDLL | None:
    """The compiled kernels of a unit; None if they are not available."""
    return _library(unit)


@functools.cache
def _library(unit: str) -> ctypes.CDLL | None:
    if os.environ.get("COMPRESSM_NATIVE", "1") == "0" or _failures:
        return None
    global _vector_bytes  # torch.compile reads a global number as a constant
    try:
        kernels = ctypes.CDLL(str(_built(unit)))
        _vector_bytes = int(kernels.vector_size())
        return kernels
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr.strip()[-300:] if isinstance(error, subprocess.CalledProcessError) else str(error)
        _failures.append(detail)
        warnings.warn(
            f"compressm's CPU kernels could not be built; the scans run on plain PyTorch, which is slower: {detail}. "
            "Install a C++ compiler (g++ or clang++, or set CXX), or set COMPRESSM_NATIVE=0 to stop this warning.",
            NativeKernelWarning,
            stacklevel=3,
        )
        return None


def call(name: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call ``name_f32``, ``name_f64`` or ``name_bf16``, by the dtype of ``like``. Tensors are passed as pointers.

    The caller ensures that every tensor is on the CPU, and of the strides and dtype that the kernel reads.
    """
    kernels = library(_unit(name))
    assert kernels is not None
    for watcher in _watchers:
        watcher(name, arguments)
    function = getattr(kernels, f"{name}_{_SUFFIXES[like.dtype]}")
    function(*(_converted(argument) for argument in arguments), ctypes.c_int(torch.get_num_threads()))


@contextlib.contextmanager
def watched(watcher: Callable[[str, tuple[Any, ...]], None]) -> Generator[None, None, None]:
    """In the block, pass name and arguments of every `call` to ``watcher``. PyTorch's counters do not see these."""
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


def usable(*tensors: Tensor | None, scan: str = "") -> bool:
    """Whether the kernels exist and the tensors are on the CPU, of a floating dtype (half precision is widened).

    Args:
        tensors: what the kernel is called with.
        scan: how the kernel's name begins, where it is not in the main unit.
    """
    floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return all(t is None or (t.device.type == "cpu" and t.dtype in floating) for t in tensors) and available(
        _unit(scan)
    )


def widened(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype that the kernels compute in, that of the first one but at least float32.

    An engine's operators widen inside, forward and again backward. So half precision is kept for the backward pass as
    it came, and copies of twice the size live only while a kernel runs.
    """
    first = tensors[0]
    assert first is not None
    dtype = torch.promote_types(first.dtype, torch.float32)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def vector_bytes() -> int:
    """Size of the kernels' vectors, equal to the processor's vector registers: 64, 32 or 16 bytes."""
    assert available()
    return _vector_bytes


def kept_states(length: int) -> int:
    """How many states of a matrix-valued recurrence are kept for the backward pass: one every ``kept_steps`` of
    matrix_states.h."""
    return -(-length // 64)


def available(unit: str = _MAIN) -> bool:
    """Whether the kernels of a unit exist. Builds them if needed."""
    return library(unit) is not None


def _unit(name: str) -> str:
    return _UNITS.get(name.split("_")[0], _MAIN)


def threads() -> int:
    """PyTorch's number of threads."""
    return torch.get_num_threads()


# torch.compile calls these once and takes the results as constants. torch.compiler.assume_constant_result has the same
# effect, but imports the compiler, which takes longer than importing PyTorch.
available._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
threads._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _built(unit: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    source = b"".join(path.read_bytes() for path in sorted(_FOLDER.iterdir()))
    made_of = (_FLAGS, _further_flags(), version, _processor(), unit)
    built = _cache() / f"native-{hashlib.sha256(source + repr(made_of).encode()).hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        started = time.perf_counter()
        what = "the CPU kernels" if unit == _MAIN else "the CPU kernels of matrix-valued states"
        print(f"compressm: building {what} (once) ...", end=" ", file=sys.stderr, flush=True)
        _compile(compiler, _FOLDER / f"{unit}.cpp", built)
        print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return built


def cache_file(name: str) -> Path:
    """A file beside the compiled kernels, for this processor and these compiler options only."""
    key = hashlib.sha256(repr((_further_flags(), _processor())).encode()).hexdigest()[:16]
    return _cache() / f"{key}-{name}"


def _cache() -> Path:
    if named := os.environ.get("COMPRESSM_CACHE"):
        return Path(named)
    from platformdirs import user_cache_path  # not at the top: every `import compressm` would wait for it

    return user_cache_path("compressm", appauthor=False)


def _further_flags() -> list[str]:
    return shlex.split(os.environ.get("COMPRESSM_CXXFLAGS", ""))


def _processor() -> str:
    """The processor that ``-march=native`` compiles for, since machines with different ones may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Compile next to the target, then rename, so that several processes may build at the same time."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        # Apple's Clang has no -fopenmp and some compilers no -march=native. Without them the kernels are only slower.
        attempts = (("-fopenmp", "-march=native"), ("-march=native",), ())
        for attempt in attempts:
            try:
                command = [compiler, *_FLAGS, *attempt, *_further_flags(), str(source), "-o", name]
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
                break
            except subprocess.CalledProcessError:
                if attempt == attempts[-1]:
                    raise
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
