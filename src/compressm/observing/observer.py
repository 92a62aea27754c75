"""Observation of linear layers in an ordinary forward and backward pass, and over data at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressm.adapters import Adapter, find_layers
from compressm.adapters.base import layer_values
from compressm.distributed import gathered, world_size
from compressm.errors import ConfigError, UnsupportedModelError
from compressm.layers import SequenceClassifier
from compressm.layers.bidirectional import Bidirectional
from compressm.observing.adjoints import Reading, covariances, readings
from compressm.observing.labels import Likelihood, sampled_losses
from compressm.rng import rng_state, set_rng_state
from compressm.statistics import MEMORY, modes_kept
from compressm.systems import DiagonalSystem
from compressm.theory.evidence import Covariances

Terms = Literal["sequences", "tokens", "sum"]


class AdjointObserver:
    """Running second moments of the states and adjoint states of a model's linear layers.

    `observe_next` arms it for one forward pass and the backward pass that follows it: every linear layer then leaves
    its input and the gradient at its output. Nothing is kept of them but sums.

    What a loss of one sequence is must be known, since the loss that training computes is that of a batch:

    - ``terms="sequences"``: the mean over the batch's sequences, as for classifiers;
    - ``terms="tokens"``: the mean over all tokens, as in language models. A sequence's own loss is then the sum over
      its tokens;
    - ``terms="sum"``: the sum over the sequences.

    If the loss was multiplied by something before ``backward`` (a gradient scaler's factor, one over the number of
    accumulated batches), `observe_next` must be told.

    Args:
        model: any model with layers that compressm knows; only read.
        terms: what the training's loss is, see above.
        sequences: how many sequences of a batch are looked at; by default all.
        memory: weight of what was observed before, at every observation; 1 for plain sums.

    Attributes:
        dropped: how many runs of layers were left out, because inputs or gradients were not finite.

    Raises:
        ConfigError: unknown ``terms``, or numbers out of range.
    """

    def __init__(
        self, model: nn.Module, terms: Terms = "sequences", sequences: int | None = None, memory: float = MEMORY
    ) -> None:
        if terms not in ("sequences", "tokens", "sum"):
            raise ConfigError(f"terms must be 'sequences', 'tokens' or 'sum'; got {terms!r}")
        if sequences is not None and sequences < 1:
            raise ConfigError(f"sequences must be at least 1, or None for all; got {sequences}")
        if not 0 <= memory <= 1:
            raise ConfigError(f"memory must be in [0, 1]; got {memory}")
        self.terms, self.sequences, self.memory, self.dropped = terms, sequences, memory, 0
        found = find_layers(model).items()
        self._layers = {name: (layer, a) for name, (layer, a) in found if isinstance(a, Adapter)}
        self._model, self._observed = model, dict[str, Covariances]()
        self._hooks: list[RemovableHandle] = []
        self._pass = _Pass()

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers."""
        return list(self._layers)

    @property
    def unseen(self) -> list[str]:
        """Names of those of them that were never observed."""
        return [name for name in self._layers if name not in self._observed]

    def observe_next(self, loss_scale: float = 1.0, training_only: bool = True, *, frozen: bool = False) -> None:
        """Observe the next forward pass of the model, and its backward pass.

        Args:
            loss_scale: by what the loss will be multiplied before ``backward``.
            training_only: wait for a pass in training mode.
            frozen: observe layers too that no gradient is computed for: their outputs are made to require one.

        Raises:
            ConfigError: a scale that is no positive number.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise ConfigError(f"loss_scale must be a positive number; got {loss_scale!r}")
        self.close()
        self._pass = now = _Pass(loss_scale, training_only, frozen)
        if not self._layers:
            return
        self._hooks.append(self._model.register_forward_pre_hook(_Hook(self, now, self._begun), with_kwargs=True))
        flipped = [m.backwards for m in self._model.modules() if isinstance(m, Bidirectional)]
        backwards = {id(part) for module in flipped for part in module.modules()}
        for module in self._model.modules():
            if isinstance(module, SequenceClassifier):  # knows which of its inputs are padding
                self._hooks.append(module.register_forward_pre_hook(_Hook(self, now, _padding), with_kwargs=True))
        for name, (layer, adapter) in self._layers.items():
            seen = _Seen(self, now, name, adapter, id(layer) in backwards)
            self._hooks.append(layer.register_forward_hook(_Hook(self, now, seen)))

    def close(self) -> None:
        """Remove all hooks; what was observed stays."""
        self._pass.over = True
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def reset(self) -> None:
        """Forget what was observed."""
        self._observed.clear()

    def covariances(self) -> dict[str, Covariances]:
        """The moments by layer name, summed over the processes of `torch.distributed` where it is initialised; then
        every process must call this at the same time.

        Raises:
            UnsupportedModelError: a layer was never observed; on all processes.
        """
        unseen = [name for names in gathered(self.unseen) for name in names]
        if unseen:
            raise UnsupportedModelError(
                f"no gradient has passed through {unseen[0]!r} yet: call observe_next() before a forward and backward "
                "pass in training mode, and see that the loss depends on this layer"
                + (f"; {self.dropped} runs of layers were left out as not finite" if self.dropped else "")
            )
        return {name: _summed(self._observed[name]) for name in self._layers}

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as dicts of tensors."""
        return {name: value.tensors() for name, value in self._observed.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._observed = {name: Covariances(**tensors) for name, tensors in state_dict.items()}

    def _begun(self, now: _Pass, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called: for the first time, or again, and then all is over."""
        del module, args, kwargs
        if now.begun:
            self.close()
        now.begun = True

    def add(self, now: _Pass, name: str, layer: nn.Module, system: DiagonalSystem, run: Reading) -> None:
        """Add one call of a layer; its gradient is that of the loss that training computed."""
        batch, length = run.u.shape[:2]
        tokens = batch * length if run.present is None else float(run.present.sum())
        terms = {"sequences": batch, "tokens": tokens, "sum": 1}[self.terms]
        kept = slice(None, self.sequences)
        g = run.g[kept].to(torch.promote_types(run.g.dtype, torch.float32)) * (terms / now.loss_scale)
        u, present = run.u[kept], None if run.present is None else run.present[kept]
        if not bool(torch.isfinite(u).all() and torch.isfinite(g).all()):
            self.dropped += 1
            return
        for one in readings(layer, system, u, g, present):
            new = covariances(system, one, first=name not in now.done)
            before = self._observed.get(name)
            if before is not None and before.states.shape == new.states.shape:
                new = before.plus(new, 1.0 if name in now.done else self.memory)
            self._observed[name] = new
            now.done.add(name)


class _Pass:
    """One forward pass and its backward pass."""

    def __init__(self, loss_scale: float = 1.0, training_only: bool = True, frozen: bool = False) -> None:
        self.loss_scale, self.training_only, self.frozen = loss_scale, training_only, frozen
        self.begun = self.over = False
        self.present: Tensor | None = None
        self.done: set[str] = set()  # layers that a gradient has reached


class _Hook:
    """A hook that copies of the model do not inherit: they are nobody's training."""

    def __init__(self, observer: AdjointObserver, now: _Pass, action: Callable[..., Any]) -> None:
        self.observer, self.now, self.action = observer, now, action

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if self.now.over or (self.now.training_only and not module.training):
            return None
        return self.action(self.now, module, *arguments)


class _Seen:
    """What is done at a call of one layer."""

    def __init__(self, observer: AdjointObserver, now: _Pass, name: str, adapter: Adapter, flipped: bool) -> None:
        self.observer, self.name, self.adapter, self.flipped = observer, name, adapter, flipped
        del now

    def __call__(self, now: _Pass, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not now.begun and self.name in now.done:  # a part of the model was called, and is called again
            self.observer.close()
            return None
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            if not now.frozen:
                return None
            output.requires_grad_()
        u: Tensor = args[0].detach()
        system = self.adapter.read(layer_values(layer))  # now: it may be sharded, or another one, after the pass
        present = now.present if now.present is not None and now.present.shape == u.shape[:2] else None
        if present is not None and self.flipped:
            present = present.flip(1)

        def with_gradient(g: Tensor) -> None:
            self.observer.add(now, self.name, layer, system, Reading(u, g.detach(), system.C, present))

        output.register_hook(with_gradient)
        return None


def _padding(now: _Pass, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert isinstance(module, SequenceClassifier)
    now.present = module.present(*args, **kwargs)


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


def _summed(observed: Covariances) -> Covariances:
    if world_size() == 1:
        return observed
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensors = {name: value.to(device, copy=True) for name, value in observed.tensors().items()}
    for value in tensors.values():
        torch.distributed.all_reduce(value)
    return replace(observed, **{name: value.cpu() for name, value in tensors.items()})


def gather_adjoints(
    model: nn.Module,
    data: Iterable[Any],
    loss: Likelihood | Callable[[Any, Any], Tensor] = "classification",
    sequences: int | None = None,
) -> dict[str, Covariances]:
    """Moments of every linear layer of a model over some data; empty where there is no such layer.

    Args:
        model: called in evaluation mode; the modes of all its parts, gradients and the random state stay as they were.
        data: batches: a tensor, a mapping of keyword arguments, or a list or tuple whose first element is the input.
        loss: ``"classification"`` or ``"regression"``, with targets drawn from the model's own prediction, see
            `labels`; or a function of the model's output and the batch that returns the loss of every sequence, shape
            ``(batch,)``, for example with the batch's own labels.
        sequences: how many sequences of each batch are looked at; by default all.

    In several processes all of them must call this, each with its share of the data.

    Raises:
        UnsupportedModelError: no layer that compressm knows, or one that no gradient reached.
        ConfigError: an output that the likelihood does not fit.
    """
    observer = AdjointObserver(model, "sum", sequences, memory=1.0)
    if not observer.layers:
        return {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng = rng_state()
    try:
        with modes_kept(model), torch.enable_grad():
            model.eval()
            for parameter in trained:  # only gradients of activations are needed
                parameter.requires_grad_(False)
            for batch in data:
                observer.observe_next(training_only=False, frozen=True)
                _losses(model, batch, loss).sum().backward()
    finally:
        observer.close()
        for parameter in trained:
            parameter.requires_grad_()
        set_rng_state(rng)
    return observer.covariances()


def _losses(model: nn.Module, batch: Any, loss: Likelihood | Callable[[Any, Any], Tensor]) -> Tensor:
    if isinstance(batch, Mapping):
        inputs, output = next(iter(batch.values())), model(**batch)
        present = batch.get("attention_mask")
    else:
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        present, output = None, model(inputs)
    if callable(loss):
        losses = loss(output, batch)
        if losses.shape != inputs.shape[:1]:
            raise ConfigError(
                f"loss must return the loss of every sequence, shape {tuple(inputs.shape[:1])}; got "
                f"{tuple(losses.shape)}: use reduction='none', and sum over tokens"
            )
        return losses
    return sampled_losses(output, loss, present)


__all__ = ["AdjointObserver", "Terms", "gather_adjoints"]
