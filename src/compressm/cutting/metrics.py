"""Evaluation of a model by the user's `evaluate`: the state that is restored, and the values that are accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressm.errors import EvaluationError
from compressm.runtime.modes import modes_kept
from compressm.runtime.processes import from_first_rank, raised_on_all
from compressm.runtime.random_state import rng_state, set_rng_state
from compressm.runtime.warned import warn

Better = Literal["max", "min"]

_EXPECTED = "expected one real number, or one score per validation example"
FEWEST_SCORES = 10  # fewer numbers are taken for several metrics


class MetricWarning(UserWarning):
    """A metric is not finite, so it is not compared with others."""


def measure(model: nn.Module, evaluate: Callable[[nn.Module], Any]) -> float:
    """A metric of the model, see `measured`; the mean if ``evaluate`` returns one score per example.

    Raises:
        EvaluationError: as in `measured`.
    """
    return measured(model, evaluate)[0]


def sign_of(mode: Better) -> int:
    """1 if a higher metric is better, -1 if a lower one is."""
    return 1 if mode == "max" else -1


def measured(model: nn.Module, evaluate: Callable[[nn.Module], Any]) -> tuple[float, Tensor | None]:
    """Evaluate a model. The training modes of all its parts and the random state are restored afterwards.

    Returns:
        the value of ``evaluate(model)``: a real number, or a tensor or array of one element, and None. Or the mean of
        one score per example, and the scores, shape ``(N,)``. Values may be NaN or infinite.

    Raises:
        EvaluationError: it returned something else, or raised.
    """
    rng = rng_state()
    try:
        with modes_kept(model):
            value = evaluate(model)
    except EvaluationError:
        raise
    except Exception as error:
        raise EvaluationError(f"evaluate raised {_one_line(error)}; {_EXPECTED}") from error
    finally:
        set_rng_state(rng)
    scores = _as_scores(value)
    return (as_metric(value), None) if scores is None else (float(scores.double().mean()), scores)


def measured_together(model: nn.Module, evaluate: Callable[[nn.Module], Any]) -> tuple[float, Tensor | None]:
    """`measured` in every process of `torch.distributed` at once: the metric of rank 0, on all ranks.

    Raises:
        EvaluationError: on all ranks, if one of them raises it.
    """
    metric = raised_on_all(lambda: measured(model, evaluate))  # on all ranks, since it may sum their shares
    return from_first_rank(lambda: metric)


def warn_not_finite(metric: float, what: str) -> None:
    """Warn at once that a metric is not finite, with the place and the consequence."""
    advice = "see that weights, data and the metric itself are finite"
    warn(f"evaluate returned {metric} {what}; {advice}", MetricWarning)


def _as_scores(value: Any) -> Tensor | None:
    """One score per example, shape ``(N,)``: numbers in a list or tuple, or a tensor or array of one axis.

    None for anything else.
    """
    if isinstance(value, list | tuple):
        if len(value) < FEWEST_SCORES:
            return None
        try:  # numbers of Python, NumPy and torch alike
            return torch.tensor([as_metric(one) for one in value], dtype=torch.float32)
        except EvaluationError:
            return None
    if getattr(value, "ndim", None) != 1 or len(value) < FEWEST_SCORES:
        return None
    try:
        scores = torch.as_tensor(value)
    except (TypeError, ValueError):
        return None
    return None if scores.is_complex() else scores.detach().to("cpu", torch.float32)


def as_metric(value: Any) -> float:
    """A number that `evaluate` returned.

    Raises:
        EvaluationError: it is none.
    """
    if isinstance(value, str | bytes) or value is None:
        raise _refused(value)
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise _refused(value)
    size = getattr(value, "size", 1)  # NumPy arrays have it
    if isinstance(size, int) and size != 1:
        raise _refused(value)
    try:
        return float(value.item() if isinstance(getattr(value, "size", None), int) else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _refused(value) from error


def _refused(value: Any) -> EvaluationError:
    shape = getattr(value, "shape", None)
    what = repr(value).replace("\n", " ")
    what = what if len(what) <= 60 else f"{what[:57]}..."
    kind = type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"
    remedy = (
        "return one of its elements, their mean, or a score for each of 10 examples or more"
        if shape is not None or isinstance(value, tuple | list)
        else ""
    )
    remedy = "see that it returns its metric" if value is None else remedy or "return the number itself"
    return EvaluationError(f"evaluate returned {what} ({kind}); {_EXPECTED}: {remedy}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


__all__ = [
    "FEWEST_SCORES", "Better", "MetricWarning", "as_metric", "measure", "measured", "measured_together", "sign_of",
    "warn_not_finite",
]  # fmt: skip
