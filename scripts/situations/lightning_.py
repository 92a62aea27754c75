"""The Trainer of Lightning."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from compressm.cutting import state_dims
from compressm.integrations.lightning import CompressionCallback
from situations.trial import SCHEDULE, STEPS, Net, Trial, batch, row

HOST = "Lightning"
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        return self.net(*batch)["loss"]

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("score", -float(self.global_step))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data(count: int = STEPS) -> DataLoader[Any]:
    """Batches that are all alike, since Lightning reads its first batches again when it resumes within an epoch."""
    u, labels = batch(0)
    return DataLoader(TensorDataset(u.repeat(count, 1, 1), labels.repeat(count)), batch_size=4)


def host(trial: Trial, *callbacks: Any, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=trial.folder, accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        **{"max_steps": STEPS, "logger": False, "enable_checkpointing": False, **arguments},
    )  # fmt: skip


def trained(trial: Trial, *callbacks: Any, module: Any = None, train: Any = None, **arguments: Any) -> Any:
    rule = arguments.pop("rule", SCHEDULE)
    callback, module = CompressionCallback(**rule), Module() if module is None else module
    host(trial, callback, *callbacks, **arguments).fit(module, data() if train is None else train, data(2))
    trial.cut(callback.compressor)
    return module


@row(HOST, "max_steps")
def _(trial: Trial) -> None:
    trained(trial)


@row(HOST, "max_epochs instead of max_steps")
def _(trial: Trial) -> None:
    trained(trial, max_steps=-1, max_epochs=2, train=data(STEPS // 2))


@row(HOST, "accumulate_grad_batches")
def _(trial: Trial) -> None:
    trained(trial, accumulate_grad_batches=3, train=data(3 * STEPS))


@row(HOST, "gradient_clip_val")
def _(trial: Trial) -> None:
    trained(trial, gradient_clip_val=0.1)


@row(HOST, "precision bf16-mixed")
def _(trial: Trial) -> None:
    trained(trial, precision="bf16-mixed")


@row(HOST, "precision 64-true")
def _(trial: Trial) -> None:
    trained(trial, precision="64-true")


@row(HOST, "EMAWeightAveraging")
def _(trial: Trial) -> None:
    trained(trial, EMAWeightAveraging(decay=0.8))


@row(HOST, "fast_dev_run (observes, and makes no cut)", cuts=False)
def _(trial: Trial) -> None:
    callback = CompressionCallback(**SCHEDULE)
    host(trial, callback, fast_dev_run=2, max_steps=-1).fit(Module(), data(), data(2))
    trial.check(callback.compressor.state_dict()["steps"] == 2, "steps")
    trial.check(set(callback.compressor.state_dims.values()) == {16}, "cut")


class Stop(pl.Callback):
    """Ends a training that has no planned end."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= STEPS


@row(HOST, "max_epochs=-1 and max_time, without total_steps")
def _(trial: Trial) -> None:
    trained(trial, Stop(), max_steps=-1, max_epochs=-1, max_time={"minutes": 1})


@row(HOST, "max_epochs=-1 and max_time, with total_steps")
def _(trial: Trial) -> None:
    rule = {**SCHEDULE, "total_steps": STEPS}
    trained(trial, Stop(), max_steps=-1, max_epochs=-1, max_time={"minutes": 1}, rule=rule)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from zip(*batch(0), strict=True)


@row(HOST, "IterableDataset without a length, without total_steps")
def _(trial: Trial) -> None:
    trained(trial, Stop(), train=DataLoader(Endless(), batch_size=4), max_steps=-1, max_epochs=1)


@row(HOST, "IterableDataset without a length, with total_steps")
def _(trial: Trial) -> None:
    rule = {**SCHEDULE, "total_steps": STEPS}
    trained(trial, Stop(), train=DataLoader(Endless(), batch_size=4), max_steps=-1, max_epochs=1, rule=rule)


class Manual(Module):
    """Manual optimisation with an optimizer for the state space layers and one for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        head, body = self.optimizers()
        self.manual_backward(self.net(*batch)["loss"])
        for optimizer in (head, body):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        body = [p for name, p in self.net.named_parameters() if not name.startswith("decoder")]
        return torch.optim.SGD(self.net.decoder.parameters(), lr=0.1), torch.optim.AdamW(body, lr=1e-2)


@row(HOST, "manual optimisation without total_steps")
def _(trial: Trial) -> None:
    trained(trial, module=Manual())


@row(HOST, "manual optimisation with several optimizers and total_steps")
def _(trial: Trial) -> None:
    trained(trial, module=Manual(), max_steps=2 * STEPS, rule={**SCHEDULE, "total_steps": STEPS})


@row(HOST, "two optimizers of the same state space layers")
def _(trial: Trial) -> None:
    class Both(Manual):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    trained(trial, module=Both(), rule={**SCHEDULE, "total_steps": STEPS})


@row(HOST, "a second fit that goes on, with fraction=")
def _(trial: Trial) -> None:
    callback = CompressionCallback(fraction=0.25, window=0.5, cuts=2, total_steps=STEPS)
    trainer, module = host(trial, callback, max_steps=4), Module()
    trainer.fit(module, data())
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit_loop.max_epochs = 10
    trainer.fit(module, data())
    trial.cut(callback.compressor)


def resumed(trial: Trial, stop: int, **rule: Any) -> None:
    rule = {"window": 0.5, "cuts": 2, **rule}

    def run(checkpoint: Any) -> tuple[Module, CompressionCallback]:
        every = ModelCheckpoint(trial.folder / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callback, module = CompressionCallback(**rule), Module()
        trainer = host(
            trial, callback, *([every] if checkpoint is None else []), enable_checkpointing=checkpoint is None
        )
        trainer.fit(module, data(), ckpt_path=checkpoint)
        return module, callback

    unbroken, before = run(None)
    again, callback = run(trial.folder / "all" / f"step={stop}.ckpt")
    trial.same(again, unbroken)
    trial.cut(callback.compressor, [e.step for e in before.compressor.history if e.kind == "cut"], None)


@row(HOST, "ckpt_path before a cut")
def _(trial: Trial) -> None:
    resumed(trial, 2, states=4)


@row(HOST, "ckpt_path after a cut, with fraction=")
def _(trial: Trial) -> None:
    resumed(trial, 4, fraction=0.25)


@row(HOST, "ckpt_path while a cut is under observation")
def _(trial: Trial) -> None:
    def evaluate(model: Any) -> float:
        return float(min(state_dims(model).values()) > 9)

    resumed(trial, 4, tolerance=0.1, max_drop=0.5, check_after=2, evaluate=evaluate)


@row(HOST, "the best model is from before a cut (a warning says so)")
def _(trial: Trial) -> None:
    best = ModelCheckpoint(trial.folder / "best", monitor="score", mode="max")
    callback, module = CompressionCallback(**SCHEDULE), Module()
    trainer = host(trial, callback, best, enable_checkpointing=True, val_check_interval=2)
    trainer.fit(module, data(), data(1))
    trial.cut(callback.compressor)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.test(module, data(1), ckpt_path="best", verbose=False)
    trial.check(any("and 4 after the last cut" in str(one.message) for one in said), "no warning")
    trial.check(set(state_dims(module).values()) == {16}, "not the best model")


class Tuned(Module):
    """A module whose batch size and learning rate the Tuner tries."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.lr = 4, 1e-2

    def train_dataloader(self) -> DataLoader[Any]:
        u, labels = batch(0)
        return DataLoader(TensorDataset(u.repeat(STEPS, 1, 1), labels.repeat(STEPS)), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return data(1)


@row(HOST, "Tuner.lr_find before training")
def _(trial: Trial) -> None:
    callback, module = CompressionCallback(**SCHEDULE), Tuned()
    trainer = host(trial, callback)
    Tuner(trainer).lr_find(module, num_training=5, update_attr=False)
    trainer.fit(module)
    trial.cut(callback.compressor)


@row(HOST, "Tuner.scale_batch_size before training")
def _(trial: Trial) -> None:
    callback, module = CompressionCallback(**SCHEDULE), Tuned()
    trainer = host(trial, callback)
    Tuner(trainer).scale_batch_size(module, max_trials=2)
    trainer.fit(module)
    trial.cut(callback.compressor)
