"""Training in which every prefix of a model's sorted states becomes a good cut; see `compressm.sort_states`."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.registry import layers_that_need_data
from compressm.errors import ConfigError, UnsupportedModelError
from compressm.observing.masks import can_be_masked, groups_of, masked_forward


class Prefixes:
    """The prefix that a model's layers use now. `random_prefixes` makes and draws it.

    Attributes:
        share: of every layer's states; 1 for all of them.
    """

    def __init__(self, model: nn.Module, least: float, whole: float, seed: int) -> None:
        self.share = 1.0
        self._least, self._whole = least, whole
        self._generator = torch.Generator().manual_seed(seed)
        self._layers = layers_that_need_data(model)

    def draw(self) -> None:
        """Draw a share: all states with a given probability, otherwise log-uniform from the least share up to all."""
        whole, place = torch.rand(2, generator=self._generator, dtype=torch.float64).tolist()
        self.share = 1.0 if whole < self._whole else math.exp(place * math.log(self._least))

    def mask(self, name: str) -> Tensor | None:
        """The mask of a layer, shape ``(1, groups, n)``; None if all its states are used."""
        layer, adapter = self._layers[name]
        n = adapter.state_dim(layer)
        states = max(1, round(self.share * n))
        if states == n:
            return None
        like = next(layer.parameters())
        return (torch.arange(n, device=like.device) < states).to(like.dtype).expand(1, groups_of(layer), n)


@contextmanager
def random_prefixes(
    model: nn.Module, *, least: float = 0.125, whole: float = 0.25, seed: int = 0
) -> Generator[Prefixes]:
    """While the block runs, every call of the model in training mode uses the first states of its layers alone, and how
    many is drawn anew.

        order = compressm.sort_states(model, batches)
        with compressm.random_prefixes(model):
            train(model)  # as usual
        order.slice(model, states=16)

    A mask takes the other states out of what the outputs read, so the model computes what its slice to as many states
    computes. Two things differ: norms of B and C, as in Jamba, to which a slice leaves fewer entries; and the scale of
    queries in transformers' delta rule, which the norm of the heads takes out but for its constant. In evaluation mode,
    and after the block, the model is whole. Under gradient checkpointing the backward pass must come before the next
    call, whose draw is another one. The drawing of nested networks by width is from Yu et al., Slimmable Neural
    Networks, ICLR 2019.

    Args:
        model: with sorted states.
        least: the smallest share of the states that is drawn, in (0, 1].
        whole: the share of calls that use all states, in [0, 1].
        seed: of the draws. In several processes it must be the same.

    Raises:
        ConfigError: a share out of range.
        UnsupportedModelError: a layer on whose states no mask can be put, or whose states have no order; or a compiled
            model, which would be compiled anew for every size.
    """
    if not 0 < least <= 1 or not 0 <= whole <= 1:
        raise ConfigError(f"least must be in (0, 1] and whole in [0, 1]; got least={least!r} and whole={whole!r}")
    if compiled := [name for name, module in model.named_modules() if hasattr(module, "_orig_mod")]:
        raise UnsupportedModelError(
            f"{compiled[0] or 'the model'} is compiled, and would be compiled anew for every size: train prefixes "
            "without torch.compile"
        )
    prefixes = Prefixes(model, least, whole, seed)
    layers = layers_that_need_data(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer with an order of its states: linear ones are cut to any size without"
        )
    for name, (layer, adapter) in layers.items():
        if not adapter.sorts or not can_be_masked(layer):
            raise UnsupportedModelError(
                f"{name} ({type(layer).__name__}) cannot be used with a part of its states: leave random_prefixes out"
            )
    before = {name: layer.__dict__.get("forward") for name, (layer, _) in layers.items()}

    def drawn(module: nn.Module, *_: Any) -> None:
        if module.training:
            prefixes.draw()
        else:
            prefixes.share = 1.0

    hook = model.register_forward_pre_hook(drawn)
    try:
        for name, (layer, _) in layers.items():
            layer.forward = _prefixed(layer, name, prefixes, before[name])
        yield prefixes
    finally:
        hook.remove()
        for name, (layer, _) in layers.items():
            del layer.forward
            if (exchanged := before[name]) is not None:
                layer.forward = exchanged


def _prefixed(layer: nn.Module, name: str, prefixes: Prefixes, before: Any) -> Callable[..., Any]:
    """The layer's forward, its own or the one that a faster scan put in its place, with the mask that is drawn."""
    whole = types.MethodType(type(layer).forward, layer) if before is None else before

    def forward(*args: Any, **kwargs: Any) -> Any:
        mask = prefixes.mask(name)
        if mask is None:
            return whole(*args, **kwargs)
        with _exchanged(layer, before):  # which scan a mask goes into is read off the layer
            masked = masked_forward(layer, mask)
        assert masked is not None
        return masked(*args, **kwargs)

    return forward


@contextmanager
def _exchanged(layer: nn.Module, forward: Any) -> Generator[None]:
    """The layer with another forward; None for that of its class."""
    ours = layer.__dict__.pop("forward")
    if forward is not None:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        layer.__dict__["forward"] = ours


__all__ = ["Prefixes", "random_prefixes"]
