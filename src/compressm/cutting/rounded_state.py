"""States in 8 bits, simulated: what rounding the state of every sequence costs in bytes, and in predictions.

A model reads its tokens through its own cache, and after every few tokens the states in the cache are rounded, as a
server would that stores them in few bits. The entries along the state dimension share a scale, their largest absolute
value, which takes two bytes:

    int8   x = s round(127 x / s) / 127
    fp8    x = s e4m3(448 x / s) / 448, floating point with three bits of mantissa

Windows of convolutions, keys and values stay as they are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.registry import layers_that_need_data
from compressm.cutting.ordering import in_coordinates
from compressm.cutting.sizes import geometries
from compressm.errors import ConfigError, UnsupportedModelError
from compressm.layers import LanguageModel
from compressm.observing.inputs import Call, calls
from compressm.observing.labels import prediction_of
from compressm.observing.perplexity import present_in, tokens_of
from compressm.runtime.modes import modes_kept
from compressm.runtime.progress import Bar
from compressm.theory.equalising import equal_coordinates
from compressm.theory.geometry import Geometry
from compressm.theory.rank_rule import check_choice
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction
from compressm.theory.selection import reduction_by_maps

Format = Literal["bfloat16", "int8", "fp8"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SCALE = 2  # bytes
_LEVELS, _LARGEST = 127, 448.0
_SAME = 0.02  # relative difference of logits with and without the cache; half precision rounds them differently


@dataclass(frozen=True)
class RoundedState:
    """What one format of the states costs.

    Attributes:
        format: ``"bfloat16"``, ``"int8"`` or ``"fp8"`` (e4m3).
        bytes: of the recurrences' states of one sequence, scales included.
        perplexity: of the next token, with rounded states.
        divergence: mean Kullback-Leibler divergence from the same model with exact states, in nats per token.
        error: relative error of the logits, root mean square.
    """

    format: Format
    bytes: int
    perplexity: float
    divergence: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.format}: {self.bytes:,} bytes per sequence, perplexity {self.perplexity:.3f}, divergence "
            f"{self.divergence:.2g} nats per token"
        )


def state_bytes(geometry: Geometry, format: Format) -> int:
    """Bytes of one layer's state of one sequence: one or two per number, and in 8 bits a scale per channel."""
    if format == "bfloat16":
        return 2 * geometry.channels * geometry.states
    return geometry.channels * (geometry.states + _SCALE)


def rounded(state: Tensor, axis: int, format: Format) -> Tensor:
    """The state as it is after being stored in a format.

    Args:
        state: floating point, any shape.
        axis: the state dimension, whose entries share a scale.
        format: how it is stored.
    """
    if format == "bfloat16":
        return state.bfloat16().to(state.dtype)
    scale = state.abs().amax(axis, keepdim=True).bfloat16().to(state.dtype)
    unit = torch.where(scale > 0, state / torch.where(scale > 0, scale, 1), 0)
    if format == "int8":
        codes = (unit * _LEVELS).round().clamp(-_LEVELS, _LEVELS) / _LEVELS
    else:
        codes = (unit * _LARGEST).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(state.dtype) / _LARGEST
    return codes * scale


@torch.no_grad()
def round_states(
    model: nn.Module,
    data: Any,
    *,
    formats: Sequence[Format] = FORMATS,
    every: int = 1,
    quiet: bool = True,
) -> tuple[RoundedState, ...]:
    """Simulate states that are stored in few bits, and measure what that costs. The model is not changed.

    Args:
        model: a causal language model of transformers with a cache, or our own `LanguageModel`.
        data: batches of tokens, as in `compress`. Padding behind the tokens does not count; padding before them is
            refused, since the cache is filled token by token.
        formats: of the states.
        every: round after so many tokens: 1 for a server that stores the state at every step, more for
            prefixes that are cached.
        quiet: show no progress bar.

    Returns:
        one entry per format.

    Raises:
        ConfigError: an unknown format, or ``every`` below 1.
        UnsupportedModelError: layers whose state is not a vector per channel in a known cache.
    """
    for one in formats:
        check_choice("format", one, Format)
    if every < 1:
        raise ConfigError(f"every must be at least 1; got {every}")
    batches = list(calls(model, data))
    check_roundable(model, batches[0])
    found: dict[Format, list[tuple[float, ...]]] = {one: [] for one in formats}
    lengths = [cast("Tensor", tokens_of(call)).shape[1] for call in batches]
    total = (1 + len(formats)) * sum(-(-length // every) for length in lengths)
    with modes_kept(model), Bar("rounding states", total, quiet=quiet, transient=True) as bar:
        model.eval()
        for call in batches:
            tokens = cast("Tensor", tokens_of(call))
            mask = present_in(model, call)
            present = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
            exact = _logits(model, tokens, None, every, bar)
            _check_reading(model, call, exact, present, every)
            for one in formats:
                found[one].append(_compared(_logits(model, tokens, one, every, bar), exact, tokens, present))
    sizes = geometries(model).values()
    return tuple(_summed(one, sum(state_bytes(size, one) for size in sizes), rows) for one, rows in found.items())


def _compared(logits: Tensor, exact: Tensor, tokens: Tensor, present: Tensor) -> tuple[float, ...]:
    """Sums over a batch, without padding: nats and their number, divergence and its number, squares of the error and of
    the logits."""
    wanted = tokens.masked_fill(~present, -100)[:, 1:]
    nats = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=-100))
    logits, exact = logits[present], exact[present]
    new, old = logits.double().log_softmax(-1), exact.double().log_softmax(-1)
    divergence = float((old.exp() * (old - new)).sum())
    centred = exact - exact.mean(-1, keepdim=True)
    wrong, whole = float((logits - exact).square().sum()), float(centred.square().sum())
    return nats, int((wanted != -100).sum()), divergence, len(exact), wrong, whole


def _summed(format: Format, size: int, rows: Sequence[tuple[float, ...]]) -> RoundedState:
    nats, wanted, divergence, count, wrong, whole = (sum(column) for column in zip(*rows, strict=True))
    return RoundedState(format, size, math.exp(nats / wanted), divergence / count, (wrong / max(whole, 1e-300)) ** 0.5)


def check_roundable(model: nn.Module, call: Call) -> None:
    """Refuse models whose states cannot be found.

    Raises:
        UnsupportedModelError: the layer, and what is expected.
    """
    if tokens_of(call) is None or not (isinstance(model, LanguageModel) or hasattr(model, "generate")):
        raise UnsupportedModelError(
            f"{type(model).__name__} is neither a causal language model of transformers nor a compressm LanguageModel, "
            "so that its states cannot be rounded between tokens"
        )
    for name, geometry in geometries(model).items():
        if geometry.kind in ("lti", "channels"):
            raise UnsupportedModelError(
                f"{name} has no vector of states per channel ({geometry.kind}): 8-bit states are simulated for Mamba, "
                "Mamba-2, linear attention and the delta rule"
            )
    if not isinstance(model, LanguageModel):
        cache, _ = _read(model, cast("Tensor", tokens_of(call))[:1, :2], 0, {})
        _round_cache(model, cache, "bfloat16")


def _check_reading(model: nn.Module, call: Call, exact: Tensor, present: Tensor, every: int) -> None:
    """Refuse a model that does not compute through its cache what it computes without."""
    exact, whole = exact[present], prediction_of(call(model))[present]
    error = float((exact - whole).norm() / whole.norm().clamp_min(1e-30))
    if not error < _SAME:
        remedy = "try every=1" if every > 1 else "this version of transformers cannot continue it token by token"
        remedy = remedy if bool(present[:, 0].all()) else "put padding behind the tokens, not before them"
        raise UnsupportedModelError(
            f"{type(model).__name__} predicts otherwise when it reads {every} tokens at a time through its cache (by "
            f"{error:.1%}), so that states in the cache tell nothing: {remedy}"
        )


def _logits(model: nn.Module, tokens: Tensor, format: Format | None, every: int, bar: Bar) -> Tensor:
    """Logits of a model whose states are rounded after every few tokens, shape ``(batch, length, vocabulary)``."""
    if isinstance(model, LanguageModel):
        return _own_logits(model, tokens, format, every, bar)
    parts, given = list[Tensor](), dict[str, Any]()
    for start in range(0, tokens.shape[1], every):
        cache, logits = _read(model, tokens[:, start : start + every], start, given)
        if format is not None:
            _round_cache(model, cache, format)
        given = cache
        parts.append(logits)
        bar.advance()
    return torch.cat(parts, 1)


def _own_logits(model: LanguageModel, tokens: Tensor, format: Format | None, every: int, bar: Bar) -> Tensor:
    states, parts = model.initial_state(tokens.shape[0]), list[Tensor]()
    for place in range(tokens.shape[1]):
        logits, states = model.step(tokens[:, place], states)
        parts.append(logits)
        if (place + 1) % every == 0:
            states = states if format is None else [_round_own(one, format) for one in states]
            bar.advance()
    return torch.stack(parts, 1)


def _round_own(state: Any, format: Format) -> Any:
    """The state of one of our layers: alone, or after the window of a convolution. States are the last axis."""
    if isinstance(state, Tensor):
        return rounded(state, -1, format)
    return (*state[:-1], rounded(state[-1], -1, format))


def _read(model: nn.Module, tokens: Tensor, start: int, cache: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The cache under the name of its argument, and the logits, after a model of transformers read some tokens.

    Args:
        model: the model.
        tokens: shape ``(batch, length)``.
        start: how many tokens the cache holds. Some hybrids count them wrongly themselves.
        cache: under the name of its argument; empty at first.
    """
    options = dict(cache)
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    output: Any = model(input_ids=tokens, use_cache=True, **options)
    names = ("past_key_values", "cache_params")
    found = {name: value for name in names if (value := getattr(output, name, None)) is not None}
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} returns no cache in which states could be rounded")
    return found, output.logits.float()


def _round_cache(model: nn.Module, cache: dict[str, Any], format: Format) -> None:
    """Round the states in a cache of transformers, in place."""
    layers: Any = getattr(next(iter(cache.values())), "layers", ())
    for name, (layer, adapter) in layers_that_need_data(model).items():
        index: Any = getattr(layer, "layer_idx", None)
        states = getattr(layers[index], "recurrent_states", None) if index is not None and layers else None
        values = list(states.values()) if isinstance(states, dict) else []
        if len(values) != 1 or not isinstance(values[0], Tensor) or not _fits(values[0], layer, adapter):
            raise UnsupportedModelError(
                f"{name} ({type(layer).__name__}) keeps its state in no cache that is known, to be rounded in"
            )
        values[0].copy_(rounded(values[0], adapter.state_axis, format))


def _fits(state: Tensor, layer: nn.Module, adapter: SelectiveAdapter) -> bool:
    return state.ndim >= -adapter.state_axis and state.shape[adapter.state_axis] == adapter.state_dim(layer)


def equalise_states(model: nn.Module, data: Any) -> tuple[str, ...]:
    """Change the coordinates of states so that rounding them costs least, in place. The function stays the same.

    Possible where keys and queries are linear in the input: rotations under the delta rule, any map in linear
    attention; see `compressm.theory.equalising`. Other layers, whose coordinates are not free, are left as they are.

    Args:
        model: with selective layers.
        data: what the moments are measured on, as in `compress`.

    Returns:
        the names of the layers that were changed.

    Raises:
        UnsupportedModelError: no layer has free coordinates, or the model cannot be cut either.
        InvalidSystemError: parameters or data that are not finite.
        ConfigError: data that the model cannot take.
    """

    def equal(balancing: SelectiveBalancing, any_basis: bool, rotates: bool) -> SelectiveReduction | None:
        if not (any_basis or rotates):
            return None
        into, out = equal_coordinates(balancing.P, balancing.W, any_basis)
        return reduction_by_maps(balancing, into, out, None)

    changed = tuple(in_coordinates(model, data, equal))
    if not changed:
        raise UnsupportedModelError(
            f"the coordinates of the states of {type(model).__name__} are not free: a convolution, a non-linearity or "
            "a decay per state stands between, so that there is nothing to equalise"
        )
    return changed


__all__ = [
    "FORMATS", "Format", "RoundedState", "check_roundable", "equalise_states", "round_states", "rounded", "state_bytes",
]  # fmt: skip
