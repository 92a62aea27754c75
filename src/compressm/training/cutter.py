"""How a cut is made while a model trains: observe the layers, plan, write, and inform all that depend on shapes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import nn
from torch.optim import Optimizer

from compressm.adapters import find_layers
from compressm.adapters.left_out import Choice
from compressm.adapters.plain import check_readable, check_wrappers
from compressm.adapters.registry import check_plain, warn_of_parts
from compressm.cutting import Plan, Report, plan_reduction, resize_states, state_dims
from compressm.cutting.carry import (
    Carry,
    Together,
    check_optimizer,
    check_trained,
    follow,
    forget_sizes,
    paired_layers,
)
from compressm.cutting.compression import check_rule
from compressm.cutting.decisions import must_be_alike
from compressm.cutting.fitting import fit_any_size
from compressm.cutting.optimizers import members_of
from compressm.cutting.replay import errors_on_samples
from compressm.cutting.sizes import checked_sizes, resized_parameters, sizes_for
from compressm.cutting.spectrum import balance_layers, check_cut_by_loss, check_match
from compressm.observing.loss_evidence import Gramians
from compressm.observing.observer import Terms
from compressm.runtime.compiled_graphs import allow_recompilation, graphs_compiled
from compressm.runtime.processes import check_replicas, from_first_rank, rank, rebuild_replicas
from compressm.runtime.warned import warn
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Method
from compressm.theory.possible_sizes import check_sizes
from compressm.theory.rank_rule import RankRule
from compressm.theory.selection import Selection
from compressm.training.averages import check_averages, guard_averages
from compressm.training.goal import Goal, initial_dims
from compressm.training.observations import Observations

log = logging.getLogger(__name__)
Action = TypeVar("Action", bound=Callable[..., Any])


def _of_chosen(method: Action) -> Action:
    """Let a method of `Cutter` see the chosen layers only."""

    @functools.wraps(method)
    def wrapper(self: Cutter, *args: Any, **kwargs: Any) -> Any:
        with self.choice.scope():
            return method(self, *args, **kwargs)

    return cast("Action", wrapper)


class Cutter:
    """Cuts one model that is being trained.

    Args:
        model, optimizer, followers: the parts of the training that a cut changes, see `Training`.
        rule: the rule that cuts will follow, to be checked against the model.
        method, selection, carry, gramians, loss_terms, match_steps: as in `Compressor`.

    Attributes:
        observations: of the layers, on which cuts are based.
        choice: the layers that are left out.

    Raises:
        UnsupportedModelError, UnsupportedOptimizerError, InvalidRankRuleError: this model could not be cut.
    """

    choice = Choice()

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Together,
        followers: tuple[nn.Module, ...],
        rule: RankRule,
        method: Method = "real",
        selection: Selection = "hankel",
        carry: Carry = "transform",
        gramians: Gramians = "white",
        loss_terms: Terms = "sequences",
        match_steps: int = 0,
    ) -> None:
        self.model, self.optimizer, self.followers = model, optimizer, followers
        self.method: Method = method
        self.selection: Selection = selection
        self.carry: Carry = carry
        self.match_steps = match_steps
        check_match(match_steps, gramians)
        if gramians == "loss":
            check_cut_by_loss(method, selection)
        check_rule(rule, gramians, "pass gramians='loss'")
        layers = find_layers(model)
        plain = {name: layer for name, (layer, _) in layers.items()}
        check_wrappers(model, plain)
        warn_of_parts(model)
        check_plain(plain)
        check_optimizer(optimizer, plain, carry)
        check_trained(optimizer, layers)
        check_replicas(model)
        check_averages(model, followers)
        dims = initial_dims(self.state_dims)
        check_sizes(rule, dims, must_be_alike(layers, rule), checked_sizes(model, rule, dims))
        self.observations = Observations(model, rule, gramians, loss_terms)
        self._graphs = 0  # graphs compiled so far; counted from the first cut on

    def free_sizes(self) -> None:
        """Let the model and its followers load weights of any state dimension, such as those saved after a cut."""
        fit_any_size(self.model)
        for follower in self.followers:
            paired_layers(fit_any_size(follower), self.model)

    @property
    @_of_chosen
    def state_dims(self) -> dict[str, int]:
        """Present state dimension of every layer, by its name in the model."""
        return state_dims(self.model)

    @_of_chosen
    def obstacle(self, goal: Goal, cuts: int) -> str:
        """Why so many cuts of this model will not arrive at the size that was asked for; see `Goal.obstacle`."""
        alike = must_be_alike(find_layers(self.model), goal.rule)
        return goal.obstacle(initial_dims(self.state_dims), cuts, alike, sizes_for(self.model, goal.rule))

    def trains_with(self, other: Cutter) -> bool:
        """Whether both cut layers of one training, and not the same ones."""
        optimizers = [{id(one) for one in members_of(cutter.optimizer)} for cutter in (self, other)]
        parameters = [{id(one) for one in cutter.model.parameters()} for cutter in (self, other)]
        layers = [{id(one) for one in cutter.layers()} for cutter in (self, other)]
        together = not optimizers[0].isdisjoint(optimizers[1]) or not parameters[0].isdisjoint(parameters[1])
        return together and layers[0].isdisjoint(layers[1])

    @_of_chosen
    def layers(self) -> list[nn.Module]:
        """The layers that are cut."""
        return [layer for layer, _ in find_layers(self.model).values()]

    @_of_chosen
    def resized_parameters(self) -> list[nn.Parameter]:
        """The parameters whose shapes a cut changes."""
        return resized_parameters(self.model)

    @property
    def unseen(self) -> bool:
        """Whether a layer that needs data has not been observed since the last cut."""
        return self.observations.unseen

    @_of_chosen
    def check_first_step(self) -> None:
        """Tell early what would otherwise become known only at the first cut.

        Raises:
            UnsupportedModelError: the model was sharded after the `Compressor` was built. A layer that cannot be
                observed is only warned of.
        """
        check_readable({name: layer for name, (layer, _) in find_layers(self.model).items()})
        if problems := self.observations.problems():
            warn(problems[0])

    @_of_chosen
    def spectra(self) -> dict[str, Balanced]:
        """Balance all layers as they are now."""
        loss = self.observations.loss()
        covariances = None if loss is None else loss.covariances
        return balance_layers(self.model, self.method, self.observations.statistics.moments(), covariances)

    @_of_chosen
    def plan(self, rule: RankRule) -> Plan:
        """Plan a cut by this rule, the same in all processes. Nothing is written."""
        check_replicas(self.model)
        statistics = self.observations.statistics
        moments, loss = statistics.moments(), self.observations.loss()  # sums over all ranks

        def decide() -> Plan:
            plan = plan_reduction(
                self.model, rule, self.method, moments=moments, selection=self.selection, loss=loss,
                match_steps=self.match_steps,
            )  # fmt: skip
            return plan.with_errors(errors_on_samples(self.model, plan.changes, statistics.samples)).cpu()

        return from_first_rank(decide)

    def write(self, plan: Plan) -> Report:
        """Write a planned cut and carry the optimizer's state over. If either fails, nothing is changed."""
        return plan.apply(self.model, self.optimizer, self.carry)

    def tell(self, plan: Plan) -> None:
        """Update everything that depends on a cut that was written: followers, observations, and holders of shapes."""
        for follower in self.followers:
            follow(follower, self.model, plan.changes)
        self.observations.reset()
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
        return {"state_dims": self.state_dims, "rank": rank(), **self.observations.state_dict()}

    @_of_chosen
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
        self.observations.load_state_dict(state)
        if state.get("rank", 0) != rank() and not self.observations.empty:
            # A cut adds up what all processes have observed, so these observations are counted more than once.
            log.warning(
                "process %d goes on with observations that are those of process %d, and its own are lost; to resume "
                "exactly, save compressor.state_dict() in every process, and load each process's own",
                rank(), state.get("rank", 0),
            )  # fmt: skip


__all__ = ["Cutter"]
