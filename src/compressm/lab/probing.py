"""A probe of the training that a configuration describes; see `compressm.training.probe`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compressm.cutting.metrics import FEWEST_SCORES
from compressm.errors import CheckpointError, ConfigError
from compressm.lab.config import Config, parse_config
from compressm.lab.data.datasets import load_data
from compressm.lab.data.sequences import BatchOrder, SequenceData, Split
from compressm.lab.named import takes
from compressm.lab.runs.models import build_optimizer, build_scheduler, model_for
from compressm.lab.runs.objective import Objective
from compressm.lab.runs.place import accelerator
from compressm.lab.runs.same_settings import check_same
from compressm.lab.runs.tasks import learning_of, scores_on
from compressm.runtime.files import write_json
from compressm.runtime.memory import keep_freed_memory
from compressm.training.probe import Probe, Task, probe

_VALIDATION = 2000  # at most so many validation examples; more cost time and hardly tell more


def probe_config(
    config: Config,
    *,
    states: Sequence[int] | None = None,
    share: float = 0.004,
    steps: int | None = None,
    seeds: int = 3,
    worth: float = 0.25,
    folder: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Probe:
    """Probe the training that a configuration describes, without compression.

    Args:
        config: from `load_config`.
        states: the sizes; by default ``model.d_state``, a quarter and a sixteenth of it.
        share: steps of each short training as a share of ``run.steps``.
        steps: the number itself, instead of the share.
        seeds: how many, from ``run.seed`` on.
        worth, folder, quiet: as in `probe`.

    Raises:
        ConfigError: unfit data or arguments, a model of the user's that takes no size, or a folder with the probe of
            another configuration.
    """
    if steps is None and not 0 < share <= 1:
        raise ConfigError(f"share = {share:g}: a share of run.steps in (0, 1] was expected, for example 0.004")
    own = config.model.build
    if own is not None and not takes(own, "model.build =", "states"):
        raise ConfigError(
            f"model.build = {own}: has no argument states, and a probe builds models of several sizes; add it, as in "
            "def build(states)"
        )
    if states is None and not isinstance(config.model.d_state, int):
        known = "not known of a model of your own" if own else f"{config.model.d_state}: layers of several sizes"
        raise ConfigError(f"model.d_state is {known}; give --states, such as --states 64,16,4")
    if folder is not None:
        _claim(Path(folder), config)
    keep_freed_memory()
    bench = _Bench(config)
    first = config.run.seed
    return probe(
        bench.build,
        bench.train,
        bench.evaluate,
        states=config.model.d_state if states is None and isinstance(config.model.d_state, int) else states or (),
        steps=max(1, round(share * config.run.steps)) if steps is None else steps,
        total_steps=config.run.steps,
        seeds=range(first, first + seeds),
        worth=worth,
        mode=bench.learning.score.mode,
        metric=bench.learning.score.name,
        folder=folder,
        quiet=quiet,
    )


class _Bench:
    """Builds, trains and evaluates as `compressm train` does, in one process."""

    def __init__(self, config: Config) -> None:
        self.config = config
        place = accelerator(config.run)
        if place.num_processes > 1:
            raise ConfigError(f"compressm probe runs in one process, not in {place.num_processes}: start it plainly")
        self.device = place.device
        self.data: SequenceData = load_data(config.data).to(self.device)
        self.learning = learning_of(self.data.task, config.run.metric)
        self.objective = Objective(config.loss, self.device, self.learning, config.run.autocast)
        self.validation = _part(self.data.validation)

    def build(self, states: int) -> nn.Module:
        """A model of this size."""
        if self.config.model.build is not None:
            return model_for(self.config, self.data, states).to(self.device)
        return model_for(_changed(self.config, model={"d_state": states}), self.data).to(self.device)

    def train(self, model: nn.Module, task: Task) -> None:
        """A short training, with the whole schedule in it."""
        rates = {"lr": task.rate * self.config.optimizer.lr}
        config = _changed(self.config, optimizer=rates, run={"steps": task.steps, "seed": task.seed})
        optimizer = build_optimizer(config.optimizer, model)
        scheduler = build_scheduler(config, optimizer)
        order = BatchOrder(len(self.data.train), config.run.batch_size, task.seed)
        model.train()
        for step in range(task.steps):
            indices = order.indices(step).to(self.device)
            u, y = self.data.batch(self.data.train, indices)
            optimizer.zero_grad()
            self.objective(model, u, y, step, self.data.lengths(self.data.train, indices)).backward()
            if config.optimizer.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            scheduler.step()

    def evaluate(self, model: nn.Module) -> Tensor | float:
        """The score of each validation example; the mean where these are too few to be compared in pairs."""
        scores = scores_on(self.learning, model, self.data, self.validation, self.config.run.eval_batch_size)
        return scores if len(scores) >= FEWEST_SCORES else float(scores.mean())


def _claim(folder: Path, config: Config) -> None:
    """Write down whose short trainings a folder holds, and refuse one that holds another configuration's."""
    path = folder / "config.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, config.model_dump(mode="json"))
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not the configuration of a probe ({error}); choose another folder") from error
    check_same(saved, config, folder)


def _changed(config: Config, **sections: Mapping[str, object]) -> Config:
    """The configuration with some other values, without compression."""
    tree = config.model_dump(exclude_unset=True)  # a key of its default would count as given beside model.build
    for section, values in {**sections, "compression": {"enabled": False}}.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree)


def _part(split: Split) -> Split:
    """Some examples of a split, always the same ones."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(split), generator=draw)[:_VALIDATION].sort().values.to(split.y.device)
    lengths = None if split.lengths is None else split.lengths[chosen]
    return Split(split.x[chosen], split.y[chosen], lengths)


__all__ = ["probe_config"]
