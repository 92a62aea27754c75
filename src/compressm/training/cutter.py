"""How a cut is made while a model trains: observe the layers, plan, write, and inform all that depend on shapes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from compressm.adapters import find_layers
from compressm.adapters.base import check_plain
from compressm.cutting import Plan, Report, plan_reduction, resize_states, state_dims
from compressm.cutting.carry import Carry, check_optimizer, check_trained, follow, forget_sizes, paired_layers
from compressm.cutting.fitting import fit_any_size
from compressm.cutting.replay import errors_on_samples
from compressm.cutting.spectrum import balance_layers
from compressm.observing.moments import Sample, Statistics
from compressm.runtime.compiled_graphs import allow_recompilation, graphs_compiled
from compressm.runtime.processes import check_replicas, from_first_rank, rebuild_replicas
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Method
from compressm.theory.ranks import RankRule, check_sizes
from compressm.theory.selection import Selection
from compressm.training.averages import check_averages, guard_averages
from compressm.training.goal import initial_dims

log = logging.getLogger(__name__)


class Cutter:
    """Cuts one model that is being trained.

    Args:
        model, optimizer, followers: the parts of the training that a cut changes, see `Training`.
        rule: the rule that cuts will follow, to be checked against the model.
        method, selection, carry: as in `Compressor`.

    Attributes:
        statistics: the observations of the layers whose states depend on the data.

    Raises:
        UnsupportedModelError, UnsupportedOptimizerError, InvalidRankRuleError: this model could not be cut.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        followers: tuple[nn.Module, ...],
        rule: RankRule,
        method: Method = "real",
        selection: Selection = "hankel",
        carry: Carry = "transform",
    ) -> None:
        self.model, self.optimizer, self.followers = model, optimizer, followers
        self.method: Method = method
        self.selection: Selection = selection
        self.carry: Carry = carry
        layers = find_layers(model)
        plain = {name: layer for name, (layer, _) in layers.items()}
        check_plain(plain)
        check_optimizer(optimizer, plain, carry)
        check_trained(optimizer, layers)
        check_replicas(model)
        check_averages(model, followers)
        alike = [] if rule.per_layer else [name for name, (_, adapter) in layers.items() if adapter.uniform]
        check_sizes(rule, initial_dims(self.state_dims), alike)
        self.statistics = Statistics(model)
        self._graphs = 0  # graphs compiled so far; counted from the first cut on

    def free_sizes(self) -> None:
        """Let the model and its followers load weights of any state dimension, such as those saved after a cut."""
        fit_any_size(self.model)
        for follower in self.followers:
            paired_layers(fit_any_size(follower), self.model)

    @property
    def state_dims(self) -> dict[str, int]:
        """Present state dimension of every layer, by its name in the model."""
        return state_dims(self.model)

    @property
    def unseen(self) -> bool:
        """Whether a layer that needs data has not been observed since the last cut."""
        return bool(self.statistics.unseen)

    def observe(self, wanted: bool, step: int) -> None:
        """Switch the observation of layers on for the coming step, or off.

        Args:
            wanted: whether to observe.
            step: the number of that step, for messages.
        """
        if wanted:
            self.statistics.observe_next(when=f"step {step}")
        else:
            self.statistics.close()

    def warn_of_unseen_layers(self) -> None:
        """Warn early of a layer that cannot be observed, since the error would otherwise come only at the first cut."""
        problems = self.statistics.problems()
        if problems and not self.statistics.dropped:
            warnings.warn(problems[0], stacklevel=3)

    def spectra(self) -> dict[str, Balanced]:
        """Balance all layers as they are now."""
        return balance_layers(self.model, self.method, self.statistics.moments())

    def plan(self, rule: RankRule) -> Plan:
        """Plan a cut by this rule, the same in all processes. Nothing is written."""
        check_replicas(self.model)
        moments = self.statistics.moments()  # sums over all ranks

        def decide() -> Plan:
            plan = plan_reduction(self.model, rule, self.method, moments=moments, selection=self.selection)
            return plan.with_errors(errors_on_samples(self.model, plan.changes, self.statistics.samples)).cpu()

        return from_first_rank(decide)

    def write(self, plan: Plan) -> Report:
        """Write a planned cut and carry the optimizer's state over. If either fails, nothing is changed."""
        return plan.apply(self.model, self.optimizer, self.carry)

    def tell(self, plan: Plan) -> None:
        """Update everything that depends on a cut that was written: followers, observations, and holders of shapes."""
        for follower in self.followers:
            follow(follower, self.model, plan.changes)
        self.statistics.reset()
        self.tell_of_shapes()

    def tell_of_shapes(self) -> None:
        """Let DDP and `torch.compile`, which store the shapes of parameters, know that these have changed."""
        rebuild_replicas(self.model)
        guard_averages(self.model, self.followers)
        self._graphs = graphs_compiled()
        if self._graphs:
            allow_recompilation()
            log.info("the shapes of parameters have changed: compiled graphs are compiled anew at their next use")

    def new_graphs(self) -> int:
        """Number of graphs compiled since the last call or cut; 0 before the first cut."""
        new = graphs_compiled() - self._graphs if self._graphs else 0
        self._graphs += max(0, new)
        return max(0, new)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs."""
        samples = {name: [one.hidden, one.present] for name, one in self.statistics.samples.items()}
        return {"state_dims": self.state_dims, "moments": self.statistics.state_dict(), "samples": samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the layers the saved state dimensions, and restore their observations.

        Raises:
            CheckpointError: the state is of another model.
        """
        resized = self.state_dims != state["state_dims"]
        resize_states(self.model, state["state_dims"])
        if resized:
            forget_sizes(self.optimizer)
            rebuild_replicas(self.model)
            guard_averages(self.model, self.followers)
        self.statistics.load_state_dict(state["moments"])
        self.statistics.samples = {name: Sample(*one) for name, one in state.get("samples", {}).items()}


__all__ = ["Cutter"]
