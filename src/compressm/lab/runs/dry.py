"""What `compressm train --dry-run` says: data, model, cuts and folder of a run, without training."""

from __future__ import annotations

from pathlib import Path

from compressm.cutting import state_dims
from compressm.lab.config import Config
from compressm.lab.data.datasets import load_data
from compressm.lab.data.sequences import SequenceData
from compressm.lab.runs.models import model_for
from compressm.lab.runs.tasks import learning_of
from compressm.training.options import SIZE_RULES
from compressm.training.schedule import cut_steps


def described(config: Config, folder: Path) -> str:
    """The plan of a run in a few lines. Data are read and the model is built, as training would do first.

    Args:
        config: from `load_config`.
        folder: where the run would go.

    Raises:
        ConfigError: as training would raise before its first step.
    """
    data = load_data(config.data)
    learning_of(data.task, config.run.metric)
    model = model_for(config, data)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dims = state_dims(model)
    states = ", ".join(f"{name} {n}" for name, n in dims.items())
    batches = max(1, len(data.train) // config.run.batch_size)
    return "\n".join(
        [
            f"data    {data.label}: {_sizes(data)}",
            f"model   {type(model).__name__}: {parameters:,} parameters; states: {states}",
            f"cuts    {_cuts(config, max(dims.values()))}",
            f"run     {config.run.steps} steps of {config.run.batch_size} sequences, "
            f"{config.run.steps / batches:.3g} epochs, into {folder}",
            "dry run: nothing was trained",
        ]
    )


def _sizes(data: SequenceData) -> str:
    length = data.train.x.shape[1]
    channels = "1 channel" if data.channels == 1 else f"{data.channels} channels"
    kind = channels if data.vocabulary is None else f"tokens below {data.vocabulary}"
    counts = f"{len(data.train)} for training, {len(data.validation)} for validation, {len(data.test)} for test"
    per = " per step" if data.per_step else ""
    learnt = {
        "classification": f"{data.n_classes} classes",
        "regression": f"{data.n_classes} numbers to predict{per}",
        "language": "the next one to predict",
    }[data.task]
    return f"{counts}; {length} steps, {kind}, {learnt}"


def _cuts(config: Config, most: int) -> str:
    compression = config.compression
    if not compression.enabled:
        return "none (compression.enabled is false)"
    if compression.states is not None and compression.states >= most:
        return f"none: states {compression.states}, and no layer has more than {most}"
    steps = cut_steps(config.run.steps, compression.cuts, compression.window, compression.start)
    rules = {name: getattr(compression, name) for name in (*SIZE_RULES, "max_drop")}
    given = ", ".join(f"{name} {value}" for name, value in rules.items() if value is not None)
    return f"after steps {', '.join(map(str, steps))}; {given}"


__all__ = ["described"]
