"""Killed at any step around a cut and resumed in a new process' objects: bit for bit the weights of the unbroken run.

The model holds a linear and a selective layer, so what a checkpoint must hold includes observations. A resumed run
builds everything anew at the model's first size, as a new process does, and once with the model built at the size of
the checkpoint.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compressm import Compressor
from compressm.cutting import resize_states, state_dims
from compressm.layers import LRU, Mamba

STEPS, CUTS = 16, (5, 10)
RULES: dict[str, dict[str, Any]] = {
    "tolerance": {"tolerance": 0.1},
    "states": {"states": 4},
    "fraction": {"fraction": 0.25, "multiple_of": 2},
    "max_error": {"max_error": 1.0},
    "total_states": {"total_states": 10},
    "max_drop": {"max_drop": 0.5, "check_after": 2, "evaluate": lambda m: float(min(state_dims(m).values()) > 9)},
}
SCHEDULE: dict[str, Any] = {"cuts": 2, "window": 10 / 16}
STOPS = range(CUTS[0] - 3, CUTS[0] + 4)


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(1, 4), nn.Linear(4, 2)
        self.linear, self.selective = LRU(4, 16, r_min=0.9), Mamba(4, d_state=16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.encoder(u)
        x = self.dropout(x + self.selective(x))
        logits = self.decoder((x + self.linear(x)).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def examples(count: int) -> tuple[Tensor, Tensor]:
    u = torch.randn(count, 12, 1, generator=torch.Generator().manual_seed(1))
    return u, (u.sum((1, 2)) > 0).long()


Run = tuple[dict[str, Tensor], list[tuple[str, int]], list[int]]  # weights, history, sizes
DATA = examples(4 * STEPS)


def ended(model: nn.Module, compressor: Compressor) -> Run:
    history = [(event.kind, event.step) for event in compressor.history]
    return copy.deepcopy(model.state_dict()), history, list(state_dims(model).values())


def own_loop(folder: Path, rule: dict[str, Any], resumed: int | None, small: bool) -> Run:
    return _loop(folder, rule, resumed, small, lambda *parts: parts, lambda loss: loss.backward())


def accelerate(folder: Path, rule: dict[str, Any], resumed: int | None, small: bool) -> Run:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    return _loop(folder, rule, resumed, small, accelerator.prepare, accelerator.backward)


def _loop(
    folder: Path, rule: dict[str, Any], resumed: int | None, small: bool, prepare: Callable[..., Any], backward: Any
) -> Run:
    saved = None if resumed is None else torch.load(folder / f"{resumed}.pt", weights_only=True)
    model = Net()
    if saved is not None and small:
        resize_states(model, saved["compressor"]["state_dims"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    network, optimizer = prepare(model, optimizer)
    compressor = Compressor(network, optimizer, STEPS, **SCHEDULE, **rule)
    step = 0
    if saved is not None:
        step = saved["step"]
        compressor.load_state_dict(saved["compressor"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
    network.train()
    while step < STEPS:
        u, labels = (part[4 * step : 4 * step + 4] for part in DATA)
        optimizer.zero_grad()
        backward(network(u, labels)["loss"])
        optimizer.step()
        step += 1
        event = compressor.step()
        if event is not None and event.kind == "rolled_back":
            step = event.restored_step
        if resumed is None:
            state = {"model": model, "optimizer": optimizer, "compressor": compressor}
            now = {"step": step, "rng": torch.get_rng_state(), **{k: v.state_dict() for k, v in state.items()}}
            path = folder / f"{step}.pt"
            if not path.exists():
                torch.save(now, path)
    return ended(model, compressor)


def trainer(folder: Path, rule: dict[str, Any], resumed: int | None, small: bool) -> Run:
    transformers = pytest.importorskip("transformers")
    from compressm.integrations.transformers import CompressionCallback

    arguments = transformers.TrainingArguments(
        output_dir=str(folder if resumed is None else folder / f"resumed-{resumed}"), max_steps=STEPS, save_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=1, dataloader_pin_memory=False, logging_strategy="no",
        save_strategy="steps" if resumed is None else "no",
    )  # fmt: skip
    data = [{"u": u, "labels": y} for u, y in zip(*DATA, strict=True)]
    host = transformers.Trainer(model=Net(), args=arguments, train_dataset=data)
    callback = CompressionCallback(host, **SCHEDULE, **rule)
    host.add_callback(callback)
    host.train(resume_from_checkpoint=None if resumed is None else str(folder / f"checkpoint-{resumed}"))
    return ended(host.model, callback.compressor)


def lightning(folder: Path, rule: dict[str, Any], resumed: int | None, small: bool) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = pytest.importorskip("lightning.pytorch")
        from lightning.pytorch.callbacks import ModelCheckpoint

        from compressm.integrations.lightning import CompressionCallback

        class Module(host.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net(dropout=0.0)  # Lightning stores no random state

            def training_step(self, batch: list[Tensor], index: int) -> Tensor:
                return self.net(*batch)["loss"]

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        module, callback = Module(), CompressionCallback(**SCHEDULE, **rule)
        every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        loop = host.Trainer(
            default_root_dir=folder, accelerator="cpu", callbacks=[callback, *([every] if resumed is None else [])],
            enable_checkpointing=resumed is None, logger=False, max_steps=STEPS, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        u, y = (part[:4].repeat(STEPS, *[1] * (part.ndim - 1)) for part in DATA)  # resumed, it reads from the start
        checkpoint = None if resumed is None else folder / f"step={resumed}.ckpt"
        loop.fit(module, DataLoader(TensorDataset(u, y), batch_size=4), ckpt_path=checkpoint)
    return ended(module, callback.compressor)


HOSTS = {"own loop": own_loop, "accelerate": accelerate, "trainer": trainer, "lightning": lightning}
QUICK = (("own loop", "fraction"), ("trainer", "fraction"), ("lightning", "fraction"))


@pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")  # that no more cuts are tried
@pytest.mark.parametrize(
    ("host", "rule", "stops"),
    [
        *((host, rule, (CUTS[0] - 1, CUTS[0], CUTS[0] + 1)) for host, rule in QUICK),
        *(pytest.param(host, rule, STOPS, marks=pytest.mark.exhaustive) for host in HOSTS for rule in RULES),
    ],
)
def test_killed_and_resumed_around_a_cut_it_ends_as_if_unbroken(
    tmp_path: Path, host: str, rule: str, stops: Sequence[int]
) -> None:
    run = HOSTS[host]
    unbroken, history, sizes = run(tmp_path, RULES[rule], None, False)
    cuts = [step for kind, step in history if kind == "cut"]
    assert cuts[0] == CUTS[0]
    assert rule == "max_drop" or (tuple(cuts) == CUTS and max(sizes) < 16)
    assert rule != "max_drop" or "rolled_back" in [kind for kind, _ in history]
    ways = (False, True) if host in ("own loop", "accelerate") else (False,)
    for stop in stops:
        for small in ways:
            weights, again, _ = run(tmp_path, RULES[rule], stop, small)
            differing = [name for name, value in unbroken.items() if not torch.equal(weights[name], value)]
            assert not differing, (stop, small)
            assert again == history, (stop, small)
