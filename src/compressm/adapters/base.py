"""The base classes of adapters.

A linear time-invariant layer has a system that is read off its parameters. The recurrence of a selective layer depends
on the data. The bases `Adapter` and `SelectiveAdapter` give both kinds the same interface, so that no other package
distinguishes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.changes import (
    LayerChange,
    in_parameters,
    layer_values,
)
from compressm.adapters.cuts import Cuts, LinearCuts, SelectiveCuts
from compressm.adapters.geometry import of_signals, one_token
from compressm.errors import InvalidSystemError, UnsupportedModelError
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Balancing, Method, Reduction, balance
from compressm.theory.covariance import balance_covariances
from compressm.theory.evidence import Covariances
from compressm.theory.fisher import MaskFisher
from compressm.theory.geometry import Geometry
from compressm.theory.recurrence import Moments, SelectiveBalancing, SelectiveReduction, Signals, balance_selective
from compressm.theory.selection import Selection
from compressm.theory.systems import DiagonalSystem


class LayerAdapter(ABC):
    """The interface to one kind of layer; subclass `Adapter` or `SelectiveAdapter`.

    Attributes:
        layer_type: the layer's class, or its full name, such as ``"package.module.Class"``, if the package should not
            be imported.
        uniform: whether all such layers of a model must have the same state dimension, because its config and
            checkpoints hold only one.
        needs_data: whether `balance` needs moments of data.
    """

    layer_type: type[nn.Module] | str
    uniform: bool = False
    needs_data: bool = False

    @abstractmethod
    def state_dim(self, layer: nn.Module) -> int:
        """Number of states of the layer; complex states count once."""

    def unit(self, layer: nn.Module) -> int:
        """Every state dimension of a layer must be a multiple of this number."""
        del layer
        return 1

    @abstractmethod
    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        """A change to parameters of the shapes for a state dimension; load values afterwards. Nothing is written."""

    @abstractmethod
    def balance(
        self, layer: nn.Module, evidence: Moments | Covariances | None = None, method: Method = "real"
    ) -> Balanced:
        """Hankel singular values of a layer as it is now.

        Args:
            layer: only read.
            evidence: moments of the data where the adapter `needs_data`; elsewhere moments of states and adjoint
                states, or None for white noise.
            method: for linear time-invariant layers, see `compressm.theory.balancing`.

        Raises:
            InvalidSystemError: parameters or moments that are not finite, or an unstable layer.
            UnsupportedModelError: moments are needed, and there are none.
        """

    @abstractmethod
    def cuts(
        self,
        layer: nn.Module,
        balanced: Balanced,
        selection: Selection = "hankel",
        fisher: MaskFisher | None = None,
    ) -> Cuts:
        """The possible cuts of the layer.

        Args:
            layer: only read.
            balanced: the same layer, from `balance`.
            selection: how states are picked, see `compressm.cutting.plan.plan_reduction`.
            fisher: the Fisher matrix of a mask on the states of a selective layer, if known. It picks the states of
                layers that take no map of their vectors.
        """

    @abstractmethod
    def geometry(self, layer: nn.Module) -> Geometry:
        """The sizes of what the layer carries from one token to the next; see `Geometry`."""

    def system(self, layer: nn.Module) -> DiagonalSystem | None:
        """The system that the layer computes; None if its recurrence depends on the data."""
        del layer
        return None

    def run(self, layer: nn.Module, hidden: Tensor) -> Any:
        """Call the layer with its own input alone; override this if the layer needs more arguments."""
        return layer(hidden)

    def written(self, model: nn.Module) -> None:
        """Called after layers of a model were written. Update what the model stores beside them, such as a config."""
        del model  # nothing, by default

    def untold(self, model: nn.Module) -> str | None:
        """A warning if `written` cannot update what stores the layers' sizes, since it is not in ``model``."""
        del model


class Adapter(LayerAdapter):
    """Reads a linear time-invariant system out of one kind of layer, and plans how to write a smaller one back.

    Subclass it, set `layer_type`, implement the four methods, and `register` an instance.
    """

    @abstractmethod
    def read(self, values: Mapping[str, Tensor]) -> DiagonalSystem:
        """The system of a layer with these parameter values."""

    @abstractmethod
    def plan(self, values: Mapping[str, Tensor], reduction: Reduction) -> LayerChange:
        """The change after which the layer computes the reduced system. Nothing is written yet."""

    def system(self, layer: nn.Module) -> DiagonalSystem:
        """The system that the layer computes."""
        return self.read(layer_values(layer))

    def geometry(self, layer: nn.Module) -> Geometry:
        """Complex states, each two numbers; one system for all channels, or one for each."""
        states = self.state_dim(layer)
        dtype = next(value.dtype for value in layer_values(layer).values() if value.is_floating_point())
        return Geometry("lti", states, 2 * self.system(layer).lam.numel() // states, state_dtype=dtype)

    def balance(
        self, layer: nn.Module, evidence: Moments | Covariances | None = None, method: Method = "real"
    ) -> Balancing:
        """Balance the system that the layer computes, by white noise or by moments of its states and adjoint states."""
        if isinstance(evidence, Covariances):
            return balance_covariances(self.system(layer), evidence)
        return balance(self.system(layer), method)

    def cuts(
        self,
        layer: nn.Module,
        balanced: Balanced,
        selection: Selection = "hankel",
        fisher: MaskFisher | None = None,
    ) -> Cuts:
        """Truncations of the balanced system; see `LinearCuts`."""
        del fisher
        if not isinstance(balanced, Balancing):
            raise InvalidSystemError(_balanced_otherwise(layer, balanced, "Balancing"))
        return LinearCuts(layer_values(layer), balanced, selection, self.read, self.plan)


class SelectiveAdapter(LayerAdapter):
    """Computes the signals of a selective layer's recurrence, and plans how to write a smaller recurrence back.

    Subclass it, set `layer_type`, implement the four methods, and `register` an instance.

    Attributes:
        folds_into: whether any linear map of B can be folded into the layer's parameters, and all states decay alike.
            Otherwise states are selected.
        folds_out: whether any linear map of C can be folded in. This is impossible if a non-linearity stands between
            projection and recurrence; C is then selected like B.
        rotates: whether rotations are the only changes of basis that the recurrence allows, as in the delta rule. B is
            then projected by an orthonormal basis, and so is C unless ``folds_out`` allows any map of it.
        gated: whether the gates of the recurrence read its states; see `SelectiveCuts`.
        normed: whether the layer normalises B and C, so that a cut needs their second moments on data.
        entrance: a submodule that the layer calls once, with its own input. It lets the layer be observed when its
            ``forward`` is called directly. None if there is none; such calls are then refused.
        keys_convolved: whether B and C (keys and queries) pass through the layer's convolutions, so that a cut removes
            channels of these. False if the convolutions stand before the projections.
        keeps_last: whether the window of the layer's convolution, as it is carried, includes the present input.
        sorts: whether states can stand in any order in the layer, so that `sort_states` can sort them.
        state_axis: the axis of the state dimension in the state that a cache of transformers keeps.
        state_dtype: of the state that the layer carries; None for that of its activations.
    """

    needs_data = True
    folds_into: bool = False
    folds_out: bool = False
    rotates: bool = False
    gated: bool = False
    normed: bool = False
    entrance: str | None = None
    keys_convolved: bool = True
    keeps_last: bool = False
    sorts: bool = True
    state_axis: int = -1
    state_dtype: torch.dtype | None = None

    def maps(self, layer: nn.Module) -> tuple[bool, bool, bool]:
        """``folds_into``, ``folds_out`` and ``rotates`` of one layer; override it if they depend on its options."""
        del layer
        return self.folds_into, self.folds_out, self.rotates

    def leaves_choice(self, layer: nn.Module) -> bool:
        """Whether no criterion is always best for which states a layer keeps: none can be mapped onto the others, or
        its gates read them."""
        return self.gated or not any(self.maps(layer))

    @abstractmethod
    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        """The signals of the recurrence when the layer reads ``hidden``, its own input.

        Args:
            layer: the layer, which must not be changed; autograd is off.
            hidden: some sequences of a batch that the layer was called with, shape ``(batch, length, d_model)``.
        """

    def geometry(self, layer: nn.Module) -> Geometry:
        """From the layer's `signals` for one token, and from its convolutions."""
        with torch.no_grad():
            signals = self.signals(layer, one_token(layer))
        return of_signals(
            layer,
            signals,
            states=self.state_dim(layer),
            keys_convolved=self.keys_convolved,
            keeps_last=self.keeps_last,
            state_dtype=self.state_dtype,
        )

    def carried(self, layer: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The state from which a call of the layer continues, for `signals_after`; None if its states start at zero.

        Args:
            layer: the layer, about to be called.
            arguments: of the call, by name.

        Raises:
            UnsupportedModelError: the call continues from a state that the adapter cannot read.
        """
        for name in _CARRIERS:
            if not _is_fresh(arguments.get(name)):
                raise UnsupportedModelError(
                    f"a call goes on from the state in {name}, which cannot be read for {type(layer).__name__}; gather "
                    "moments from whole sequences, without it"
                )
        return None

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: Any) -> Signals:
        """As `signals`, for a call that continues from the state that `carried` returned."""
        raise NotImplementedError(f"{type(self).__name__}.carried reads states, and signals_after is not there")

    @abstractmethod
    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        """The change after which the recurrence gets ``into B``, ``out C`` and the kept states' rates. Nothing is
        written yet."""

    def balance(
        self, layer: nn.Module, evidence: Moments | Covariances | None = None, method: Method = "real"
    ) -> SelectiveBalancing:
        """Balance the recurrence by its moments on data; see `compressm.theory.recurrence`."""
        del method
        if not isinstance(evidence, Moments):
            raise UnsupportedModelError(f"{type(layer).__name__} is balanced with moments of data, and there are none")
        return balance_selective(evidence)

    def cuts(
        self,
        layer: nn.Module,
        balanced: Balanced,
        selection: Selection = "hankel",
        fisher: MaskFisher | None = None,
    ) -> Cuts:
        """Selections or maps of the states; see `SelectiveCuts`."""
        if not isinstance(balanced, SelectiveBalancing):
            raise InvalidSystemError(_balanced_otherwise(layer, balanced, "SelectiveBalancing"))
        fisher = fisher if self.leaves_choice(layer) else None
        return SelectiveCuts(
            layer_values(layer), balanced, selection, self.maps(layer), self.planned(layer), fisher, self.gated
        )

    def planned(self, layer: nn.Module) -> Callable[[Mapping[str, Tensor], SelectiveReduction], LayerChange]:
        """`plan`, translated to the parameters that the layer's weights are computed from; see `composed`."""
        return lambda values, reduction: in_parameters(layer, self.plan(values, reduction))


def _balanced_otherwise(layer: nn.Module, balanced: Balanced, expected: str) -> str:
    return f"{type(layer).__name__} was balanced as {type(balanced).__name__}; expected {expected}, from its adapter"


# Names of the arguments that pass a layer the state from which it continues.
_CARRIERS = ("cache_params", "past_key_values", "past_key_value", "inference_params", "initial_state", "initial_states")


def _is_fresh(carrier: Any) -> bool:
    """Whether a cache that a layer is given holds no state yet."""
    if carrier is None:
        return True
    length = getattr(carrier, "get_seq_length", None) or getattr(carrier, "__len__", None)
    if length is None:
        return getattr(carrier, "seqlen_offset", 1) == 0
    return not isinstance(carrier, Tensor) and int(length()) == 0
