"""The Triton engines: on a CUDA device with ``-m gpu``, and anywhere by Triton's interpreter and compiler.

The interpreter must be chosen before Triton is imported, and PyTorch's compiler imports Triton in its own way: the
interpreted tests run in a process of their own. ``make triton`` installs Triton beside the environment, interprets the
kernels and compiles them; TRITON_JSON names the file for what the compiled kernels need of the device.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressm.scans import selective_scan, ssd_scan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = ("y", "state", "u", "delta", "A", "B", "C", "initial_state")


def on_device(test: Callable[..., None]) -> Any:
    """As a ``gpu`` test on a CUDA device; under the interpreter, as a plain one."""
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(missing(test))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this starts the interpreter")
def test_engines_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " skipped" not in result.stdout, result.stdout[-4000:]


SIZES = {"TILE": 8, "GROUPS": 2, "BLOCK": 4, "LANES": 32, "n": 12}
SSD = {"Q": 64, "BP": 32, "BN": 32, "PRECISION": "tf32"}
SSD32 = {"Q": 32, "BP": 32, "BN": 32, "PRECISION": "tf32x3"}  # of float32
KERNELS = [  # constants as the engines launch them, and warps; all other arguments but sizes are pointers
    ("triton_selective", "_local_kernel", {**SIZES, "REVERSE": False}, 4),
    ("triton_selective", "_local_kernel", {**SIZES, "REVERSE": True}, 4),
    ("triton_selective", "_link_kernel", {"n": 12, "REVERSE": False, "LANES": 128}, 4),
    ("triton_selective", "_link_kernel", {"n": 12, "REVERSE": True, "LANES": 128}, 4),
    ("triton_selective", "_forward_kernel", {**SIZES, "KEEP": 64}, 4),
    ("triton_selective", "_forward_kernel", {**SIZES, "KEEP": 0}, 4),
    ("triton_selective", "_backward_kernel", {**SIZES, "KEEP": 64}, 4),
    ("triton_chain", "_forward_kernel", {"TILE": 16, "LANES": 32}, 1),
    ("triton_chain", "_backward_kernel", {"TILE": 16, "LANES": 32}, 1),
    *(
        ("triton_ssd", name, {**constants, **more}, 8)
        for constants in (SSD, SSD32)
        for name, more in (
            ("_chain_kernel", {"REVERSE": False}),
            ("_chain_kernel", {"REVERSE": True}),
            ("_outputs_kernel", {}),
            ("_values_kernel", {}),
            ("_keys_kernel", {}),
        )
    ),
]


def compiled(module: str, name: str, constants: dict[str, Any], warps: int, capability: int) -> Any:
    """A kernel for a CUDA device of this compute capability (80 is 8.0), which need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"compressm.scans.{module}"), name)
    types = dict.fromkeys(("length", "d", "n", "segment", "parts", "heads", "groups", "p"), "i32") | dict.fromkeys(
        constants, "constexpr"
    )
    narrow = ("inputs", "delta", "vectors", "u", "x", "B", "C", "y", "grad_y", "grad_u", "grad_x", "grad_delta")
    narrow = () if constants.get("PRECISION") == "tf32x3" else (*narrow, "values", "keys")
    pointers = {a: "*bf16" if a in narrow else "*fp32" for a in kernel.arg_names if a not in types}
    signature = {a: {**types, **pointers}[a] for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True} | ({"num_stages": 1} if module == "triton_ssd" else {})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def needs(cubin: bytes, folder: Path) -> dict[str, int]:
    """What one thread of a compiled kernel needs, as NVIDIA's own tool reads it out: registers, and bytes of memory."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"], "local_bytes": found["LOCAL"]}


@pytest.fixture(scope="module")
def record() -> Iterator[list[dict[str, Any]]]:
    """A row for each compiled kernel, stored where TRITON_JSON says."""
    rows: list[dict[str, Any]] = []
    yield rows
    if rows and (target := os.environ.get("TRITON_JSON")):
        import triton

        content = {"triton": triton.__version__, "kernels": rows}
        Path(target).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("module", "name", "constants", "warps"), KERNELS)
def test_kernels_compile_without_a_device(
    module: str,
    name: str,
    constants: dict[str, Any],
    warps: int,
    capability: int,
    record: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """To machine code. In the scans step by step, steps do not pass between threads, which only sums over states or
    channels may do."""
    kernel = compiled(module, name, constants, warps, capability)
    with_sums = module == "triton_selective" and name in ("_forward_kernel", "_backward_kernel")
    assert module == "triton_ssd" or ("shfl" in kernel.asm["ptx"]) == with_sums
    assert f".target sm_{capability}" in kernel.asm["ptx"]
    found = needs(kernel.asm["cubin"], tmp_path)
    row = {"kernel": f"{module}.{name}", "constants": constants, "warps": warps, "compute_capability": capability / 10}
    record.append({**row, **found, "shared_bytes": kernel.metadata.shared})
    # Registers that are not enough spill into local memory, which is the device's slow one.
    assert found["stack_bytes"] + found["local_bytes"] <= (96 if module == "triton_ssd" else 0)
    assert kernel.metadata.shared <= 48 * 1024  # what every device gives a program without being asked


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_every_kernel_is_compiled_here() -> None:
    import compressm.scans

    found = set[tuple[str, str]]()
    for info in pkgutil.iter_modules(compressm.scans.__path__):
        if info.name.startswith("triton_"):
            values = vars(importlib.import_module(f"compressm.scans.{info.name}"))
            found |= {(info.name, name) for name in values if name.endswith("_kernel")}
    assert found == {(module, name) for module, name, *_ in KERNELS}


def arguments(
    seed: int, batch: int, length: int, d: int, n: int, smallest: float = 1e-2, largest: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    delta = smallest * (largest / smallest) ** torch.rand(batch, length, d, generator=generator)
    vectors = [normal(batch, length, n) for _ in range(2)]
    return [normal(batch, length, d), delta, -torch.exp(normal(d, n)) * n**0.5, *vectors, normal(batch, d, n)]


def outputs_and_gradients(
    scan: Callable[..., tuple[Tensor, ...]], values: Sequence[Tensor], device: str = "cpu"
) -> list[Tensor]:
    leaves = [value.detach().to(device).requires_grad_() for value in values]
    outputs = scan(*leaves)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    loss = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    return [t.detach().cpu().double() for t in (*outputs, *torch.autograd.grad(loss, leaves))]  # type: ignore[arg-type]


def triton_scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    from compressm.scans.triton_selective import selective_scan_triton

    return selective_scan_triton(*tensors)


def reference(values: Sequence[Tensor]) -> list[Tensor]:
    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*tensors, return_state=True, engine="loop")

    return outputs_and_gradients(scan, [value.double() for value in values])


def assert_close(result: list[Tensor], truth: list[Tensor], values: Sequence[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, truth, result, strict=True):
        limit = tolerance * (1 if name in ("y", "state") else 10)
        # Gradients to A may cancel over the steps: they are held against the size of their terms instead.
        floor = float(values[1].max() * truth[2].norm()) if name == "A" else 1e-30
        assert (b - a).norm() <= limit * max(float(a.norm()), floor), name


@on_device
@pytest.mark.parametrize(
    ("batch", "length", "d", "n", "smallest", "largest"),
    [
        (1, 1, 1, 1, 0.1, 1.0),
        (2, 7, 20, 5, 1e-2, 1.0),
        (1, 33, 1, 12, 1e-2, 1.0),
        (1, 130, 20, 4, 1e-2, 1.0),  # time in parts
        (5, 65, 3, 2, 1e-7, 1e-4),  # time whole
        (1, 20, 70, 17, 1.0, 100.0),  # two blocks of channels, the second in part
    ],
)
def test_selective_scan_equals_a_float64_loop(
    batch: int, length: int, d: int, n: int, smallest: float, largest: float
) -> None:
    values = arguments(0, batch, length, d, n, smallest, largest)
    assert_close(outputs_and_gradients(triton_scan, values, DEVICE), reference(values), values, 1e-5)


def ssd_arguments(batch: int, length: int, heads: int, groups: int, p: int, n: int, strongest: float) -> list[Tensor]:
    """Decays of all orders of magnitude, down to ``exp(-strongest)``, beside each other."""
    generator = torch.Generator().manual_seed(0)
    log_decay = -strongest * torch.rand(batch, length, heads, generator=generator) ** 8
    shapes = [(batch, length, heads, p), (batch, length, groups, n), (batch, length, groups, n), (batch, heads, p, n)]
    x, B, C, state = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x, log_decay, B, C, state]


def ssd_reference(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return ssd_scan(x, log_decay, B, C, state, return_state=True, engine="loop")


@on_device
@pytest.mark.parametrize(
    ("sizes", "strongest", "dtype"),
    [
        ((1, 1, 1, 1, 1, 1), 0.1, torch.float32),
        ((2, 70, 4, 2, 5, 40), 16.0, torch.float32),  # three chunks, groups of heads, two blocks of states
        ((1, 64, 1, 1, 40, 16), 100.0, torch.float32),  # two blocks of values, the second in part
        ((1, 65, 2, 1, 16, 16), 1.0, torch.bfloat16),  # two chunks of 64
    ],
)
def test_ssd_equals_a_float64_loop(sizes: tuple[int, ...], strongest: float, dtype: torch.dtype) -> None:
    from compressm.scans.triton_ssd import ssd_scan_triton

    values = ssd_arguments(*sizes, strongest)
    values = [value.to(dtype) if i in (0, 2, 3) else value for i, value in enumerate(values)]
    truth = outputs_and_gradients(ssd_reference, [value.double() for value in values])
    result = outputs_and_gradients(ssd_scan_triton, values, DEVICE)
    for name, a, b in zip(("y", "state", "x", "log_decay", "B", "C", "initial_state"), truth, result, strict=True):
        assert (b - a).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * a.norm(), name


@on_device
def test_ssd_twice_differentiated() -> None:
    from compressm.scans.triton_ssd import ssd_scan_triton

    args = [value.to(DEVICE).requires_grad_() for value in ssd_arguments(1, 3, 2, 1, 2, 2, 1.0)]

    def second(scan: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(scan(*args)[0].sin().sum(), args, create_graph=True)
        return torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), args)

    for a, b in zip(second(ssd_scan_triton), second(ssd_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@on_device
def test_parts_of_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressm.scans import triton_selective

    values = [value.double() for value in arguments(1, 1, 130, 3, 2, 1e-2, 0.1)]
    results = []
    for segment in (64, 192):
        monkeypatch.setattr(triton_selective, "_parts", lambda u, segment=segment: (-(-130 // segment), segment))
        results.append(outputs_and_gradients(triton_scan, values, DEVICE))
    truth = reference(values)
    for result in results:
        assert_close(result, truth, values, 1e-12)


@on_device
def test_half_precision_in_and_out_with_states_in_float32() -> None:
    values = arguments(2, 1, 66, 5, 3)
    for i in (0, 1, 3, 4):
        values[i] = values[i].bfloat16()
    truth = reference(values)
    leaves = [value.to(DEVICE) for value in values]
    y, state = triton_scan(*leaves)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (state.cpu().double() - truth[1]).norm() <= 1e-5 * truth[1].norm()
    for name, a, b in zip(NAMES, truth, outputs_and_gradients(triton_scan, values, DEVICE), strict=True):
        # What is stored in bfloat16 has 8 bits; y's rounding error is white, so sums of it stay below this too.
        assert (b - a).norm() <= 4e-3 * a.norm(), name


@on_device
def test_inference_gives_the_same() -> None:
    values = arguments(3, 2, 70, 3, 3)
    truth = reference(values)
    leaves = [value.to(DEVICE).requires_grad_() for value in values]
    with torch.no_grad():
        y, state = triton_scan(*leaves)
    assert not y.requires_grad
    assert (y.cpu() - truth[0]).norm() <= 1e-5 * truth[0].norm()
    assert (state.cpu() - truth[1]).norm() <= 1e-5 * truth[1].norm()


@on_device
@pytest.mark.parametrize(("batch", "length", "n"), [(1, 1, 1), (2, 7, 40), (3, 33, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_chain_equals_a_complex_loop(batch: int, length: int, n: int, dtype: torch.dtype, tolerance: float) -> None:
    from compressm.scans.triton_chain import chain_triton

    def loop(v: Tensor, lam: Tensor) -> tuple[Tensor]:
        state, states = v.new_zeros(v.shape[0], v.shape[2]), []
        for m in range(v.shape[1]):
            state = torch.view_as_complex(lam) * state + torch.view_as_complex(v)[:, m]
            states.append(state)
        return (torch.view_as_real(torch.stack(states, 1)),)

    generator = torch.Generator().manual_seed(0)
    angle, radius = 6.28 * torch.rand(n, generator=generator), 0.3 + 0.699 * torch.rand(n, generator=generator)
    lam = torch.view_as_real(torch.polar(radius, angle))
    v = torch.randn(batch, length, n, 2, generator=generator)
    truth = outputs_and_gradients(loop, [v.double(), lam.double()])
    result = outputs_and_gradients(lambda *x: (chain_triton(*x),), [v.to(dtype), lam.to(dtype)], DEVICE)
    for a, b in zip(truth, result, strict=True):
        assert (b - a).norm() <= tolerance * a.norm()


@on_device
@pytest.mark.parametrize("kind", ["chain", "selective"])
def test_second_derivatives(kind: str) -> None:
    from compressm.scans.chain import chain
    from compressm.scans.plain_chain import plain_chain
    from compressm.scans.triton_selective import selective_scan_triton
    from scan_cases import arguments, selective

    def both(name: str, *args: Tensor) -> tuple[Tensor, ...]:
        if kind == "chain":
            return (chain(*args, "triton") if name == "triton" else plain_chain(*args),)
        return selective_scan_triton(*args) if name == "triton" else selective(*args)

    shapes = [(2, 5, 2, 3), (2, 3), (2, 2, 3)]
    drawn = [torch.rand(s, dtype=torch.float64) for s in shapes] if kind == "chain" else arguments("selective")
    args = [x.to(DEVICE).requires_grad_() for x in drawn]
    along = [torch.randn_like(x) for x in args]

    def second(name: str) -> tuple[Tensor, ...]:
        total = torch.stack([y.sin().sum() for y in both(name, *args)]).sum()
        first = torch.autograd.grad(total, args, create_graph=True)
        return torch.autograd.grad(torch.stack([(g * v).sum() for g, v in zip(first, along, strict=True)]).sum(), args)

    for a, b in zip(second("triton"), second("plain"), strict=True):
        torch.testing.assert_close(a, b)


@on_device
@pytest.mark.parametrize("name", ["ssd", "selective"])
def test_packed_sequences(name: str) -> None:
    scan: Any = ssd_scan if name == "ssd" else selective_scan
    values = ssd_arguments(2, 70, 2, 1, 5, 4, 1.0) if name == "ssd" else arguments(4, 2, 70, 5, 3)
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[0, [0, 5, 6, 64]] = starts[1, 33] = True

    def run(engine: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda *x: scan(*x, return_state=True, engine=engine, starts=starts.to(x[0].device))

    truth = outputs_and_gradients(run("loop"), [value.double() for value in values])
    for a, b in zip(truth, outputs_and_gradients(run("triton"), values, DEVICE), strict=True):
        assert (b - a).norm() <= 1e-4 * a.norm()
