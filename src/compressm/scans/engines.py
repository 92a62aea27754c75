"""Which kernel runs a scan on a CUDA device: one table, in order of preference, with the reason for each row.

The first row whose package is installed and which takes the call is used; ``engine=`` of a scan forces a row by its
name. Where no row takes it, the scan runs in the form that it has for every device.

Kernels of other packages have no second derivatives. Force ours (``"triton"``) or ``"chunked"`` where you need them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressm.scans.graph import exporting
from compressm.scans.transforms import transformed

Kernel = Callable[..., tuple[Tensor, Tensor]]
"""From the scan's tensors, the initial state last, to outputs and last state."""


@dataclass(frozen=True)
class Call:
    """What a row decides by.

    Attributes:
        dtype: of the inputs.
        n: states.
        initial: whether there is an initial state.
        last: whether the last state is asked for.
    """

    dtype: torch.dtype
    n: int
    initial: bool = False
    last: bool = False

    @property
    def half(self) -> bool:
        """Whether the inputs are in half precision."""
        return self.dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """A kernel for a scan.

    Attributes:
        scan: ``"ssd"``, ``"selective"``, ``"gla"`` or ``"delta"``.
        engine: its name, and of the package that it comes from.
        module, function: where it is found.
        run: calls that function, given first, on our tensors.
        takes: whether it can run a call.
        reason: why it is here, and what it does not take.
    """

    scan: str
    engine: str
    module: str
    function: str
    run: Callable[..., tuple[Tensor, Tensor]]
    takes: Callable[[Call], bool]
    reason: str


def cuda_kernel(scan: str, engine: str, u: Tensor, n: int, initial: bool, last: bool) -> Kernel | None:
    """The kernel for a call of a scan; None where the scan's own forms decide.

    Args:
        scan: see `Row`.
        engine: ``"auto"``, or what the caller forces.
        u: the input of the scan.
        n: states.
        initial, last: see `Call`.

    Raises:
        ValueError: the engine that is forced is not installed, or does not take the call.
    """
    forced = engine in NAMES[scan]
    if not forced and (engine != "auto" or not u.is_cuda or exporting() or transformed()):
        return None
    rows, call = [row for row in TABLE if row.scan == scan], Call(u.dtype, n, initial, last)
    if forced:
        return _forced(next(row for row in rows if row.engine == engine), call)
    for row in rows:
        if row.takes(call) and (function := _function(row.module, row.function)) is not None:
            return functools.partial(row.run, function)
    return None


def _forced(row: Row, call: Call) -> Kernel:
    function = _function(row.module, row.function)
    if function is None:
        raise ValueError(f'engine="{row.engine}" needs {row.module}: pip install {_PACKAGES[row.engine]}')
    if not row.takes(call) and not (row.engine == "fla" and call.dtype == torch.float32):  # TF32, if one asks for it
        raise ValueError(f'engine="{row.engine}" does not take this call ({row.reason}); leave engine out')
    return functools.partial(row.run, function)


_PACKAGES = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm", "triton": "triton"}


@functools.cache
def _function(module: str, name: str) -> Any:
    """A function of an optional package; None without the package."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError):  # also where it is built for another version of PyTorch
        return None


def _by_fla(function: Any, sequences: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Call a chunk kernel of fla: scale 1, time before heads, and states with keys before values."""
    # Before its version 0.4, heads came before time unless told otherwise.
    older = {"head_first": False} if "head_first" in inspect.signature(function).parameters else {}
    y, last = function(
        **sequences, scale=1.0, initial_state=state.float().mT.contiguous(), output_final_state=True, **older
    )
    return y, last.mT


def _finite(log_decay: Tensor) -> Tensor:
    """Decays for fla, which takes differences of their running sums: exp(-100) is zero in float32."""
    return log_decay.float().clamp_min(-100.0)


def _ssd_by_fla(
    function: Any, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    repeats = x.shape[2] // B.shape[2]
    k, q = (tensor.repeat_interleave(repeats, 2) for tensor in (B, C))
    return _by_fla(function, {"q": q, "k": k, "v": x, "g": _finite(log_decay)}, state)


def _gla_by_fla(
    function: Any, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return _by_fla(function, {"q": C, "k": B, "v": x, "g": _finite(log_decay)}, state)


def _delta_by_fla(
    function: Any, v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return _by_fla(function, {"q": q, "k": k, "v": v, "g": _finite(log_decay), "beta": beta}, state)


def _selective_by_mamba(
    function: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Time last, B and C of the dtype of u; the state is not an argument, and zero."""
    u, delta, B, C = (tensor.to(u.dtype).mT.contiguous() for tensor in (u, delta, B, C))
    return function(u, delta, A.float(), B, C).mT, state


def _ours(function: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return function(*tensors)


_TF32 = "half precision only, since its products in float32 are TF32"
TABLE = (
    Row(
        "ssd", "fla", "fla.ops.simple_gla", "chunk_simple_gla", _ssd_by_fla, lambda call: call.half,
        f"people train with it, and it takes any decay; {_TF32}. mamba_ssm's chunk scan is not here: it takes decay "
        "and input from one step size, so a decay of 1 would divide by zero",
    ),
    Row(
        "ssd", "triton", "compressm.scans.triton_ssd", "ssd_scan_triton", _ours,
        lambda call: call.half or call.dtype == torch.float32, "ours, in one pass over memory; not float64",
    ),
    Row(
        "selective", "mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", _selective_by_mamba,
        lambda call: call.dtype != torch.float64 and call.n <= 256 and not call.initial and not call.last,
        "what people train with; no initial state, no gradient of the last one, at most 256 states, not float64",
    ),
    Row(
        "selective", "triton", "compressm.scans.triton_selective", "selective_scan_triton", _ours, lambda call: True,
        "ours; takes everything",
    ),
    Row(
        "gla", "fla", "fla.ops.gla", "chunk_gla", _gla_by_fla, lambda call: call.half,
        f"people train with it; {_TF32}; otherwise matrix products of PyTorch, which run on every device",
    ),
    Row(
        "delta", "fla", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _delta_by_fla, lambda call: call.half,
        f"people train with it, with a decay of 1 for the rule without a gate; {_TF32}",
    ),
)  # fmt: skip


# The engines of the table by scan, as a plain constant, which torch.compile reads at no cost.
NAMES = {scan: tuple(row.engine for row in TABLE if row.scan == scan) for scan in ("ssd", "selective", "gla", "delta")}

__all__ = ["NAMES", "TABLE", "Call", "Kernel", "Row", "cuda_kernel"]
