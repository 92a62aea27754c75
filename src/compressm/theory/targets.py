"""The state dimensions that kernels and servers take: one table, with the source and the date of every row.

A row is a fact about somebody else's code, so it grows old: look at the source before you rely on it. A target without
a row for a kind of recurrence has no kernel for it that we know, and takes no size of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from compressm.errors import InvalidRankRuleError
from compressm.theory.geometry import Geometry, Kind

Target = Literal["mamba_ssm", "vllm", "sglang", "flashinfer", "llama.cpp", "transformers"]

# Targets whose checkpoints hold one state dimension for all layers. FlashInfer is a library of kernels without any.
ONE_SIZE: tuple[Target, ...] = ("mamba_ssm", "vllm", "sglang", "llama.cpp", "transformers")
PARALLEL = (1, 2, 4, 8, 16)  # numbers of GPUs that tensor parallelism is asked about


@dataclass(frozen=True)
class Row:
    """A condition that a target's code sets on the state dimension N of some kinds of recurrences.

    Attributes:
        target: whose code.
        kinds: of which recurrences.
        takes: whether it takes N in a layer of this geometry.
        says: the condition in words.
        source: repository, commit and file where it stands.
        date: of that commit, or of the day on which the file was read.
    """

    target: Target
    kinds: tuple[Kind, ...]
    takes: Callable[[Geometry, int], bool]
    says: str
    source: str
    date: str


def _at_most_256(_: Geometry, states: int) -> bool:
    return states <= 256


def _square(geometry: Geometry, states: int) -> bool:
    return states == geometry.head_dim <= 256


def _any(_: Geometry, states: int) -> bool:
    return states >= 1


def _eight_channels(geometry: Geometry, states: int) -> bool:
    return geometry.resized(states).convolved % 8 == 0


def _flashinfer_ssd(geometry: Geometry, states: int) -> bool:
    return states in (64, 96, 128, 256) and geometry.head_dim in (64, 128, 256)


def _ggml_ssd(geometry: Geometry, states: int) -> bool:
    return states in (128, 256) and geometry.head_dim % 16 == 0 and geometry.resized(states).convolved % 128 == 0


def _ggml_s6(geometry: Geometry, states: int) -> bool:
    return states == 16 and geometry.channels % 128 == 0 and geometry.groups == 1


def _ggml_delta(geometry: Geometry, states: int) -> bool:
    return states == geometry.head_dim and states in (16, 32, 64, 128)


def _power_of_two(geometry: Geometry, states: int) -> bool:
    return states in (16, 32, 64, 128, 256) and geometry.head_dim in (16, 32, 64, 128, 256)


_DELTA: tuple[Kind, ...] = ("delta", "kda")
_EVERY: tuple[Kind, ...] = ("s6", "ssd", "delta", "gla", "kda", "channels")
_MAMBA = "state-spaces/mamba@e9594ce"
_FLASHINFER = "flashinfer-ai/flashinfer@fb28d72"
_READ = "read 2026-11-29"

TABLE: tuple[Row, ...] = (
    Row(
        "mamba_ssm", ("s6",), _at_most_256, "N ≤ 256",
        f"{_MAMBA}: csrc/selective_scan/selective_scan.cpp", "2026-07-23",
    ),
    Row(
        "mamba_ssm", ("ssd",), _eight_channels, "the fused path: (d_inner + 2·groups·N) % 8 = 0",
        f"{_MAMBA}: mamba_ssm/ops/triton/ssd_combined.py, ensure_stride", "2026-07-23",
    ),
    Row(
        "mamba_ssm", ("rotated",), _power_of_two, "N and the head dimension powers of two from 16 to 256",
        f"{_MAMBA}: mamba_ssm/ops/triton/mamba3/mamba3_siso_combined.py, tests/ops/tilelang/test_mamba3_mimo.py",
        "2026-07-23",
    ),
    Row(
        "vllm", ("s6",), _at_most_256, "N ≤ 256",
        "vllm-project/vllm@04f947b: csrc/mamba/mamba_ssm/selective_scan_fwd.cu", _READ,
    ),
    Row(
        "vllm", ("ssd",), _any, "any N",
        "vllm-project/vllm@02d7108: model_executor/layers/mamba/mamba_utils.py, mamba2_state_shape", _READ,
    ),
    Row(
        "vllm", ("delta",), _at_most_256, "K ≤ 256",
        "vllm-project/vllm@05f989d: model_executor/layers/fla/ops/chunk_delta_h.py", _READ,
    ),
    Row(
        "vllm", ("kda",), _square, "K = V ≤ 256",
        "vllm-project/vllm@02d7108: model_executor/layers/mamba/mamba_utils.py, kda_state_shape", _READ,
    ),
    Row(
        "sglang", ("ssd",), _any, "any N",
        "sgl-project/sglang@02e208d: srt/configs/mamba_utils.py, Mamba2StateShape", _READ,
    ),
    Row(
        "sglang", ("delta",), _at_most_256, "K ≤ 256",
        "sgl-project/sglang@06a2775: srt/layers/attention/fla/chunk_delta_h.py", _READ,
    ),
    Row(
        "sglang", ("kda",), _square, "K = V ≤ 256",
        "sgl-project/sglang@02e208d: srt/configs/mamba_utils.py, KimiLinearStateShape", _READ,
    ),
    Row(
        "flashinfer", ("ssd",), _flashinfer_ssd, "decode: N in 64, 96, 128, 256, head dimension in 64, 128, 256",
        f"{_FLASHINFER}: tests/mamba/test_selective_state_update_stp.py, benchmarks/routines/mamba.py", "2026-08-22",
    ),
    Row(
        "flashinfer", ("delta",), lambda g, k: k == 128 == g.head_dim, "K = V = 128",
        f"{_FLASHINFER}: flashinfer/gdn_kernels (prefill), gdn_decode.py", "2026-08-22",
    ),
    Row(
        "llama.cpp", ("s6",), _ggml_s6, "on CUDA N = 16, d_inner % 128 = 0; else the CPU runs the scan",
        "ggml-org/llama.cpp@0010882: ggml/src/ggml-cuda/ggml-cuda.cu, GGML_OP_SSM_SCAN", _READ,
    ),
    Row(
        "llama.cpp", ("ssd",), _ggml_ssd,
        "on CUDA N in 128, 256, head dimension % 16 = 0, (d_inner + 2·groups·N) % 128 = 0; else the CPU runs it",
        "ggml-org/llama.cpp@0010882: ggml/src/ggml-cuda/ggml-cuda.cu, GGML_OP_SSM_SCAN, GGML_OP_SSM_CONV", _READ,
    ),
    Row(
        "llama.cpp", _DELTA, _ggml_delta, "K = V in 16, 32, 64, 128",
        "ggml-org/llama.cpp@0196e69: ggml/src/ggml-cuda/gated_delta_net.cu", _READ,
    ),
    Row(
        "transformers", _EVERY, _any, "any N",
        "huggingface/transformers 5.23.0: the reference implementations of the layers", "2026-11-29",
    ),
)  # fmt: skip


def takes(target: Target, geometry: Geometry, states: int) -> bool:
    """Whether a target has a kernel for a layer with a state dimension of ``states``."""
    rows = [row for row in TABLE if row.target == target and geometry.kind in row.kinds]
    return bool(rows) and all(row.takes(geometry, states) for row in rows)


def legal_sizes(target: Target, geometry: Geometry) -> tuple[int, ...]:
    """The state dimensions up to a layer's own that a target takes, ascending."""
    return tuple(states for states in range(1, geometry.states + 1) if takes(target, geometry, states))


def takers(geometry: Geometry, states: int) -> tuple[Target, ...]:
    """The targets that would take a layer with a state dimension of ``states``."""
    return tuple(target for target in get_args(Target) if takes(target, geometry, states))


def parallel_sizes(geometry: Geometry) -> tuple[int, ...]:
    """The degrees of tensor parallelism that the layer's heads allow, in vLLM and SGLang.

    Heads are divided among the GPUs, so their number must be a multiple of the degree; groups (key heads) too, unless
    there is only one, which every GPU then holds. The state dimension itself is never divided.
    """
    groups = geometry.groups
    return tuple(d for d in PARALLEL if geometry.heads % d == 0 and (groups == 1 or groups % d == 0))


def check_target(target: Target, geometries: Mapping[str, Geometry]) -> dict[str, tuple[int, ...]]:
    """The legal sizes of every layer.

    Raises:
        InvalidRankRuleError: a layer for which there is none smaller than its own.
    """
    sizes = {name: legal_sizes(target, geometry) for name, geometry in geometries.items()}
    for name, geometry in geometries.items():
        if any(states < geometry.states for states in sizes[name]):
            continue
        rows = [row.says for row in TABLE if row.target == target and geometry.kind in row.kinds]
        why = f"takes {' and '.join(rows)}" if rows else f"has no known kernel for its recurrence ({geometry.kind})"
        raise InvalidRankRuleError(
            f"target={target!r} {why}, so {name or 'the model'!r} with {geometry.states} states has no smaller size: "
            "choose another target, or leave target out"
        )
    return sizes


__all__ = [
    "ONE_SIZE",
    "PARALLEL",
    "TABLE",
    "Row",
    "Target",
    "check_target",
    "legal_sizes",
    "parallel_sizes",
    "takers",
    "takes",
]
