"""Builders of systems by property, independent oracles, and launchers of processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from compressm.layers import LRU
from compressm.theory.recurrence import Signals
from compressm.theory.systems import DiagonalSystem

EPS = torch.finfo(torch.float64).eps


def random_system(
    seed: int, n: int = 8, p: int = 3, q: int = 2, radius: tuple[float, float] = (0.3, 0.98), real_output: bool = True
) -> DiagonalSystem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    size = radius[0] + (radius[1] - radius[0]) * torch.rand(n, dtype=torch.float64, generator=generator)
    phase = 2 * torch.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    return DiagonalSystem(torch.polar(size, phase), normal(n, p), normal(q, n), real_output)


def real_matrices(system: DiagonalSystem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The real system of order 2n that computes Re(C x)."""
    lam, B, C = (x.numpy() for x in (system.lam, system.B, system.C))
    A = np.block([[np.diag(lam.real), -np.diag(lam.imag)], [np.diag(lam.imag), np.diag(lam.real)]])
    return A, np.vstack([B.real, B.imag]), np.hstack([C.real, -C.imag])


def lru(seed: int, d_model: int = 8, d_state: int = 64, r_min: float = 0.9, r_max: float = 0.999) -> LRU:
    torch.manual_seed(seed)
    return LRU(d_model, d_state, r_min=r_min, r_max=r_max)


def random_signals(
    seed: int, batch: int = 2, length: int = 12, d: int = 4, n: int = 5, groups: int = 1, scalar_decay: bool = False
) -> Signals:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rates = torch.ones(1, 1) if scalar_decay else 0.2 + 3 * torch.rand(d, n, generator=generator)
    step = 0.3 * torch.rand(batch, length, d, generator=generator)
    vectors = (normal(batch, length, groups, n) for _ in range(2))
    return Signals(normal(batch, length, d), step, rates, *vectors, normal(batch, length, d))


@st.composite
def degenerate_systems(draw: st.DrawFn, method: str = "real") -> DiagonalSystem:
    """Random systems of ordinary and degenerate kinds; the comments name them."""
    n, p, q = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(
        st.sampled_from(["plain", "real", "repeated", "near", "uncontrollable", "unobservable", "scaled", "zero"])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    closest = draw(st.floats(0.05, 6.0))  # |lam| up to 1 - 1e-6
    size = 1 - 10 ** (-closest * torch.rand(n, dtype=torch.float64, generator=generator))
    phase = 2 * torch.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    lam = torch.polar(size, phase)
    B = torch.randn(n, p, dtype=torch.complex128, generator=generator)
    C = torch.randn(q, n, dtype=torch.complex128, generator=generator)
    if kind == "real":  # real eigenvalues of both signs, each a complex state of its own
        lam = (size * torch.sign(torch.cos(phase))).to(torch.complex128)
    elif kind == "repeated":
        lam = lam[:1].expand(n).clone()
    elif kind == "near":  # almost a Jordan block
        lam = lam[0] * (1 - 1e-9 * torch.arange(n, dtype=torch.float64))
    elif kind == "uncontrollable":
        B[: (n + 1) // 2] = 0
        if p > 1:
            B[:, 0] = 0
    elif kind == "unobservable":
        C[:, : (n + 1) // 2] = 0
        if q > 1:
            C[0] = 0
    elif kind == "scaled":
        B, C = B * 1e-9, C * 1e7
    elif kind == "zero":
        B = torch.zeros_like(B)
    return DiagonalSystem(lam, B, C, real_output=method == "real" or draw(st.booleans()))


def torchrun(processes: int, script: Path, *arguments: Any, cwd: Path | None = None) -> str:
    """Run a script in several processes on gloo, and return its output. Assert that none of them fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [*command, str(Path(__file__).parent / "leave_quickly.py"), str(script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=900,  # starting processes is slow on a busy machine
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def spawned(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call a module's function with its rank and arguments in several processes. Assert that none of them fails.

    They leave without the interpreter's own end, see `leave_quickly`.
    """
    torch.multiprocessing.spawn(_call_and_leave, (function, *arguments), nprocs=processes)


def _call_and_leave(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    function(rank, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def forkserver() -> ForkServerContext:
    """Makes processes that have everything imported already, and nothing else of this one's state.

    A process has one such server for all its tests, and what that imports is settled by whoever starts it first: with
    another list of imports, every process that is made later would spend seconds on what is missing from it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["compressm.lab.runs.loop", "compressm.cli", "typer", "sklearn.datasets", "torch._dynamo"]
    )
    return context


def newest_checkpoint(folder: Path) -> Path:
    """The folder of a run's newest checkpoint."""
    return max((folder / "checkpoints").glob("step-*"))
