"""Accelerate, in one process."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from compressm import Compressor
from situations.trial import SCHEDULE, STEPS, Net, Trial, batch, row

HOST = "Accelerate"


def loader(count: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*batch(0, 4 * count)), batch_size=4)


def prepared(**arguments: Any) -> tuple[Accelerator, Net, Any, Compressor]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, **arguments)
    model = Net()
    network, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    return accelerator, network, optimizer, Compressor(network, optimizer, STEPS, **SCHEDULE)


def accumulated(trial: Trial, batches: int, count: int, clip: bool = False, inside: bool = True) -> None:
    """Train with ``accumulate``; the compressor is called for every batch."""
    accelerator, network, optimizer, compressor = prepared(gradient_accumulation_steps=batches)
    data = accelerator.prepare(loader(count))
    for _ in range(-(-STEPS * batches // count)):
        for u, labels in data:
            with accelerator.accumulate(network):
                accelerator.backward(network(u, labels)["loss"])
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), 0.1)
                optimizer.step()
                if inside:
                    compressor.step()
                optimizer.zero_grad()
            if not inside:
                compressor.step()
    taken = max(int(state["step"]) for state in optimizer.optimizer.state.values())
    trial.check(compressor.state_dict()["steps"] == taken, f"{taken} steps of the optimizer")
    trial.cut(compressor)


@row(HOST, "prepare and backward")
def _(trial: Trial) -> None:
    accumulated(trial, 1, STEPS)


@row(HOST, "accumulate, with compressor.step() inside")
def _(trial: Trial) -> None:
    accumulated(trial, 4, 4 * STEPS)


@row(HOST, "accumulate, with compressor.step() after it")
def _(trial: Trial) -> None:
    accumulated(trial, 4, 4 * STEPS, inside=False)


@row(HOST, "accumulate, and an epoch that ends within a step")
def _(trial: Trial) -> None:
    accumulated(trial, 4, 6)


@row(HOST, "accumulate and clip_grad_norm_")
def _(trial: Trial) -> None:
    accumulated(trial, 2, 2 * STEPS, clip=True)


@row(HOST, "mixed precision in bfloat16")
def _(trial: Trial) -> None:
    accelerator, network, optimizer, compressor = prepared(mixed_precision="bf16")
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(network(*batch(step))["loss"])
        optimizer.step()
        compressor.step()
    trial.cut(compressor)


@row(HOST, "prepared scheduler")
def _(trial: Trial) -> None:
    accelerator, network, optimizer, compressor = prepared()
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, STEPS))
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(network(*batch(step))["loss"])
        optimizer.step()
        scheduler.step()
        compressor.step()
    trial.cut(compressor)
    trial.check(optimizer.param_groups[0]["lr"] < 1e-9, "the scheduler has stopped")


@row(HOST, "save_state and load_state after a cut")
def _(trial: Trial) -> None:
    def run(resume: bool) -> Compressor:
        accelerator, network, optimizer, compressor = prepared()
        accelerator.register_for_checkpointing(compressor)
        if resume:
            accelerator.load_state(str(trial.folder / "state"))
        for step in range(5 if resume else 0, STEPS):
            optimizer.zero_grad()
            accelerator.backward(network(*batch(step))["loss"])
            optimizer.step()
            compressor.step()
            if step == 4 and not resume:
                accelerator.save_state(str(trial.folder / "state"))
        return compressor

    unbroken, resumed = run(False), run(True)
    trial.same(resumed.model, unbroken.model)
    trial.cut(resumed)
