"""What serving a model costs: bytes that a sequence keeps, bytes that a token moves, sequences that a memory holds.

A recurrent layer keeps one state per sequence, whatever its length; an attention layer keeps keys and values of every
token. While tokens are generated one at a time, speed is bounded by bytes: every step reads the weights once, and for
every sequence reads and writes its states and reads its keys and values.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressm.cutting.sizes import geometries
from compressm.errors import ConfigError
from compressm.theory.geometry import Geometry
from compressm.theory.targets import Target, parallel_sizes, takers

CONTEXTS = (4096, 32768)  # tokens of a sequence, at which the keys and values of attention are counted
_LOOK = 2  # tokens after which a cache is looked at; layers may take a single one for the continuation of a sequence
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Attention:
    """The keys and values that one attention layer keeps.

    Attributes:
        per_token: bytes.
        window: tokens that are kept at most; None for all.
    """

    per_token: int
    window: int | None = None

    def bytes(self, context: int) -> int:
        """Bytes after ``context`` tokens."""
        return self.per_token * (context if self.window is None else min(context, self.window))


@dataclass(frozen=True)
class Memory:
    """The bytes of one model while it generates.

    Attributes:
        layers: geometry of every recurrent layer, by name.
        attention: of every attention layer; None if it is not known.
        weights: bytes of all parameters.
        read: bytes of the parameters that a generated token reads: all but the rows of the embedding and the experts
            that are not chosen.
    """

    layers: Mapping[str, Geometry]
    attention: tuple[Attention, ...] | None
    weights: int
    read: int

    @classmethod
    def of(cls, model: nn.Module, attention: Sequence[Attention] | None = None) -> Memory:
        """The bytes of a model as it is now.

        Args:
            model: only read.
            attention: of its attention layers, from `attention_of`; None if it was not looked at.
        """
        sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
        seen = None if attention is None else tuple(attention)
        return cls(geometries(model, every=True), seen, sum(sizes.values()), _read(model, sizes))

    def resized(self, dims: Mapping[str, int], removed: int = 0) -> Memory:
        """After a cut of layers to other state dimensions, which removes some bytes of parameters."""
        layers = {name: one.resized(dims.get(name, one.states)) for name, one in self.layers.items()}
        return Memory(layers, self.attention, self.weights - removed, self.read - removed)

    @property
    def states(self) -> int:
        """Bytes of the recurrences' states of one sequence."""
        return sum(layer.state_bytes for layer in self.layers.values())

    @property
    def windows(self) -> int:
        """Bytes of the convolutions' last inputs of one sequence."""
        return sum(layer.window_bytes for layer in self.layers.values())

    @property
    def checkpoint(self) -> int:
        """Bytes that one cached prefix keeps of the recurrent layers, and one sequence too: states and windows."""
        return self.states + self.windows

    def attention_bytes(self, context: int) -> int:
        """Bytes of keys and values of one sequence of ``context`` tokens."""
        return sum(layer.bytes(context) for layer in self.attention or ())

    def sequence(self, context: int) -> int:
        """Bytes that one sequence of ``context`` tokens keeps."""
        return self.checkpoint + self.attention_bytes(context)

    def sequences(self, memory: int, context: int) -> int:
        """How many sequences of ``context`` tokens fit beside the weights into ``memory`` bytes."""
        return max(0, memory - self.weights) // self.sequence(context)

    def moved(self, context: int, batch: int = 1) -> int:
        """Bytes that one step of generation moves for ``batch`` sequences: weights read, states and windows read and
        written, keys and values read."""
        return self.read + batch * (2 * self.checkpoint + self.attention_bytes(context))

    def parallel(self) -> tuple[int, ...]:
        """The degrees of tensor parallelism that the heads of all layers allow."""
        found = [set(parallel_sizes(layer)) for layer in self.layers.values()]
        return tuple(sorted(set.intersection(*found)))

    def takers(self) -> tuple[Target, ...]:
        """The targets that would take all layers as they are."""
        found = [takers(layer, layer.states) for layer in self.layers.values()]
        return tuple(target for target in found[0] if all(target in one for one in found))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "layers": {
                name: {"state": one.state_bytes, "window": one.window_bytes} for name, one in self.layers.items()
            },
            "states": self.states,
            "windows": self.windows,
            "checkpoint": self.checkpoint,
            "attention": None if self.attention is None else [asdict(one) for one in self.attention],
            "weights": self.weights,
            "moved": {str(context): self.moved(context) for context in CONTEXTS},
            "targets": list(self.takers()),
            "tensor_parallel": list(self.parallel()),
        }


@dataclass(frozen=True)
class Serving:
    """What serving a model costs before and after a cut.

    Attributes:
        before, after: the bytes.
        memory: a device's memory in bytes, for the number of sequences that it holds; None for none.
        speed: tokens per second of one sequence on this machine, before and after, as far as they were measured.
    """

    before: Memory
    after: Memory
    memory: int | None = None
    speed: tuple[float, ...] = field(default=())

    def headline(self) -> str:
        """One line: the state per sequence, and how many sequences fit."""
        before, after = self.before.checkpoint, self.after.checkpoint
        share = f" ({after / before:.0%})" if before != after else ""
        line = f"state per sequence {_change(before, after)}{share}"
        if self.memory is not None:
            counts = [f"{one.sequences(self.memory, CONTEXTS[0]):,}" for one in (self.before, self.after)]
            line += f", {human(self.memory)} hold {' → '.join(dict.fromkeys(counts))} sequences"
            line += f" of {CONTEXTS[0]:,} tokens" if self.before.attention else ""
        return line

    def lines(self) -> list[str]:
        """The report, the headline first. Models that generate no text are not told of tokens, prefixes and servers."""
        before, after = self.before, self.after
        generates, lines = after.attention is not None, [self.headline()]
        if generates or after.windows:
            prefix = f"; a cached prefix keeps {human(after.checkpoint)}" if generates else ""
            parts = _change(before.states, after.states), _change(before.windows, after.windows)
            window = "last token" if any(one.kind == "rotated" for one in after.layers.values()) else "convolution"
            lines.append(f"  recurrence {parts[0]}, {window} {parts[1]}{prefix}")
        lines += self._attention()
        alone, batched = (
            _change(*(one.moved(CONTEXTS[0], batch) // batch for one in (before, after))) for batch in (1, 64)
        )
        lines.append(
            f"  bytes moved per {'generated token' if generates else 'step'} {alone}; in a batch of 64 {batched}"
        )
        lines.append(f"  weights {_change(before.weights, after.weights)}")
        if self.speed:
            lines.append(f"  tokens per second here, one sequence: {' → '.join(f'{one:.1f}' for one in self.speed)}")
        if generates or after.takers():
            degrees = ", ".join(map(str, after.parallel())) or "none"
            lines.append(f"  taken by {', '.join(after.takers()) or 'no known target'}; tensor parallelism {degrees}")
        return lines

    def _attention(self) -> list[str]:
        layers = self.after.attention
        if layers is None:
            return []
        if not layers:
            return ["  no attention layers: the length of a sequence does not count"]
        at = ", ".join(f"{human(self.after.attention_bytes(context))} at {context:,} tokens" for context in CONTEXTS)
        per_token = sum(layer.per_token for layer in layers)
        name = "attention layer" if len(layers) == 1 else "attention layers"
        return [f"  keys and values of {len(layers)} {name} {human(per_token)} per token: {at}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts: dict[str, Any] = {}
        if self.memory is not None:
            counts["memory"] = self.memory
            for context in CONTEXTS:
                both = [one.sequences(self.memory, context) for one in (self.before, self.after)]
                counts.setdefault("sequences", {})[str(context)] = both
        speed = {"tokens_per_second": list(self.speed)} if self.speed else {}
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), **counts, **speed}

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _change(before: int, after: int) -> str:
    return f"{human(before)} → {human(after)}" if before != after else human(after)


def human(count: float) -> str:
    """A number of bytes, in decimal units with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it: ``40GB``, ``24GiB``, ``512m``.

    Raises:
        ConfigError: no such number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    count = 0 if found is None else int(float(found[1]) * _UNITS[(found[2] or "").lower()])
    if count < 1:
        raise ConfigError(f"memory {text!r} is no number of bytes: write it as 40GB or 24GiB")
    return count


def _read(model: nn.Module, sizes: Mapping[int, int]) -> int:
    """Bytes of the parameters that one token reads."""
    read, seen = 0, set[int]()
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    share = _chosen_experts(model)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            looked_up = isinstance(module, nn.Embedding) and parameter is not head
            if id(parameter) in seen or looked_up:
                continue
            seen.add(id(parameter))
            read += int(sizes[id(parameter)] * (share if ".experts." in f".{name}." else 1.0))
    return read


def _chosen_experts(model: nn.Module) -> float:
    """The share of its experts that a token reads."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    every = next((count for name in names if isinstance(count := getattr(config, name, None), int) and count), None)
    return min(1.0, chosen / every) if isinstance(chosen, int) and every else 1.0


def cache_of(model: nn.Module, tokens: Tensor) -> Any:
    """The cache of a causal language model of transformers after some tokens, shape ``(1, length)``."""
    with torch.no_grad():
        output: Any = model(input_ids=tokens, use_cache=True)
        names = ("past_key_values", "cache_params")
        cache = next((found for name in names if (found := getattr(output, name, None)) is not None), None)
        if cache is None:  # RecurrentGemma fills a cache and does not return it
            from transformers import DynamicCache

            cache = DynamicCache(config=cast("Any", model).config)
            model(input_ids=tokens, use_cache=True, past_key_values=cache)
    return cache


def attention_of(model: nn.Module) -> tuple[Attention, ...] | None:
    """The bytes per token of every attention layer, read off the real cache after two tokens.

    Returns:
        None for a model that is no causal language model of transformers, or that does not run them.
    """
    if not hasattr(model, "generate"):
        return None
    device = next(model.parameters()).device
    try:
        cache = cache_of(model, torch.zeros(1, _LOOK, dtype=torch.long, device=device))
    except (RuntimeError, ValueError, TypeError):  # such as kernels that need a GPU, or wider layers
        return None
    found: list[Attention] = []
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.numel():
            window = getattr(layer, "sliding_window", None)
            found.append(Attention((keys.nbytes + values.nbytes) // _LOOK, window if isinstance(window, int) else None))
    return tuple(found)


def decoding_speed(model: nn.Module, tokens: int = 24, prompt: int = 8) -> float | None:
    """Tokens per second of one sequence, generated greedily with the cache; None without `generate`.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: how many are timed, after two that are not.
        prompt: length of the prompt.
    """
    if not hasattr(model, "generate"):
        return None
    generate: Any = getattr(model, "generate")  # noqa: B009
    ids = torch.ones(1, prompt, dtype=torch.long, device=next(model.parameters()).device)
    options: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        return time.perf_counter() - started

    seconds(2)
    begun = seconds(2)
    return tokens / max(1e-9, seconds(2 + tokens) - begun)


__all__ = [
    "CONTEXTS",
    "Attention",
    "Memory",
    "Serving",
    "attention_of",
    "cache_of",
    "decoding_speed",
    "human",
    "parse_bytes",
]
