"""Linear systems as C code for small devices: one function per step, without loops, libraries or memory of its own.

    from compressm.saving.c_code import to_c
    print(to_c(reduced.system, "filter.c"))

Where the machine has a C compiler (``cc``), the file is compiled, run and timed before it gets its name.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressm.errors import ExportError
from compressm.runtime.files import replacing
from compressm.theory.systems import DiagonalSystem

_STEPS = 1000  # of white noise, for the comparison
_TIMED = 1_000_000  # steps
_LARGEST = 100_000  # multiplications in a step: a file of some megabytes


@dataclass(frozen=True)
class CReport:
    """What was written, and what a step of it costs.

    Attributes:
        path: the file.
        order, inputs, outputs: dimensions of the system.
        multiplications: in one step, each with an addition.
        state_bytes, constant_bytes: memory of the state and of the coefficients, in float32.
        max_error: largest difference from double precision over 1000 steps of white noise, as a share of the largest
            output; None where there is no compiler.
        nanoseconds: of one step on this machine, compiled by ``cc -O2``; None where there is no compiler.
    """

    path: str
    order: int
    inputs: int
    outputs: int
    multiplications: int
    state_bytes: int
    constant_bytes: int
    max_error: float | None
    nanoseconds: float | None

    def __str__(self) -> str:
        measured = "not compiled: no cc on this machine"
        if self.max_error is not None and self.nanoseconds is not None:
            measured = f"{self.nanoseconds:.0f} ns a step here, error {self.max_error:.1e} of the largest output"
        return (
            f"{self.path}: order {self.order}, {self.multiplications} multiplications a step, {self.state_bytes} bytes "
            f"of state, {self.constant_bytes} bytes of constants; {measured}"
        )


def to_c(system: DiagonalSystem, path: str | os.PathLike[str], *, name: str | None = None) -> CReport:
    """Write a real system as C99 in single precision: ``void NAME_step(NAME_state *state, const float *u, float *y)``.

    A step computes ``y = C x + D u`` and then ``x = A x + B u``, with the matrices of `DiagonalSystem.to_abcd`. Zeros
    are left out, so a step costs about ``(p + q + 2) n`` multiplications for order n. A state of zeros is the start.
    ``u`` and ``y`` may be the same array.

    Args:
        system: a system of real output, of discrete time.
        path: the file, ``.c``; its folder exists.
        name: of the functions; by default the file's.

    Raises:
        ExportError: a system of complex output, one that is too large, a name that C does not know, a file that cannot
            be written, or code that computes something else.
    """
    path = Path(path)
    name = path.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ExportError(f"name {name!r} is no name in C: pass name= with letters, digits and _ only")
    if not system.real_output:
        raise ExportError("the system has a complex output: to_c writes real systems; take its real and imaginary part")
    matrices = system.to_abcd()
    rows = _statements(*matrices)
    if len(rows.terms) > _LARGEST:
        raise ExportError(f"a step has {len(rows.terms):,} multiplications: reduce the system first")
    text = _source(name, rows, matrices, system.dt)
    try:
        error, nanoseconds = _run(text, name, matrices)
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise ExportError(
            f"{path}: cannot be written ({failure.strerror or failure}); choose another file"
        ) from failure
    n, (q, p) = len(matrices[0]), matrices[3].shape
    return CReport(str(path), n, p, q, len(rows.terms), 4 * n, 4 * len(rows.terms), error, nanoseconds)


@dataclass(frozen=True)
class _Statements:
    """The right-hand sides of a step, and all its coefficients."""

    outputs: list[str]
    states: list[str]
    terms: list[float]


def _statements(A: NDArray[Any], B: NDArray[Any], C: NDArray[Any], D: NDArray[Any]) -> _Statements:
    terms: list[float] = []

    def sums(left: NDArray[Any], right: NDArray[Any]) -> list[str]:
        lines: list[str] = []
        for row, inputs in zip(left.astype(np.float32), right.astype(np.float32), strict=True):
            products = [(value, f"x{j}") for j, value in enumerate(row) if value]
            products += [(value, f"u{j}") for j, value in enumerate(inputs) if value]
            terms.extend(float(value) for value, _ in products)
            lines.append(" + ".join(f"{_literal(value)} * {factor}" for value, factor in products) or "0.0f")
        return lines

    return _Statements(sums(C, D), sums(A, B), terms)


def _literal(value: float) -> str:
    """A float32 constant in C that reads back exactly."""
    text = f"{float(value):.9g}"
    return (text if any(mark in text for mark in ".e") else text + ".0") + "f"


def _source(name: str, rows: _Statements, matrices: Sequence[NDArray[Any]], dt: float) -> str:
    n, (q, p) = len(matrices[0]), matrices[3].shape
    read = set(re.findall(r"[xu]\d+", " ".join([*rows.outputs, *rows.states])))
    lines = [
        f"/* Linear system of order {n}, inputs {p}, outputs {q}, sampling time {dt:g} s; written by compressm.",
        f"   Call {name}_step once per sample. Start from a state of zeros. */",
        "",
        f"typedef struct {{ float x[{n}]; }} {name}_state;",
        "",
        f"void {name}_step({name}_state *state, const float *u, float *y)",
        "{",
        *(f"    const float x{i} = state->x[{i}];" for i in range(n) if f"x{i}" in read),
        *(f"    const float u{i} = u[{i}];" for i in range(p) if f"u{i}" in read),  # y may be the same array
        *(f"    y[{i}] = {sum_};" for i, sum_ in enumerate(rows.outputs)),
        *(f"    state->x[{i}] = {sum_};" for i, sum_ in enumerate(rows.states)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _run(text: str, name: str, matrices: Sequence[NDArray[Any]]) -> tuple[float | None, float | None]:
    """The error and the time of the compiled code; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None, None
    with tempfile.TemporaryDirectory(prefix="compressm-c-") as folder:
        source, library = Path(folder) / "step.c", Path(folder) / "step.so"
        repeat = (
            f"void repeat({name}_state *s, const float *u, float *y, long n) {{ while (n--) {name}_step(s, u, y); }}"
        )
        source.write_text(f"{text}{repeat}\n", encoding="utf-8")
        command = [compiler, "-std=c99", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(f"cc does not compile the code: {done.stderr.strip().partition(chr(10))[0]}")
        compiled = ctypes.CDLL(str(library))
        error, nanoseconds = (
            _error(getattr(compiled, f"{name}_step"), matrices),
            _nanoseconds(compiled.repeat, matrices),
        )
    if not error <= 1e-2:
        raise ExportError(
            f"in single precision the outputs differ by {error:.1e} of the largest one: poles are too close to the "
            "unit circle for float32; use a longer sampling time, or reduce the order"
        )
    return error, nanoseconds


def _error(step: Callable[..., Any], matrices: Sequence[NDArray[Any]]) -> float:
    """Largest difference from double precision over white noise, as a share of the largest output."""
    A, B, C, D = matrices
    inputs = np.random.default_rng(0).standard_normal((_STEPS, D.shape[1])).astype(np.float32)
    state, y = np.zeros(len(A), np.float32), np.zeros(D.shape[0], np.float32)
    x, difference, largest = np.zeros(len(A)), 0.0, 0.0
    for u in inputs:
        expected = C @ x + D @ u
        x = A @ x + B @ u
        step(*(array.ctypes.data_as(ctypes.c_void_p) for array in (state, u, y)))
        difference = max(difference, float(np.abs(y - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return difference / largest if largest else difference


def _nanoseconds(repeat: Callable[..., Any], matrices: Sequence[NDArray[Any]]) -> float:
    """The time of a step, from many of them within one call."""
    A, _, _, D = matrices
    arrays = (np.zeros(len(A), np.float32), np.ones(D.shape[1], np.float32), np.zeros(D.shape[0], np.float32))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    start = time.perf_counter_ns()
    repeat(*pointers, ctypes.c_long(_TIMED))
    return (time.perf_counter_ns() - start) / _TIMED


__all__ = ["CReport", "to_c"]
