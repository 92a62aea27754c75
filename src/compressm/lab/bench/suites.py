"""What is compared: the rows of every suite, and the points of the sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from compressm.lab.bench import roofline, steps
from compressm.lab.bench.rows import Case, Side

_OURS, _TORCH, _JAX = "compressm.lab.bench.ours", "compressm.lab.bench.peers_torch", "compressm.lab.bench.peers_jax"
_HF, _PYMOR = "compressm.lab.bench.peers_hf", "compressm.lab.bench.peers_pymor"
_FLA = "compressm.lab.bench.peers_fla"
_MAMBA2 = "compressm.lab.bench.mamba2_training"
_STEPS, _ONNX = "compressm.lab.bench.steps", "compressm.lab.bench.peers_onnx"

JAX = "JAX/Equinox, associative scan"
LOOP = "PyTorch, loop over time"
HF = "transformers, slow path"
FLA = "flash-linear-attention, plain"
FFT = "PyTorch, the whole kernel and FFT"
DIRECT = "PyTorch, conv1d"
ONNX = "ONNX Runtime, the same step"

_QUICK_STEPS = ("lru", "mamba", "mamba2", "gla", "gated-delta-net")

_SMNIST: dict[str, int] = {"width": 8, "layers": 1, "batch": 50, "length": 784}
_DEEP: dict[str, int] = {"width": 64, "layers": 6, "batch": 16, "length": 1024}
_WIDE: dict[str, int] = {"width": 256, "layers": 6, "batch": 8, "length": 1024}


def lru(device: str) -> Iterator[Case]:
    """Training steps of LRU classifiers, and the scan alone."""
    for name, n, sizes in (
        ("lru/smnist-n256", 256, _SMNIST),
        ("lru/smnist-n28", 28, _SMNIST),
        ("lru/6x64-n128", 128, _DEEP),
        ("lru/6x256-n384", 384, _WIDE),
        ("lru/6x256-n93", 93, _WIDE),
    ):
        yield _lru_step(name, n, sizes, device)
    small, large = (_lru_step("", n, _WIDE, device) for n in (93, 384))
    yield Case("lru/6x256-n384-over-n93", small.ours, "ours at n = 384", large.ours, small.work)
    slow, fast = (_lru_step("", 256, _SMNIST, device, radius=radius) for radius in ([0.99, 0.999], [0.5, 0.9]))
    yield Case("lru/no-denormals", slow.ours, "ours with |lam| in [0.5, 0.9], not [0.99, 0.999]", fast.ours, slow.work)
    for n, width in ((256, 8), (128, 64)):
        sizes: dict[str, Any] = {"n": n, "width": width, "batch": 16, "length": 784}
        work = roofline.lti_training(sizes["batch"], sizes["length"], n, width, width)
        arguments = {**sizes, "device": device}
        yield Case(
            f"lru/scan-n{n}-h{width}",
            Side(f"{_OURS}:lti", arguments),
            LOOP,
            Side(f"{_TORCH}:lti_loop", arguments),
            work,
        )


def _lru_step(name: str, n: int, sizes: dict[str, int], device: str, **more: Any) -> Case:
    arguments = {"n": n, **sizes, **more, "device": device}
    return Case(
        name,
        Side(f"{_OURS}:lru_training_step", arguments),
        JAX,
        Side(f"{_JAX}:lru_training_step", arguments),
        roofline.lru_training_step(n=n, **sizes),
    )


def channels(device: str) -> Iterator[Case]:
    """One system, or one filter, per channel, forward and backward: S4D's scan, and the convolution of S4 and Hyena."""
    sizes = {"d": 128, "batch": 8, "length": 1024, "device": device}
    for n in (16, 64):
        ours, work = Side(f"{_OURS}:siso", {"n": n, **sizes}), 128 * roofline.lti_training(8, 1024, n, 1, 1)
        case = Case(f"channels/s4d-n{n}", ours, FFT, Side(f"{_TORCH}:siso_fft", ours.arguments), work)
        yield case
        yield _against(case, "loop", LOOP, f"{_TORCH}:siso_loop")
    for length in (1024, 4096):
        ours = Side(f"{_OURS}:convolution", {**sizes, "length": length})
        work, peer = roofline.convolution_training(8, length, 128), Side(f"{_TORCH}:convolution_direct", ours.arguments)
        yield Case(f"channels/convolution-l{length}", ours, DIRECT, peer, work)


def selective(device: str) -> Iterator[Case]:
    """Mamba's scan, forward and backward, alone and inside a mixer."""
    cases = {n: _selective(f"selective/scan-n{n}", n, device) for n in (128, 64, 16, 12)}
    yield from cases.values()
    yield Case("selective/n128-over-n12", cases[12].ours, "ours at n = 128", cases[128].ours, cases[12].work)
    yield replace(_against(cases[16], "hf", HF, f"{_HF}:selective"), brief=False)
    sizes = {"n": 16, "d": 128, "batch": 8, "length": 784, "device": device}
    yield Case(
        "selective/mixer-n16-hf",
        Side(f"{_HF}:mamba_mixer", {**sizes, "scan": "ours"}),
        "transformers' MambaMixer, slow path; ours: the same mixer with our scan in it",
        Side(f"{_HF}:mamba_mixer", {**sizes, "scan": "theirs"}),
        cases[16].work,
        brief=False,
    )


def _selective(name: str, n: int, device: str, batch: int = 8, length: int = 784, d: int = 128) -> Case:
    arguments = {"n": n, "d": d, "batch": batch, "length": length, "device": device}
    work = roofline.selective_training(batch, length, d, n)
    return Case(name, Side(f"{_OURS}:selective", arguments), LOOP, Side(f"{_TORCH}:selective_loop", arguments), work)


def ssd(device: str) -> Iterator[Case]:
    """Mamba-2's scan, forward and backward, alone and inside a mixer."""
    for heads, p in ((4, 64), (8, 32)):
        for n in (16, 64, 128):
            case = _ssd(f"ssd/scan-n{n}-heads{heads}-p{p}", n, device, heads=heads, p=p)
            yield case
            if n == 64:
                yield Case(
                    f"{case.name}-loop", case.ours, LOOP, Side(f"{_TORCH}:ssd_loop", case.ours.arguments), case.work
                )
    sizes = {"n": 64, "heads": 4, "p": 64, "batch": 8, "length": 1024, "device": device}
    yield Case(
        "ssd/mixer-n64-hf",
        Side(f"{_HF}:mamba2_mixer", {**sizes, "scan": "ours"}),
        "transformers' Mamba2Mixer, torch path; ours: the same mixer with our scan in it",
        Side(f"{_HF}:mamba2_mixer", {**sizes, "scan": "theirs"}),
        roofline.mamba2_mixer_training(8, 1024, 4, 64, 64),
    )


def _ssd(name: str, n: int, device: str, batch: int = 8, length: int = 1024, heads: int = 4, p: int = 64) -> Case:
    arguments = {"n": n, "heads": heads, "p": p, "batch": batch, "length": length, "device": device}
    work = roofline.ssd_training(batch, length, heads, p, n)
    return Case(name, Side(f"{_OURS}:ssd", arguments), HF, Side(f"{_HF}:ssd", arguments), work)


def gla(device: str) -> Iterator[Case]:
    """Gated linear attention's scan, forward and backward."""
    for heads, p in ((4, 64), (8, 32)):
        for n in (16, 64, 128):
            case = _gla(f"gla/scan-n{n}-heads{heads}-p{p}", n, device, heads=heads, p=p)
            yield case
            if n == 64:
                yield _against(case, "fla", FLA, f"{_FLA}:gla")


def _gla(name: str, n: int, device: str, batch: int = 8, length: int = 1024, heads: int = 4, p: int = 64) -> Case:
    arguments = {"n": n, "heads": heads, "p": p, "batch": batch, "length": length, "device": device}
    work = roofline.gla_training(batch, length, heads, p, n)
    return Case(name, Side(f"{_OURS}:gla", arguments), LOOP, Side(f"{_TORCH}:gla_loop", arguments), work)


def delta(device: str) -> Iterator[Case]:
    """The scan of the delta rule, with and without a decay, forward and backward."""
    for gated, heads, p in ((True, 4, 64), (True, 8, 32), (False, 4, 64), (False, 8, 32)):
        for n in (16, 64, 128):
            kind = "gated" if gated else "plain"
            case = _delta(f"delta/{kind}-n{n}-heads{heads}-p{p}", n, device, gated, heads=heads, p=p)
            case = replace(case, brief=gated or n == 64)
            yield case
            if n == 64:
                yield _against(case, "fla", FLA, f"{_FLA}:delta")
                yield _against(case, "loop", LOOP, f"{_TORCH}:delta_loop")


def _delta(
    name: str, n: int, device: str, gated: bool = True, batch: int = 8, length: int = 1024, heads: int = 4, p: int = 64
) -> Case:
    arguments = {"n": n, "heads": heads, "p": p, "batch": batch, "length": length, "gated": gated, "device": device}
    work = roofline.delta_training(batch, length, heads, p, n, gated)
    return Case(name, Side(f"{_OURS}:delta", arguments), HF, Side(f"{_HF}:delta", arguments), work)


def _against(case: Case, ending: str, peer: str, build: str) -> Case:
    """The same row against another peer."""
    return replace(case, name=f"{case.name}-{ending}", peer=peer, peer_side=Side(build, case.ours.arguments))


def reduction(device: str) -> Iterator[Case]:
    """One reduction of one LRU layer, on the CPU."""
    for n, width, states in ((256, 8, 32), (512, 512, 64)):
        arguments = {"n": n, "width": width, "states": states}
        yield Case(
            f"reduction/n{n}-h{width}-to-{states}",
            Side(f"{_OURS}:reduction", arguments),
            "pyMOR, BTReductor on the same real system",
            Side(f"{_PYMOR}:reduction", arguments),
            roofline.reduction(n, states),
            brief=n < 512,
        )


def train(device: str) -> Iterator[Case]:
    """A narrow LRU model, full and compressed: a step before and after the cut, and a whole run."""
    sizes: dict[str, int] = {"width": 16, "layers": 1, "batch": 50, "length": 64}
    arguments = {"n": 128, **sizes, "device": device}
    yield Case(
        "train/step-after-cut",
        Side(f"{_OURS}:lru_training_step", {**arguments, "cut_to": 24}),
        "ours before the cut, 128 states",
        Side(f"{_OURS}:lru_training_step", arguments),
        roofline.lru_training_step(n=24, **sizes),
    )
    steps = 400
    run: dict[str, int] = {"n": 128, "width": 16, "steps": steps}
    small, large = (roofline.lru_training_step(n=n, **sizes) for n in (24, 128))
    yield Case(
        "train/run-400-steps-shrunk",
        Side(f"{_OURS}:training_run", {**run, "cut_to": 24}),
        "ours without a cut, 128 states all the way",
        Side(f"{_OURS}:training_run", run),
        0.9 * steps * small + 0.1 * steps * large,
    )


def mamba2(device: str) -> Iterator[Case]:
    """A Mamba-2 language model of transformers, cut from 128 states to 16: a step before and after the cut, and a whole
    training, cut included, beside transformers' own path."""
    model = {"heads": 4, "p": 64, "layers": 2, "batch": 4, "length": 512}
    step, run = f"{_MAMBA2}:training_step", f"{_MAMBA2}:training_run"

    def sides(n: int, cut_to: int | None, function: str, **more: Any) -> tuple[Side, Side]:
        arguments = {"n": n, "cut_to": cut_to, **model, **more}
        ours, theirs = (Side(function, {**arguments, "scan": scan}) for scan in ("ours", "theirs"))
        return ours, theirs

    small, large = (roofline.mamba2_model_training_step(n=n, vocabulary=256, **model) for n in (16, 128))
    full, full_hf = sides(128, None, step, device=device)
    cut, cut_hf = sides(128, 16, step, device=device)
    yield Case("mamba2/step-n128-hf", full, HF, full_hf, large)
    yield Case("mamba2/step-cut-to-16-hf", cut, HF, cut_hf, small)
    yield Case("mamba2/step-cut-to-16", cut, "ours before the cut, 128 states", full, small)
    steps = 40  # on the CPU whatever the device
    run_cut, _ = sides(128, 16, run, steps=steps)
    run_full, run_hf = sides(128, None, run, steps=steps)
    work = 0.9 * steps * small + 0.1 * steps * large
    yield Case("mamba2/run-40-steps-cut-to-16", run_cut, "ours without a cut, 128 states", run_full, work)
    yield Case("mamba2/run-40-steps-cut-to-16-hf", run_cut, f"{HF}, without a cut", run_hf, work)


def step(device: str) -> Iterator[Case]:
    """A thousand tokens, one after the other, before and after a cut from 64 states to 16: ms are µs per token.

    On the CPU whatever the device, since ONNX Runtime is the peer there. Compiling takes most of a row's time, so that
    a quick run has one sequence of five families only.
    """
    for family in steps.STEPPED:
        for n in (64, 16):
            for batch in (1, 8):
                sizes: dict[str, Any] = {"family": family, "n": n, "batch": batch}
                work, peer = steps.work(family, n, batch), Side(f"{_ONNX}:stepped", sizes)
                name = f"step/{family}-n{n}-b{batch}"
                compiled, brief = {**sizes, "compiled": True}, batch == 1 and family in _QUICK_STEPS
                yield Case(name, Side(f"{_STEPS}:stepped", sizes), ONNX, peer, work, brief=False)
                yield Case(f"{name}-compiled", Side(f"{_STEPS}:stepped", compiled), ONNX, peer, work, brief)


SUITES: dict[str, Callable[[str], Iterator[Case]]] = {
    "lru": lru,
    "channels": channels,
    "selective": selective,
    "ssd": ssd,
    "gla": gla,
    "delta": delta,
    "reduction": reduction,
    "train": train,
    "mamba2": mamba2,
    "step": step,
}


@dataclass(frozen=True)
class Point:
    """A row of a sweep: time against one size, the others kept."""

    suite: str
    axis: str
    value: int
    case: Case


def sweep(suite: str, device: str) -> Iterator[Point]:
    """Points over state dimension, length and batch around a middle size; none for suites without a scan."""
    matrix = {"n": 64, "length": 1024, "batch": 4}
    middle = {"lru": {"n": 64, "length": 784, "batch": 8}, "selective": {"n": 16, "length": 512, "batch": 4},
              "ssd": matrix, "gla": matrix, "delta": matrix}.get(suite)  # fmt: skip
    if middle is None:
        return
    axes = {"n": (8, 16, 32, 64, 128, 256), "length": (64, 128, 256, 512, 1024, 2048), "batch": (1, 2, 4, 8, 16, 32)}
    for axis, values in axes.items():
        for value in values:
            sizes: dict[str, int] = {**middle, axis: value}
            name = f"{suite}/sweep-{axis}{value}"
            if suite == "lru":
                n = sizes.pop("n")
                case = _lru_step(name, n, {"width": 8, "layers": 1, **sizes}, device)
            elif suite == "selective":
                case = _selective(name, device=device, **sizes)
            else:
                scans: dict[str, Callable[..., Case]] = {"ssd": _ssd, "gla": _gla, "delta": _delta}
                case = scans[suite](name, device=device, **sizes)
            yield Point(suite, axis, value, case)
