"""The meaning of what optimizers keep: one table, which users can extend.

A cut changes coordinates: on the kept subspace ``old = W new``, so gradients change by ``G = W^T``. What an optimizer
keeps for a parameter follows from how it depends on gradients. The kinds, with ``G2`` the squares of G's entries:

=================  ======================================================  =============================================
kind               what it is                                              after a cut
=================  ======================================================  =============================================
``linear``         a sum or average of gradients                           ``G m``
``quadratic``      a sum or average of squared gradients                   ``G2 v``
``quadratic about  the same, where the optimizer subtracts the square of   ``G2 (v - m^2) + (G m)^2``
m``                the average ``m``
``magnitude``      an average or maximum of absolute gradients             ``sqrt(G2 u^2)``
``step``           sizes of an entry's steps, or their squares, where the  ``G2 (s v) / (G2 v)``, with second moments
                   size of the gradient does not matter                    ``v``, or 1 if there are none
``direction``      an average of gradients divided by the roots of         ``G (d sqrt(v)) / sqrt(G2 v)``
                   second moments
``value``          an earlier value or an average of the parameter         the new value, plus its distance from the
                                                                           parameter carried as a direction
``rows``,          factors of second moments: means over the last axis     those of ``G2 v``, with
``columns``        and over the one before it                              ``v = rows columns / mean(rows)``
``blocks``         means of second moments over equal blocks               those of ``G2 v``
``fresh``          follows from the parameter's shape                      as for a parameter of the new shape
=================  ======================================================  =============================================

So the new state is the one that the optimizer would have, had it trained the new coordinates. ``G2 v`` treats entries
as uncorrelated, since an optimizer stores no covariances. A cut that only selects states selects the entries of all
kinds, exactly. Numbers, such as step counters, are kept. What stands in no table is unknown, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from compressm.errors import UnsupportedOptimizerError

KINDS = (
    "linear", "quadratic", "magnitude", "step", "direction", "value", "rows", "columns", "blocks",
    "fresh",
)  # fmt: skip
ABOUT = "quadratic about "
# Kinds that the optimizer divides by, so that their size decides how long its steps are.
SECOND_MOMENTS = ("quadratic", "magnitude", "rows", "columns", "blocks")

_ADAM = {"exp_avg": "linear", "exp_avg_sq": "quadratic", "max_exp_avg_sq": "quadratic"}
_ADAN = {**_ADAM, "exp_avg_diff": "linear", "neg_pre_grad": "linear", "previous_grad": "linear"}
_EIGHT_BIT = {"qmap1": "fresh", "absmax1": "fresh", "qmap2": "fresh", "absmax2": "fresh"}
_BITSANDBYTES: dict[str, dict[str, str]] = {
    "Adam": {"state1": "linear", "state2": "quadratic"},
    "AdamW": {"state1": "linear", "state2": "quadratic"},
    "Lion": {"state1": "linear"},
    "SGD": {"state1": "linear"},
    "RMSprop": {"state1": "quadratic"},
    "Adagrad": {"state1": "quadratic"},
}

# By the package and the class.
_TABLE: dict[type[Optimizer] | str, Mapping[str, str]] = {
    "torch.SGD": {"momentum_buffer": "linear"},
    **{f"torch.{name}": _ADAM for name in ("Adam", "AdamW", "NAdam", "RAdam")},
    "torch.Adamax": {"exp_avg": "linear", "exp_inf": "magnitude"},
    "torch.Adagrad": {"sum": "quadratic"},
    "torch.RMSprop": {
        "square_avg": "quadratic about grad_avg", "grad_avg": "linear", "momentum_buffer": "direction",
    },
    "torch.Adadelta": {"square_avg": "quadratic", "acc_delta": "step"},
    "torch.Rprop": {"prev": "linear", "step_size": "step"},
    "torch.ASGD": {"ax": "value"},
    "torch.Adafactor": {"row_var": "rows", "col_var": "columns", "variance": "quadratic"},
    "torch.Muon": {"momentum_buffer": "linear"},
    "transformers.Adafactor": {
        "exp_avg_sq_row": "rows", "exp_avg_sq_col": "columns", "exp_avg_sq": "quadratic", "exp_avg": "direction",
    },
    **{
        f"schedulefree.{name}ScheduleFree{form}": {"z": "value", "exp_avg_sq": "quadratic", "x": "value", "y": "value"}
        for name in ("AdamW", "RAdam", "SGD")
        for form in ("", "Closure", "Reference")
    },
    "lion_pytorch.Lion": {"exp_avg": "linear"},
    "prodigyopt.Prodigy": {"exp_avg": "linear", "exp_avg_sq": "quadratic", "s": "linear", "p0": "value"},
    "adan_pytorch.Adan": {"m": "linear", "v": "linear", "prev_grad": "linear", "n": "quadratic"},
    "adan.Adan": _ADAN,
    "pytorch_optimizer.Adan": _ADAN,
    "adam_mini.Adam_mini": {
        "m": "linear", "v": "quadratic", "vmean": "blocks", "head_per_gpu": "fresh", "neuron_per_gpu": "fresh",
        "block_numel": "fresh",
    },
    "torchao._AdamBase": _ADAM,
    **dict.fromkeys(("apex.FusedAdam", "deepspeed.FusedAdam", "deepspeed.DeepSpeedCPUAdam"), _ADAM),
    **{
        f"bitsandbytes.{paged}{name}{bits}": {**kinds, **_EIGHT_BIT}
        for name, kinds in _BITSANDBYTES.items()
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    },
}  # fmt: skip

# Why some well-known optimizers stand in no table, by a part of the name.
_REASONS = {
    "soap": "its second moments live in the eigenbases of its preconditioners",
    "shampoo": "its preconditioners hold covariances along each axis",
    "kron": "its preconditioners are factors along each axis",
    "psgd": "its preconditioners are factors along each axis",
    "galore": "its moments are those of projected gradients",
    "apollo": "its moments are those of projected gradients",
    "prodigy": "it holds a part of the entries where slice_p is above 1; slice_p=1 works",
    "lbfgs": "it has one history of all parameters",
}


def register_optimizer_state(optimizer: type[Optimizer] | str, kinds: Mapping[str, str]) -> None:
    """Declare what an optimizer keeps for each parameter, so that cuts can carry it over.

        compressm.register_optimizer_state(MyAdam, {"mean": "linear", "mean_of_squares": "quadratic"})

    Subclasses inherit it. A later call for the same optimizer wins.

    Args:
        optimizer: its class, or its name: ``"Class"``, ``"package.Class"`` or ``"package.module.Class"``.
        kinds: the kind of each entry of ``optimizer.state[parameter]`` that is not a mere number, by its key:
            ``"linear"`` in the gradient, ``"quadratic"`` in it, or another kind of
            `compressm.cutting.optimizer_state`.

    Raises:
        UnsupportedOptimizerError: an unknown kind.
    """
    for key, kind in kinds.items():
        if kind not in KINDS and not kind.startswith(ABOUT):
            raise UnsupportedOptimizerError(
                f"kinds: {key!r} is of kind {kind!r}, which does not exist; expected one of {', '.join(KINDS)}, or "
                f"'{ABOUT}KEY'"
            )
    _TABLE[optimizer] = dict(kinds)


def kinds_of(optimizer: Optimizer) -> Mapping[str, str]:
    """The declared kinds of an optimizer's state; empty if it is in no table."""
    for base in type(optimizer).__mro__:
        package = base.__module__.partition(".")[0]
        for key in (base, f"{base.__module__}.{base.__qualname__}", f"{package}.{base.__name__}", base.__name__):
            if key in _TABLE:
                return _TABLE[key]
    return {}


def refuse_known(optimizer: Optimizer) -> None:
    """Refuse well-known optimizers whose state follows no cut.

    Raises:
        UnsupportedOptimizerError: says why.
    """
    if not kinds_of(optimizer) and (reason := _reason(optimizer)):
        raise UnsupportedOptimizerError(
            f"{_name(optimizer)} keeps what cannot follow a cut: {reason}; use AdamW for these layers, or pass "
            "carry='reset'"
        )


def unknown_state(optimizer: Optimizer, key: str, parameter: str) -> UnsupportedOptimizerError:
    """The error about state of an unknown kind."""
    reason = f" ({why})" if (why := _reason(optimizer)) else ""
    return UnsupportedOptimizerError(
        f"{_name(optimizer)} keeps '{key}' for {parameter}, and how that changes with the state basis is not "
        f"known{reason}: use AdamW for these layers, pass carry='reset', or declare it with "
        "compressm.register_optimizer_state"
    )


def _name(optimizer: Optimizer) -> str:
    """The class, after its module where another package has a class of torch's name."""
    kind = type(optimizer)
    known = hasattr(torch.optim, kind.__name__) and kind.__module__.partition(".")[0] != "torch"
    return f"{kind.__module__}.{kind.__name__}" if known else kind.__name__


def _reason(optimizer: Optimizer) -> str:
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()
    return next((why for part, why in _REASONS.items() if part in name), "")


def is_number(value: Any) -> bool:
    """Whether an entry of a state is no tensor but a number, flag, name or nothing, and so has no state axis."""
    if hasattr(value, "ndim"):
        return value.ndim == 0
    return value is None or isinstance(value, (bool, int, float, str))


__all__ = [
    "ABOUT",
    "KINDS",
    "SECOND_MOMENTS",
    "is_number",
    "kinds_of",
    "refuse_known",
    "register_optimizer_state",
    "unknown_state",
]
