"""A layer's own forward with some functions of its source file replaced, for one instance and without patching.

Hugging Face's Mamba layers call their scan as a global function of their source file. It can be replaced by a faster
scan, or by one that records its arguments. Everything else (masks, caches, norms) stays the layer's own code.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def global_names(layer: nn.Module) -> frozenset[str]:
    """The names of globals and attributes that a layer's forward refers to."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return frozenset(code.co_names) if code is not None else frozenset()


def rebound_forward(layer: nn.Module, functions: dict[str, Callable[..., Any]]) -> types.MethodType:
    """The layer's forward, bound to the layer, with other functions under some of its global names.

    Wrappers around the forward (Accelerate's hooks for offloaded weights) are left out.

    Args:
        layer: a layer with a forward written in Python.
        functions: the new functions by global name.
    """
    forward = inspect.unwrap(type(layer).forward)
    rebound = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, **functions},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(rebound, layer)


def called_function(layer: nn.Module, name: str) -> Callable[..., Any]:
    """The function that a layer's forward calls under a global name; the replacement, if the forward of this instance
    was rebound."""
    exchanged: Any = layer.__dict__.get("forward")
    forward: Any = getattr(exchanged, "__func__", None) or inspect.unwrap(type(layer).forward)
    found: Any = getattr(forward, "__globals__", {}).get(name)
    return found if found is not None else inspect.unwrap(type(layer).forward).__globals__[name]


def not_fused(*_: Any, **__: Any) -> None:
    """Returns None, which tells transformers that no kernel for the whole layer is available."""
