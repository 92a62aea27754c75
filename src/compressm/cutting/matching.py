"""Cut layers that learn to give the outputs of the layers before the cut, before a cut is written.

A truncation keeps states of the balanced system as they are. With other eigenvalues, inputs and outputs the same number
of states comes closer to the old layer. They are found by Adam, on inputs ``u`` of the old layer that were recorded:

    min  E_t ||y_t - y'_t||^2      over the layer's parameters with a state axis, from the truncation

Only the layer runs, on its own input; no other part of the model does. Tokens on whose output the loss does not depend
are left out. Every fourth sequence is held out, and the result is taken only where it is closer to the old layer there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressm.adapters import LayerAdapter, LayerChange
from compressm.cutting.replay import cut_copy, relative, sequence_of
from compressm.errors import InvalidSystemError
from compressm.observing.damage import LinearSample
from compressm.theory.systems import DiagonalSystem

_RATE = 1e-2  # Adam's at the first step; it falls to zero. 0.004 does as well on benchmarks/refinement.py
_SEQUENCES = 32  # of one step


@dataclass(frozen=True)
class Matched:
    """What a layer has learnt.

    Attributes:
        change: the change that writes it.
        system: that the layer then computes.
        before, after: relative error of its output on held-out sequences, by the truncation and by what was learnt.
    """

    change: LayerChange
    system: DiagonalSystem
    before: float
    after: float


def matched(
    layer: nn.Module, adapter: LayerAdapter, change: LayerChange, calls: Sequence[LinearSample], steps: int
) -> Matched | None:
    """A change to as many states whose output is closer to that of the layer.

    Args:
        layer: linear and time-invariant, before the cut; only read.
        adapter: the layer's.
        change: that writes the truncation.
        calls: recorded calls of the layer.
        steps: of Adam, each on 32 sequences.

    Returns:
        the change, with the same maps for the optimizer's state; None where nothing better was found, or where the
        weights of the layer are computed from other parameters.
    """
    smaller = cut_copy(layer, change)
    if not set(change.values()) <= dict(smaller.named_parameters()).keys():
        return None
    if any(parameter.dtype.itemsize < 4 for parameter in smaller.parameters()):
        smaller = smaller.float()
    learnt = {name: smaller.get_parameter(name).requires_grad_() for name in change.values()}
    device = next(iter(learnt.values())).device
    with torch.autocast(device.type, enabled=False):
        batches, held_out = _divided([_target(layer, call, device) for call in calls])
        before = _error(smaller, held_out)
        with torch.enable_grad():
            _train(smaller, list(learnt.values()), batches, steps)
        found = _with_values(change, {name: value.detach() for name, value in learnt.items()})
        after = _error(cut_copy(layer, found).to(device), held_out)
    if not after < before:
        return None
    try:
        system = adapter.system(cut_copy(layer, found))
    except InvalidSystemError:  # a layer whose parameters can be unstable
        return None
    return None if system is None else Matched(found, system, before, after)


@dataclass(frozen=True)
class _Target:
    """Sequences of a layer's input, the old layer's output, and where that counts, shape ``(batch, length, 1)``."""

    u: Tensor
    lengths: Tensor | None
    y: Tensor
    counts: Tensor

    def rows(self, rows: Tensor) -> _Target:
        lengths = None if self.lengths is None else self.lengths[rows]
        return _Target(self.u[rows], lengths, self.y[rows], self.counts[rows])

    def error(self, layer: nn.Module) -> Tensor:
        """Square error of another layer's output, summed over the tokens that count."""
        return ((_output(layer, self.u, self.lengths) - self.y).square() * self.counts).sum()

    @property
    def power(self) -> float:
        return float((self.y.square() * self.counts).sum())


@torch.no_grad()
def _target(layer: nn.Module, call: LinearSample, device: torch.device) -> _Target:
    u = call.u.to(device)
    y = _output(layer, u, call.lengths).to(torch.promote_types(u.dtype, torch.float32))
    counts = (call.g != 0).any(-1, keepdim=True).to(y)
    return _Target(u.to(y.dtype), None if call.lengths is None else call.lengths.to(device), y, counts)


def _output(layer: nn.Module, u: Tensor, lengths: Tensor | None) -> Tensor:
    return sequence_of(layer(u) if lengths is None else layer(u, lengths=lengths))


def _divided(targets: Sequence[_Target]) -> tuple[list[_Target], list[_Target]]:
    """Batches to learn from, and every fourth sequence, which is held out."""
    alike = defaultdict[tuple[int, bool], list[_Target]](list)
    for one in targets:
        alike[one.u.shape[1], one.lengths is None].append(one)
    batches, held_out = list[_Target](), list[_Target]()
    for group in alike.values():
        lengths = [one.lengths for one in group if one.lengths is not None]
        whole = _Target(
            torch.cat([one.u for one in group]),
            torch.cat(lengths) if lengths else None,
            torch.cat([one.y for one in group]),
            torch.cat([one.counts for one in group]),
        )
        rows = torch.arange(whole.u.shape[0], device=whole.u.device)
        batches += [whole.rows(part) for part in rows[rows % 4 != 3].split(_SEQUENCES)]
        if (apart := rows[3::4]).numel():
            held_out.append(whole.rows(apart))
    return batches, held_out or batches


@torch.no_grad()
def _error(layer: nn.Module, targets: Sequence[_Target]) -> float:
    """Relative error of a layer's output."""
    return relative(sum(float(one.error(layer)) for one in targets), sum(one.power for one in targets))


def _train(layer: nn.Module, parameters: list[Tensor], batches: Sequence[_Target], steps: int) -> None:
    """Train the layer on the batches in turn."""
    mean = sum(one.power for one in batches) / len(batches)
    optimizer = torch.optim.Adam(parameters, _RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        optimizer.zero_grad()
        (batches[step % len(batches)].error(layer) / max(mean, 1e-30)).backward()
        optimizer.step()
        schedule.step()


def _with_values(change: LayerChange, values: dict[str, Tensor]) -> LayerChange:
    """The same change with other values, which are no linear function of the old ones any more."""
    parameters = tuple(
        replace(
            part,
            values=tuple(values[name].to(old) for name, old in zip(part.names, part.values, strict=True)),
            map=None,
            kept=None,
        )
        for part in change.parameters
    )
    return replace(change, parameters=parameters)


__all__ = ["Matched", "matched"]
