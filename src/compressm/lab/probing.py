"""A probe of the training that a configuration describes; see `compressm.training.probe`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compressm.errors import CheckpointError, ConfigError
from compressm.lab.config import Config, parse_config
from compressm.lab.data.datasets import load_data
from compressm.lab.data.sequences import BatchOrder, SequenceData, Split
from compressm.lab.runs.models import build_model, build_optimizer, build_scheduler
from compressm.lab.runs.objective import Objective
from compressm.lab.runs.place import accelerator
from compressm.lab.runs.same_settings import check_same
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
        ConfigError: unfit data or arguments, or a folder with the probe of another configuration.
    """
    if states is None and not isinstance(config.model.d_state, int):
        raise ConfigError(
            f"model.d_state = {config.model.d_state}: layers of several sizes; give --states, one size for all of them"
        )
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
        if self.data.task != "classification":
            raise ConfigError(
                f"compressm probe is for classifiers, and the task is {self.data.task}: use compressm.probe from "
                "Python, with a function that evaluates"
            )
        self.objective = Objective(config.loss, self.device)
        self.validation = _part(self.data.validation)

    def build(self, states: int) -> nn.Module:
        """A model of this size."""
        data, config = self.data, _changed(self.config, model={"d_state": states})
        return build_model(config, data.channels, data.n_classes, data.vocabulary, data.padding).to(self.device)

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

    def evaluate(self, model: nn.Module) -> Tensor:
        """Whether each validation example is classified correctly."""
        return self.data.right(model, self.validation, self.config.run.eval_batch_size)


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
    tree = config.model_dump()
    for section, values in {**sections, "compression": {"enabled": False}}.items():
        tree[section] = {**tree[section], **values}
    return parse_config(tree)


def _part(split: Split) -> Split:
    """Some examples of a split, always the same ones."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(split), generator=draw)[:_VALIDATION].sort().values.to(split.y.device)
    lengths = None if split.lengths is None else split.lengths[chosen]
    return Split(split.x[chosen], split.y[chosen], lengths)


__all__ = ["probe_config"]
