"""The Trainer of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from compressm.cutting import state_dims
from compressm.integrations.transformers import CompressionCallback
from situations.trial import SCHEDULE, STEPS, Net, Trial, batch, row

HOST = "Trainer"
DATA = [{"u": u, "labels": label} for u, label in zip(*batch(0, 4 * STEPS), strict=True)]


def made(folder: Path, rule: dict[str, Any] | None = None, **arguments: Any) -> tuple[Trainer, CompressionCallback]:
    """A Trainer with compression."""
    given: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    settings = TrainingArguments(output_dir=str(folder), **{**given, **arguments})
    trainer = Trainer(model=Net(dropout=0.1), args=settings, train_dataset=DATA, eval_dataset=DATA[:8])
    callback = CompressionCallback(trainer, **(SCHEDULE if rule is None else rule))
    trainer.add_callback(callback)
    return trainer, callback


def trained(trial: Trial, steps: tuple[int, ...] = (3, 6), **arguments: Any) -> None:
    trainer, callback = made(trial.folder, **arguments)
    trainer.train()
    trial.cut(callback.compressor, steps)
    logged = [entry["step"] for entry in trainer.state.log_history if "compressm/cut_seconds" in entry]
    trial.check(logged == list(steps), f"cuts are logged at {logged}")


@row(HOST, "max_steps")
def _(trial: Trial) -> None:
    trained(trial)


@row(HOST, "num_train_epochs instead of max_steps")
def _(trial: Trial) -> None:
    trained(trial, max_steps=-1, num_train_epochs=1)


@row(HOST, "gradient_accumulation_steps and max_grad_norm")
def _(trial: Trial) -> None:
    trained(trial, gradient_accumulation_steps=2, max_grad_norm=0.1)


@row(HOST, "epochs that end within an accumulation")
def _(trial: Trial) -> None:
    trained(trial, gradient_accumulation_steps=5, max_steps=-1, num_train_epochs=4)


@row(HOST, "bf16")
def _(trial: Trial) -> None:
    trained(trial, bf16=True)


@row(HOST, "warm-up and a cosine schedule")
def _(trial: Trial) -> None:
    trained(trial, warmup_steps=3, lr_scheduler_type="cosine")


@row(HOST, "evaluation at every step")
def _(trial: Trial) -> None:
    trained(trial, eval_strategy="steps", eval_steps=1)


@row(HOST, "evaluation after every epoch")
def _(trial: Trial) -> None:
    trained(trial, eval_strategy="epoch", max_steps=-1, num_train_epochs=1)


@row(HOST, "eval_on_start")
def _(trial: Trial) -> None:
    trained(trial, eval_on_start=True, eval_strategy="steps", eval_steps=4)


@row(HOST, "batches grouped by length")
def _(trial: Trial) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=False))
    rows = [{"input_ids": torch.arange(length) % 29 + 3} for length in torch.arange(6, 6 + 4 * STEPS) % 7 + 4]

    def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    settings = TrainingArguments(
        output_dir=str(trial.folder), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="group_by_length", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate)
    callback = CompressionCallback(trainer, **SCHEDULE)
    trainer.add_callback(callback)
    trainer.train()
    trial.cut(callback.compressor)


@row(HOST, "torch_compile")
def _(trial: Trial) -> None:
    trained(trial, torch_compile=True, torch_compile_backend="eager")


@row(HOST, "gradient checkpointing of a Hugging Face model")
def _(trial: Trial) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=False))
    rows = [
        {"input_ids": (torch.arange(8) + index) % 32, "labels": (torch.arange(8) + index) % 32} for index in range(16)
    ]
    settings = TrainingArguments(
        output_dir=str(trial.folder), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    callback = CompressionCallback(trainer, **SCHEDULE)
    trainer.add_callback(callback)
    trainer.train()
    trial.cut(callback.compressor)


def resumed(trial: Trial, stop: int, move: bool = False, **rule: Any) -> None:
    """Resume from a checkpoint, and compare with the unbroken run."""
    rule = {"window": 0.5, "cuts": 2, **rule}
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    unbroken, before = made(trial.folder / "one", rule, **saving)
    unbroken.train()
    again, callback = made(trial.folder / ("two" if move else "one"), rule, **saving)
    if move:  # another run has a checkpoint of the same step
        other, _ = made(trial.folder / "two", rule, learning_rate=3e-2, **saving)
        other.train()
    again.train(resume_from_checkpoint=str(trial.folder / "one" / f"checkpoint-{stop}"))
    trial.same(again.model, unbroken.model)
    trial.cut(callback.compressor, [e.step for e in before.compressor.history if e.kind == "cut"], None)


@row(HOST, "resume_from_checkpoint before a cut")
def _(trial: Trial) -> None:
    resumed(trial, 2, states=4)


@row(HOST, "resume_from_checkpoint after a cut, with fraction=")
def _(trial: Trial) -> None:
    resumed(trial, 4, fraction=0.25)


def kept(model: Any) -> float:
    return float(min(state_dims(model).values()) > 9)


@row(HOST, "resume_from_checkpoint in another output_dir, while a cut is under observation")
def _(trial: Trial) -> None:
    resumed(trial, 4, move=True, tolerance=0.1, max_drop=0.5, check_after=2, evaluate=kept)


@row(HOST, "model_init and resume_from_checkpoint")
def _(trial: Trial) -> None:
    def build() -> tuple[Trainer, CompressionCallback]:
        built, _ = made(trial.folder, save_strategy="steps", save_steps=1)
        trainer = Trainer(model_init=lambda: Net(dropout=0.1), args=built.args, train_dataset=DATA)
        callback = CompressionCallback(trainer, **SCHEDULE)
        trainer.add_callback(callback)
        return trainer, callback

    unbroken, _ = build()
    unbroken.train()
    again, callback = build()
    again.train(resume_from_checkpoint=str(trial.folder / "checkpoint-4"))
    trial.same(again.model, unbroken.model)
    trial.cut(callback.compressor)


@row(HOST, "auto_find_batch_size, with fraction=")
def _(trial: Trial) -> None:
    trainer, callback = made(trial.folder, {"fraction": 0.25, "window": 0.5, "cuts": 2}, auto_find_batch_size=True)

    class OutOfMemory(TrainerCallback):
        raised = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4 and not self.raised:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    trainer.add_callback(OutOfMemory())
    trainer.train()
    trial.cut(callback.compressor)


@row(HOST, "load_best_model_at_end with the best model before a cut (a warning says so)")
def _(trial: Trial) -> None:
    scores = iter([0.9] + [0.1] * 20)
    trainer, callback = made(
        trial.folder, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    trial.check(any("and 4 after the last cut" in str(one.message) for one in said), "no warning")
    trial.check(set(state_dims(trainer.model).values()) == {16}, "not the best model")
    trial.cut(callback.compressor, states=None)


@row(HOST, "max_drop with the Trainer's own metric")
def _(trial: Trial) -> None:
    rule = {"states": 8, "cuts": 1, "window": 0.5, "max_drop": 0.1, "check_after": 3, "on_setback": "stop"}
    trainer, callback = made(trial.folder, rule, metric_for_best_model="score", greater_is_better=True)
    trainer.compute_metrics = lambda prediction: {"score": float(set(state_dims(trainer.model).values()) == {16})}
    trainer.train()
    kinds = [event.kind for event in callback.compressor.history]
    trial.check(kinds[:3] == ["cut", "rolled_back", "stopped"], f"{kinds}")
    trial.cut(callback.compressor, (6,), 16)


@row(HOST, "max_drop without an eval_dataset")
def _(trial: Trial) -> None:
    trainer, _ = made(trial.folder, {"max_drop": 0.1, "cuts": 1, "window": 0.5, "check_after": 2})
    trainer.eval_dataset = None
    trainer.train()


@row(HOST, "save_total_limit")
def _(trial: Trial) -> None:
    trained(trial, save_strategy="steps", save_steps=1, save_total_limit=2)
    trial.check(len(list(trial.folder.glob("checkpoint-*"))) == 2, "checkpoints were not removed")


@row(HOST, "a checkpoint whose tensors are of another run")
def _(trial: Trial) -> None:
    rule = {"states": 8, "max_drop": 1.0, "cuts": 1, "window": 0.5, "check_after": 4, "evaluate": lambda model: 0.0}
    for name in ("one", "two"):
        trainer, _ = made(trial.folder / name, rule, save_strategy="steps", save_steps=8)
        trainer.train()
    folders = [trial.folder / name / "checkpoint-8" / "compressm" for name in ("one", "two")]
    shutil.rmtree(folders[0])
    shutil.copytree(folders[1], folders[0])
    trainer.train(resume_from_checkpoint=str(folders[0].parent))
