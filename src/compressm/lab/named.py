"""Functions of the user's that a command line or a configuration names: ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressm.errors import ConfigError
from compressm.runtime.modes import modes_kept
from compressm.runtime.random_state import rng_state, set_rng_state
from compressm.saving.arguments import remember_arguments


def is_named(text: str) -> bool:
    """Whether it has the form ``package.module:function``, and is no path."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def call_named(reference: str, key: str, offered: Mapping[str, Any] | None = None) -> Any:
    """The value of a function of the user's. The present folder is searched for its module first.

    Args:
        reference: ``package.module:function``.
        key: what the message about a mistake begins with, such as ``--model``.
        offered: arguments that the function gets if its signature names them.

    Raises:
        ConfigError: no such module or function, or one that raises; the message names the line of the user's code.
    """
    where = f"{key} {reference}"
    function = _found(reference, where)
    try:
        names = inspect.signature(function).parameters
        return function(**{name: value for name, value in (offered or {}).items() if name in names})
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {_described(error)}; mend that line") from error


def build_named(reference: str, key: str, offered: Mapping[str, Any] | None = None) -> nn.Module:
    """A model of the user's; see `call_named`.

    Raises:
        ConfigError: as `call_named`, or something else than a model.
    """
    model = call_named(reference, key, offered)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{key} {reference} returned {type(model).__name__}: it must return a torch.nn.Module")
    if offered is not None:
        remember_arguments(model, offered)  # a saved model is built again where there are no data to ask
    return model


def tried(model: nn.Module, call: Callable[[nn.Module], Any], refusal: str) -> Any:
    """What a call of a user's model in evaluation mode returns; its modes and the random state stay as they were.

    Args:
        model: of the user's.
        call: calls it with a few sequences.
        refusal: what the message about a failure begins with.

    Raises:
        ConfigError: the call failed.
    """
    before = rng_state()
    try:
        with modes_kept(model), torch.no_grad():
            return call(model.eval())
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{refusal}: {' '.join(str(error).split())[:200]}") from error
    finally:
        set_rng_state(before)


def takes(reference: str, key: str, argument: str) -> bool:
    """Whether a function of the user's has an argument of this name; see `call_named` for the others.

    Raises:
        ConfigError: no such module or function.
    """
    return argument in inspect.signature(_found(reference, f"{key} {reference}")).parameters


def _found(reference: str, where: str) -> Callable[..., Any]:
    if not is_named(reference):
        raise ConfigError(f"{where}: not of the form package.module:function, such as mymodel:build for mymodel.py")
    module_name, _, name = reference.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{where}: no module {error.name} here or installed; call the command in the folder of "
                f"{error.name.replace('.', '/')}.py, or set PYTHONPATH to it"
            ) from None
        raise ConfigError(f"{where}: {_described(error)}; install it") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {_described(error)}; mend that line") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ConfigError(f"{where}: {module_name} has no function {name}; it has {', '.join(known[:6]) or 'none'}")
    return function


def _described(error: BaseException) -> str:
    """An error in the user's code, with the file and line where it arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or '?').name}, line {error.lineno}"
    return f"{type(error).__name__} in {place}: {' '.join(str(error).split())}"


__all__ = ["build_named", "call_named", "is_named", "takes", "tried"]
