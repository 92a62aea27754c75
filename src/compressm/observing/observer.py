"""Observation of layers in ordinary forward and backward passes, and over given data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressm.adapters import LayerAdapter, find_layers
from compressm.errors import ConfigError, InvalidSystemError, UnsupportedModelError
from compressm.observing.calls import Call, LinearCall, as_evidence, call_of_layer
from compressm.observing.damage import LinearSample
from compressm.observing.hooks import OwnHook
from compressm.observing.layer_calls import named_arguments
from compressm.observing.masks import can_be_masked
from compressm.observing.moments import MEMORY
from compressm.observing.padding import Padding, mask_in
from compressm.runtime.compiled_graphs import Pause
from compressm.runtime.processes import gathered, summed_tensors
from compressm.theory.evidence import Covariances
from compressm.theory.fisher import MaskFisher

Terms = Literal["sequences", "tokens", "sum"]
Evidence = Covariances | MaskFisher
Kept = tuple[LinearSample, ...] | Tensor
Scale = float | Callable[[], float]

SAMPLE_BYTES = 2**27  # largest size of one layer's samples, unless a single pass is larger


class Observer:
    """Running evidence of a model's layers from data and the gradients of the loss.

    For linear layers the evidence is the second moments of states and adjoint states; for selective layers it is the
    Fisher matrix of a mask on their states. `observe_next` arms the observer for one forward pass and the backward pass
    that follows. Only sums are kept. Compiled graphs ignore hooks that were added later, so code compiled by
    `torch.compile` runs eagerly until that forward pass is over. Call `close` to stop waiting for it.

    Training computes the loss of a batch. The observer needs the loss of one sequence, and ``terms`` relates them. The
    loss of the batch is

    - ``terms="sequences"``: the mean over the batch's sequences, as for classifiers;
    - ``terms="tokens"``: the mean over all tokens, as in language models. A sequence's own loss is then the sum over
      its tokens;
    - ``terms="sum"``: the sum over the sequences.

    If the loss is multiplied by a factor before ``backward`` (a gradient scaler's factor, one over the number of
    accumulated batches), pass the factor to `observe_next`, or a function that returns it during the backward pass.

    Args:
        model: any model with layers that compressm knows; only read.
        terms: how the training's loss is computed, see above.
        sequences: how many sequences of a batch are used; by default all.
        memory: factor on all earlier evidence at every observation; 1 for plain sums.
        keep: the number of last sequences whose `samples` are kept for predictions; fewer where those of a layer would
            take more than 128 MB.

    Attributes:
        dropped: how many calls of layers were left out, because inputs, gradients or
            the layer's parameters were not finite.
        unsupported: names of the selective layers that cannot be masked.
        unlike: names of layers whose rows are not the model's sequences, such as single channels of them. They have no
            `samples`, since a row's effect on the loss of its sequence is unknown.

    Raises:
        ConfigError: unknown ``terms``, or numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Terms = "sequences",
        sequences: int | None = None,
        memory: float = MEMORY,
        keep: int = 0,
    ) -> None:
        if terms not in ("sequences", "tokens", "sum"):
            raise ConfigError(f"terms must be 'sequences', 'tokens' or 'sum'; got {terms!r}")
        if sequences is not None and sequences < 1:
            raise ConfigError(f"sequences must be at least 1, or None for all; got {sequences}")
        if not 0 <= memory <= 1:
            raise ConfigError(f"memory must be in [0, 1]; got {memory}")
        if keep < 0:
            raise ConfigError(f"keep must be at least 0; got {keep}")
        self.terms, self.sequences, self.memory, self.keep, self.dropped = terms, sequences, memory, keep, 0
        found = find_layers(model)
        self.unsupported = [
            name for name, (layer, adapter) in found.items() if adapter.needs_data and not can_be_masked(layer)
        ]
        self._layers = {name: both for name, both in found.items() if name not in self.unsupported}
        self._model, self._observed, self._passes = model, dict[str, Evidence](), 0
        self._samples: dict[str, dict[int, Kept]] = {}
        self.unlike: set[str] = set()
        self._counted = [0.0, 0.0]  # sequences, and predictions that the loss was made of
        self._hooks: list[RemovableHandle] = []
        self._pass = _Pass(model)
        self._pause = Pause()

    @property
    def layers(self) -> list[str]:
        """Names of the layers that can be observed."""
        return list(self._layers)

    @property
    def unseen(self) -> list[str]:
        """Names of the layers that could be observed but never were."""
        return [name for name in self._layers if name not in self._observed]

    def observe_next(self, loss_scale: Scale = 1.0, training_only: bool = True, *, frozen: bool = False) -> None:
        """Observe the next forward pass of the model, and its backward pass.

        Args:
            loss_scale: the factor by which the loss will be multiplied before ``backward``; or a function that returns
                it, called once during the backward pass, for factors that may change until then.
            training_only: wait for a pass in training mode.
            frozen: also observe layers for which no gradient is computed, by making their outputs require one.

        Raises:
            ConfigError: a scale that is not a positive number.
        """
        if not callable(loss_scale) and not (math.isfinite(loss_scale) and loss_scale > 0):
            raise ConfigError(f"loss_scale must be a positive number; got {loss_scale!r}")
        self.close()
        self._passes += 1
        if self._layers:
            self._pause.begin()
        self._pass = now = _Pass(self._model, self._passes, loss_scale, training_only, frozen)
        if not self._layers:
            return
        self._hooks.append(self._model.register_forward_pre_hook(_Hook(now, self._begun), with_kwargs=True))
        self._hooks.append(self._model.register_forward_hook(_Hook(now, self._called), always_call=True))
        for module in now.padding.tellers:
            self._hooks.append(module.register_forward_pre_hook(_Hook(now, _padding_told), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(_Hook(now, _padding_over), always_call=True))
        for name, (layer, adapter) in self._layers.items():
            seen = _Hook(now, _Seen(self, name, adapter))
            self._hooks.append(layer.register_forward_hook(seen, with_kwargs=True))

    def close(self) -> None:
        """Remove all hooks. The evidence is kept."""
        self._pass.over = True
        self._compiled_again()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def reset(self) -> None:
        """Drop all evidence."""
        self._observed.clear()
        self._samples.clear()
        self._counted = [0.0, 0.0]

    def evidence(self) -> dict[str, Evidence]:
        """The evidence by layer name. If `torch.distributed` is initialised, it is summed over all processes, and every
        process must call this at the same time.

        Raises:
            UnsupportedModelError: a layer was never observed; on all processes.
        """
        unseen = [name for names in gathered(self.unseen) for name in names]
        if unseen:
            raise UnsupportedModelError(
                f"no gradient has passed through {unseen[0]!r} yet: see that the loss depends on this layer, and in "
                "training that the model is called as a whole and in training mode; or leave it out with exclude="
                + (f"; {self.dropped} calls of layers were left out as not finite" if self.dropped else "")
            )
        return {name: _summed(self._observed[name]) for name in self._layers}

    def samples(self) -> dict[str, list[Kept]]:
        """The samples for predictions by `damage`, by layer name: one entry, in order, for every pass in which all
        layers were observed.

        For a linear layer an entry holds its calls; for a selective one, the gradients of a map on its states (see
        `masks`), shape ``(sequences, groups, n, n)``. Samples are those of this process only.
        """
        common = [set(passes) for passes in self._samples.values()]
        numbers = sorted(set.intersection(*common)) if common else []
        return {name: [passes[number] for number in numbers] for name, passes in self._samples.items()}

    @property
    def predictions_per_sequence(self) -> float:
        """How many predictions the loss of a sequence sums: its tokens, or 1."""
        sequences, predictions = self._counted
        return predictions / sequences if sequences else 1.0

    def count(self, sequences: int, predictions: float | None) -> None:
        """Count sequences, and the predictions that their losses sum; None for one per sequence."""
        self._counted[0] += sequences
        self._counted[1] += sequences if predictions is None else predictions

    def state_dict(self) -> dict[str, Any]:
        """The evidence and the samples, as dicts and lists of tensors."""
        samples = {
            name: {
                str(number): one if isinstance(one, Tensor) else [sample.tensors() for sample in one]
                for number, one in passes.items()
            }
            for name, passes in self._samples.items()
        }
        return {
            "evidence": {name: value.tensors() for name, value in self._observed.items()},
            "samples": samples,
            "counted": list(self._counted),
            "passes": self._passes,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the evidence that `state_dict` returned."""
        self._observed = {
            name: Covariances(**tensors) if "states" in tensors else MaskFisher(**tensors)
            for name, tensors in state_dict["evidence"].items()
        }
        self._samples = {
            name: {
                int(number): one if isinstance(one, Tensor) else tuple(LinearSample(*sample) for sample in one)
                for number, one in passes.items()
            }
            for name, passes in state_dict["samples"].items()
        }
        self._counted, self._passes = list(state_dict["counted"]), int(state_dict["passes"])

    def add(self, now: _Pass, name: str, call: Call, g: Tensor) -> None:
        """Add one call of a layer.

        Args:
            now: the pass of the call.
            name: of the layer.
            call: the call.
            g: gradient of the training's loss at the layer's output.
        """
        batch, length = g.shape[:2]
        tokens = batch * length if call.present is None else float(call.present.sum())
        terms = {"sequences": batch, "tokens": tokens, "sum": 1}[self.terms]
        if self.terms != "sum":
            self.count(batch, tokens if self.terms == "tokens" else None)
        call, g = call.first(self.sequences), g[: self.sequences]
        g = g.to(torch.promote_types(g.dtype, torch.float32)) * (terms / now.factor)
        if not (call.finite() and bool(torch.isfinite(g).all())):
            self.dropped += 1
            return
        before = now.before.setdefault(name, self._observed.get(name))
        now.runs[name] = call.run(g, now.runs.get(name))
        new = as_evidence(now.runs[name])
        self._observed[name] = new.after(before, self.memory)
        if now.sizes and batch not in now.sizes:
            self.unlike.add(name)
            self._samples.pop(name, None)
        if self.keep and name not in self.unlike:
            self._keep(now, name, call, g)

    def _keep(self, now: _Pass, name: str, call: Call, g: Tensor) -> None:
        """Keep the call for predictions, and at most the requested number of sequences."""
        passes = self._samples.setdefault(name, {})
        if isinstance(call, LinearCall):
            before = passes.get(now.number, ())
            assert isinstance(before, tuple)
            u = call.u.clone()  # the rows alone, without the rest of the batch
            passes[now.number] = (*before, LinearSample(u, g, call.lengths))
        else:
            run: Tensor = now.runs[name]
            if any(_sequences(one).shape[1:] != run.shape[1:] for one in passes.values()):
                passes.clear()  # from before a cut
            passes[now.number] = run
        while len(passes) > 1 and (
            sum(len(_sequences(one)) for one in passes.values()) > self.keep
            or sum(_bytes(one) for one in passes.values()) > SAMPLE_BYTES
        ):
            del passes[min(passes)]

    def _begun(self, now: _Pass, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called. A second call ends the pass. Calls without gradients do not count."""
        if not torch.is_grad_enabled():
            return
        if now.begun:
            self.close()
        now.begun = True
        now.padding.begin(mask_in(named_arguments(module, args, kwargs)))
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        now.sizes = {size for value in tensors for size in value.shape[:2]}  # sequences may be rows or columns

    def _called(self, *_: Any) -> None:
        """A call of the model is over, or failed."""
        if torch.is_grad_enabled():
            self._compiled_again()

    def _compiled_again(self) -> None:
        """The model's forward is over, so compiled graphs may be used again."""
        self._pause.end()


class _Pass:
    """One forward pass and its backward pass."""

    def __init__(
        self,
        model: nn.Module,
        number: int = 0,
        loss_scale: Scale = 1.0,
        training_only: bool = True,
        frozen: bool = False,
    ) -> None:
        self.number, self.loss_scale, self.training_only, self.frozen = number, loss_scale, training_only, frozen
        self.begun = self.over = False
        self.sizes: set[int] = set()  # one of them is the number of sequences; empty if it is not known
        self.padding = Padding(model)
        self.before: dict[str, Evidence | None] = {}  # evidence of each layer before this pass
        self.runs: dict[str, Any] = {}  # sums over each layer's calls so far

    @functools.cached_property
    def factor(self) -> float:
        """The factor of the loss. It is asked for in the backward pass, whose factor it then is."""
        return self.loss_scale() if callable(self.loss_scale) else self.loss_scale


class _Hook(OwnHook):
    """A hook that acts during one pass."""

    def __init__(self, now: _Pass, action: Callable[..., Any]) -> None:
        self.now, self.action = now, action

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or self.now.over or (self.now.training_only and not module.training):
            return None
        return self.action(self.now, module, *arguments)


class _Seen:
    """The action at a call of one layer."""

    def __init__(self, observer: Observer, name: str, adapter: LayerAdapter) -> None:
        self.observer, self.name, self.adapter = observer, name, adapter

    def __call__(
        self, now: _Pass, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not now.begun and self.name in now.runs:  # a second call of a part of the model
            self.observer.close()
            return
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(y, Tensor) or not torch.is_grad_enabled():
            return
        if not y.requires_grad:
            if not now.frozen:
                return
            y.requires_grad_()
        own = mask_in(named_arguments(layer, args, kwargs))  # where the model's parts are called, and not the model
        present = now.padding.of_layer(self.name) if own is None else own
        present = present if present is not None and present.shape == y.shape[:2] else None
        try:
            call = call_of_layer(layer, self.adapter, args, kwargs, present)
        except InvalidSystemError:  # the layer has diverged; do not interrupt training
            self.observer.dropped += 1
            return
        y.register_hook(lambda g: self.observer.add(now, self.name, call, g.detach()))


def _padding_told(now: _Pass, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    now.padding.told(module, named_arguments(module, args, kwargs))


def _padding_over(now: _Pass, *_: Any) -> None:
    now.padding.over()


def _sequences(kept: Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0].u


def _bytes(kept: Kept) -> int:
    parts = [kept] if isinstance(kept, Tensor) else [part for one in kept for part in (one.u, one.g)]
    return sum(part.numel() * part.element_size() for part in parts)


def _summed(observed: Evidence) -> Evidence:
    return type(observed)(**summed_tensors(observed.tensors()))


__all__ = ["Evidence", "Kept", "Observer", "Scale", "Terms"]
