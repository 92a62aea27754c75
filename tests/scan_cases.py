"""Every public scan with random arguments, its engines, and its definition as a loop that shares no code with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressm.scans import delta_scan, gla_scan, lti_scan, selective_scan, siso_scan, ssd_scan

BATCH, LENGTH = 2, 7


def lti(u: Tensor, log_radius: Tensor, phase: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    B_re, B_im, C_re, C_im, start = others
    lam = torch.polar(log_radius.exp(), phase)
    B, C, x, ys = torch.complex(B_re, B_im), torch.complex(C_re, C_im), torch.complex(*start.unbind(1)), []
    for t in range(u.shape[1]):
        x = lam * x + u[:, t].to(B.dtype) @ B.T
        ys.append((x @ C.T).real)
    return torch.stack(ys, 1), torch.stack([x.real, x.imag], 1)


def siso(u: Tensor, log_radius: Tensor, phase: Tensor, c_re: Tensor, c_im: Tensor, start: Tensor) -> Any:
    lam, c, x, ys = torch.polar(log_radius.exp(), phase), torch.complex(c_re, c_im), torch.complex(*start.unbind(1)), []
    for t in range(u.shape[1]):
        x = lam * x + u[:, t, :, None]
        ys.append((c * x).sum(-1).real)
    return torch.stack(ys, 1), torch.stack([x.real, x.imag], 1)


def selective(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(u.shape[1]):
        h = (delta[:, t, :, None] * A).exp() * h + (delta * u)[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1), h


def ssd(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    ys, repeats = [], x.shape[2] // B.shape[2]
    for t in range(x.shape[1]):
        keys, queries = B[:, t].repeat_interleave(repeats, 1), C[:, t].repeat_interleave(repeats, 1)
        S = log_decay[:, t].exp()[..., None, None] * S + x[:, t, ..., None] * keys[..., None, :]
        ys.append((S * queries[..., None, :]).sum(-1))
    return torch.stack(ys, 1), S


def gla(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(x.shape[1]):
        S = log_decay[:, t].exp()[..., None, :] * S + x[:, t, ..., None] * B[:, t, ..., None, :]
        ys.append((S * C[:, t, ..., None, :]).sum(-1))
    return torch.stack(ys, 1), S


def delta(v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    ys, eye = [], torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(v.shape[1]):
        share, key = beta[:, t, :, None, None], k[:, t, ..., None, :]
        erased = eye - share * key.transpose(-1, -2) @ key
        S = log_decay[:, t].exp()[..., None, None] * S @ erased + share * v[:, t, ..., None] * key
        ys.append((S * q[:, t, ..., None, :]).sum(-1))
    return torch.stack(ys, 1), S


DEFINITIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lti": lti, "siso": siso, "selective": selective, "ssd": ssd, "gla": gla, "delta": delta,
}  # fmt: skip
SCANS: dict[str, Callable[..., Any]] = {
    "lti": lti_scan, "siso": siso_scan, "selective": selective_scan, "ssd": ssd_scan, "gla": gla_scan,
    "delta": delta_scan,
}  # fmt: skip
ENGINES: list[tuple[str, str]] = [
    *(("lti", engine) for engine in ("auto", "direct", "chunked", "fft", "loop")),
    *(("selective", engine) for engine in ("auto", "native", "torch", "loop")),
    *((name, engine) for name in ("siso", "ssd", "gla", "delta") for engine in ("chunked", "loop")),
    *((name, "native") for name in ("ssd", "gla", "delta")),
]
STATELESS = ("fft",)
# Which argument says how much is forgotten, as the logarithm of a decay.
LOG_DECAY = {"lti": 1, "siso": 1, "ssd": 1, "gla": 1, "delta": 1}


def arguments(name: str, length: int = LENGTH, batch: int = BATCH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Arguments of the scan called so, the initial state last."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    steps, heads, p, n = (batch, length), 2, 3, 4
    if name == "lti":
        drawn = [
            draw(*steps, p), -0.3 * draw(n).abs(), draw(n), *(draw(n, p) for _ in "BB"), *(draw(2, n) for _ in "CC"),
            draw(batch, 2, n),
        ]  # fmt: skip
    elif name == "siso":
        drawn = [draw(*steps, p), -0.3 * draw(p, n).abs(), *(draw(p, n) for _ in "pcc"), draw(batch, 2, p, n)]
    elif name == "selective":
        drawn = [
            draw(*steps, p), 0.3 * draw(*steps, p).abs(), -draw(p, n).abs(), draw(*steps, n), draw(*steps, n),
            draw(batch, p, n),
        ]  # fmt: skip
    elif name == "delta":
        k = draw(*steps, heads, n)
        drawn = [
            draw(*steps, heads, p), -0.3 * draw(*steps, heads).abs(), draw(*steps, heads).sigmoid(),
            k / k.norm(dim=-1, keepdim=True), draw(*steps, heads, n), draw(batch, heads, p, n),
        ]  # fmt: skip
    else:
        decays = (heads, n) if name == "gla" else (heads,)
        groups = heads if name == "gla" else 1
        drawn = [
            draw(*steps, heads, p), -0.3 * draw(*steps, *decays).abs(), draw(*steps, groups, n),
            draw(*steps, groups, n), draw(batch, heads, p, n),
        ]  # fmt: skip
    return [tensor.to(dtype) for tensor in drawn]


def run(name: str, engine: str, args: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs and last state of a scan; outputs alone, from state zero, by an engine without states."""
    if engine in STATELESS:
        return (SCANS[name](*args[:-1], engine=engine),)
    return SCANS[name](*args, return_state=True, engine=engine)


def defined(name: str, engine: str, args: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What `run` must return."""
    if engine in STATELESS:
        return DEFINITIONS[name](*args[:-1], torch.zeros_like(args[-1]))[:1]
    return DEFINITIONS[name](*args)
