"""Recovery after a cut: some hundred steps in which the cut model learns the predictions of the uncut one.

The loss is the Kullback-Leibler divergence of the student's next-token distribution from the teacher's, in nats per
token (Hinton, Vinyals, Dean 2015, at temperature 1). Trained are all weights, or low-rank updates of the linear ones by
peft's LoRA (Hu et al. 2021), which are merged at the end. Nothing is drawn at random but the order of the batches. It
follows from the seed, so that a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.cutting import state_dims
from compressm.errors import CheckpointError, ConfigError, MissingExtraError, UnsupportedModelError
from compressm.observing.inputs import Call, calls
from compressm.observing.labels import divergences, prediction_of
from compressm.observing.perplexity import perplexity, present_in, tokens_of
from compressm.runtime.files import FORMAT, read_pair, write_pair
from compressm.runtime.modes import modes_kept
from compressm.runtime.progress import Bar

_FILES = ("recovery.safetensors", "recovery.json")
_RATES = {"all": 2e-4, "lora": 1e-3}
_WARMUP, _LAST = 0.1, 0.1  # share of the steps in which the rate rises; share of the rate at the end
_LARGEST_GRADIENT = 1.0
_HALF = (torch.float16, torch.bfloat16)
# peft refuses these modules of Mamba, whose kernels read the weight without calling the module.
_PASSED_OVER = ("out_proj", "conv1d")


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        steps: how many were made, over all runs.
        parameters: how many numbers were trained.
        divergence_first, divergence_last: mean divergence from the teacher in the first and last tenth of the steps, in
            nats per token.
        perplexity_before, perplexity_cut, perplexity_recovered: of the teacher, and of the student before and after, on
            held-out text; None without it.
        seconds: duration of this run.
    """

    steps: int
    parameters: int
    divergence_first: float
    divergence_last: float
    perplexity_before: float | None
    perplexity_cut: float | None
    perplexity_recovered: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"recovered in {self.steps} steps of {self.parameters:,} parameters: divergence from the uncut model "
        line += f"{self.divergence_first:.4f} → {self.divergence_last:.4f} nats per token"
        if self.perplexity_before is None or self.perplexity_cut is None or self.perplexity_recovered is None:
            return line
        line += f"\nperplexity on held-out text: {self.perplexity_before:.3f} uncut, {self.perplexity_cut:.3f} cut, "
        return f"{line}{self.perplexity_recovered:.3f} recovered"


def recover(
    model: nn.Module,
    teacher: nn.Module,
    data: Any,
    *,
    steps: int = 300,
    lora_rank: int | None = None,
    lr: float | None = None,
    held_out: Any = None,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    seed: int = 0,
    quiet: bool = False,
) -> Recovery:
    """Train a cut language model, in place, to predict as the uncut one does.

        teacher = copy.deepcopy(model)
        compressm.compress(model, states=64, data=batches)
        compressm.recover(model, teacher, batches, steps=300, held_out=other_batches)

    Trained by AdamW, with a rate that rises in the first tenth of the steps and then falls as a cosine, in evaluation
    mode, which has no dropout. Weights in half precision are trained in float32 and rounded at the end.

    Args:
        model: the cut model. Its parameters stay the same objects.
        teacher: the uncut one; only read.
        data: batches of tokens, as in `compress`. Each step takes one; they are shuffled, and read again when all were.
        steps: how many, in all.
        lora_rank: train updates of this rank to the linear layers, by peft, and merge them; None trains all weights.
        lr: the largest learning rate; by default 2e-4 for all weights, and 1e-3 for LoRA.
        held_out: batches to measure the perplexity on. They must not be in ``data``.
        folder: keep checkpoints here (safetensors and JSON), and go on from the last one if there is one. The model and
            the teacher must then be those that the recovery began with.
        save_every: steps between two of them.
        seed: of the order of the batches, and of LoRA's first values.
        quiet: show no progress bar.

    Returns:
        divergence and perplexity, before and after.

    Raises:
        ConfigError: impossible numbers, or data that the model cannot take.
        UnsupportedModelError: no language model, or no linear layer for LoRA.
        MissingExtraError: ``lora_rank`` without peft.
        CheckpointError: the folder holds another recovery.
    """
    started = time.perf_counter()
    batches = list(calls(model, data))
    check_recovery(model, batches[0], steps, lora_rank)
    if save_every < 1:
        raise ConfigError(f"save_every must be at least 1; got {save_every}")
    rate = lr if lr is not None else _RATES["all" if lora_rank is None else "lora"]
    settings = {
        "steps": steps, "lora_rank": lora_rank, "lr": rate, "seed": seed, "batches": len(batches),
        "data": _digest(batches), "states": state_dims(model), "start": _sizes(model) + _sizes(teacher),
    }  # fmt: skip
    measured = None if held_out is None else list(calls(model, held_out))
    before, cut = (None if measured is None else perplexity(one, measured) for one in (teacher, model))
    with _trained_parts(model, lora_rank, seed) as (student, trained):
        run = _Run(student, trained, rate, steps, None if folder is None else Path(folder), settings)
        run.resume()
        with Bar("recovering", steps, quiet=quiet) as bar, modes_kept(model), modes_kept(teacher):
            bar.skip(run.step)
            for module in (student, teacher):
                module.eval()
            while run.step < steps:
                run.learn(teacher, batches[_place(run.step, len(batches), seed)])
                if run.step % save_every == 0 or run.step == steps:
                    run.save()
                bar.advance()
    recovered = None if measured is None else perplexity(model, measured)
    first, last = run.divergences()
    count = sum(one.numel() for one in trained.values())
    return Recovery(steps, count, first, last, before, cut, recovered, time.perf_counter() - started)


def check_recovery(model: nn.Module, call: Call, steps: int, lora_rank: int | None) -> None:
    """Refuse what `recover` could not do, by one call of the model.

    Args:
        model: cut or not.
        call: of the model, on a batch of the data.
        steps, lora_rank: as in `recover`.

    Raises:
        ConfigError: no steps, or no rank.
        MissingExtraError: ``lora_rank`` without peft.
        UnsupportedModelError: no language model, or no linear layer for LoRA.
    """
    if steps < 1:
        raise ConfigError(f"recover must be at least 1 step; got {steps}")
    if lora_rank is not None:
        if lora_rank < 1:
            raise ConfigError(f"lora_rank must be at least 1; got {lora_rank}")
        _import_peft()
        _linear_layers(model)
    with modes_kept(model), torch.no_grad():
        model.eval()
        tokens, shape = tokens_of(call), tuple(prediction_of(call(model)).shape)
    if tokens is None or len(shape) != 3 or shape[:2] != tuple(tokens.shape):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns predictions of shape {shape}, and recovery compares the logits of every "
            "token, (batch, length, vocabulary): it is for language models; train other models on their labels"
        )


class _Run:
    """Training that can be left and taken up again."""

    def __init__(
        self,
        student: nn.Module,
        trained: dict[str, nn.Parameter],
        rate: float,
        steps: int,
        folder: Path | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.step = 0
        self._student, self._trained, self._folder, self._settings = student, trained, folder, settings
        self._optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
        self._rate, self._steps = rate, steps
        self._losses: list[float] = []

    def learn(self, teacher: nn.Module, call: Call) -> None:
        """One step on one batch."""
        with torch.no_grad():
            wanted = call(teacher)
        found = call(self._student)
        loss = divergences(wanted, found, "classification", present_in(teacher, call)).mean()
        self._optimizer.param_groups[0]["lr"] = self._rate * _share(self.step, self._steps)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained.values(), _LARGEST_GRADIENT)
        self._optimizer.step()
        self.step += 1
        self._losses.append(float(loss.detach()))

    def divergences(self) -> tuple[float, float]:
        """Means over the first and the last tenth of the steps."""
        tenth = max(1, len(self._losses) // 10)
        return sum(self._losses[:tenth]) / tenth, sum(self._losses[-tenth:]) / tenth

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        if self._folder is None:
            return
        tensors = {f"model.{name}": _stored(value) for name, value in self._student.named_parameters()}
        for name, parameter in self._trained.items():
            state = self._optimizer.state[parameter]
            tensors |= {f"{key}.{name}": _stored(state[key]) for key in ("exp_avg", "exp_avg_sq")}
        description = {"format": FORMAT, "step": self.step, "settings": self._settings, "losses": self._losses}
        write_pair(self._folder, *_FILES, tensors, description)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the folder's checkpoint, if it holds one.

        Raises:
            CheckpointError: it is that of another recovery, or damaged.
        """
        if self._folder is None or not (self._folder / _FILES[1]).exists():
            return
        description, tensors = read_pair(self._folder, *_FILES)
        held: Any = description.get("settings")
        for name, value in self._settings.items():
            if not isinstance(held, dict) or (name != "start" and held.get(name) != value):
                found: Any = held.get(name) if isinstance(held, dict) else held
                raise CheckpointError(
                    f"{self._folder} holds a recovery with {name} = {found!r:.80}, not {value!r:.80}: go on with the "
                    "same settings, or delete it"
                )
        if not isinstance(held, dict) or not _alike(held.get("start"), self._settings["start"]):
            raise CheckpointError(
                f"{self._folder} holds a recovery that began with other weights, of another model or of another cut: "
                "delete it, or go on with that model and that cut"
            )
        try:
            for name, parameter in self._student.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
            self.step, self._losses = int(description["step"]), [float(one) for one in description["losses"]]
            for name, parameter in self._trained.items():
                moments = {key: tensors[f"{key}.{name}"].to(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self._folder}: damaged ({error}); delete it and begin anew") from error


@contextmanager
def _trained_parts(
    model: nn.Module, lora_rank: int | None, seed: int
) -> Generator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """The model as it is trained, and the parameters that are; at the end all is as it was, with new values. After an
    error the updates of LoRA are dropped."""
    kept = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.dtype in _HALF else parameter.data
    student: Any = model if lora_rank is None else _with_lora(model, lora_rank, seed)
    if lora_rank is None:
        model.requires_grad_(True)
    try:
        yield student, {name: one for name, one in student.named_parameters() if one.requires_grad}
        if lora_rank is not None:
            student.merge_and_unload()
    except BaseException:
        if lora_rank is not None:
            student.unload()
        raise
    finally:
        for name, parameter in model.named_parameters():
            needs, dtype = kept[name]
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(needs)
            parameter.grad = None


def _with_lora(model: nn.Module, rank: int, seed: int) -> Any:
    peft = _import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=_linear_layers(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError('lora_rank needs peft: pip install "compressm[peft]"') from error
    return peft


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that LoRA can change.

    Raises:
        UnsupportedModelError: there are none.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        name
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and one is not head and name.rpartition(".")[2] not in _PASSED_OVER
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer that LoRA could change: train all weights, without lora_rank"
        )
    return found


def _place(step: int, count: int, seed: int) -> int:
    """The batch of a step: all of them in a new order in every round."""
    generator = torch.Generator().manual_seed(seed + step // count)
    return int(torch.randperm(count, generator=generator)[step % count])


def _share(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the largest."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * done)) / 2


def _stored(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()


_SAME = 1e-4  # relative difference of sizes: the same cut, computed again, may be rounded otherwise


@torch.no_grad()
def _sizes(model: nn.Module) -> list[float]:
    """The norm of every parameter, of about 65,536 elements from all over it: enough to tell models and cuts apart."""
    flat = (value.detach().flatten() for value in model.parameters())
    return [float(one[:: max(1, len(one) >> 16)].float().norm()) for one in flat]


def _alike(held: Any, sizes: list[float]) -> bool:
    if not isinstance(held, list) or len(held) != len(sizes):
        return False
    return all(
        isinstance(one, float | int) and math.isclose(one, size, rel_tol=_SAME)
        for one, size in zip(held, sizes, strict=True)
    )


def _digest(batches: list[Call]) -> str:
    """A digest of the tokens of the first and the last batch."""
    digest = hashlib.sha256()
    for call in (batches[0], batches[-1]):
        tokens = tokens_of(call)
        if tokens is not None:
            digest.update(tokens.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


__all__ = ["Recovery", "check_recovery", "recover"]
