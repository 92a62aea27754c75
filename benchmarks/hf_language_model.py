"""A byte-level language model of Hugging Face transformers, trained by its Trainer: big, shrunk, small from scratch.

    python benchmarks/hf_language_model.py --model mamba --arm shrunk --seed 0

Arms: ``big`` keeps its states, and copies of it are cut once after the training, to a half, a quarter, an eighth;
``shrunk`` is cut to ``--small`` states in the first tenth of the steps, ``small`` has
so many from the start. Every run writes one JSON file, ``results/hf-language-model/DATA-MODEL-ARM-seedN.json``; a run
whose file is there is not repeated, and one that was interrupted goes on from its last checkpoint. The text is read
from ``$COMPRESSM_DATA/text``; tiny Shakespeare is split 90:5:5 in order, WikiText-2 as it comes. The validation text is
looked at while training, the test text once, at the end.
"""

from __future__ import annotations

import argparse
import copy
import lzma
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from stored import store
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import compressm
from compressm.cutting import state_dims
from compressm.integrations.hf_scan import fast_scan


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a text, byte by byte, one after the other without overlap."""

    def __init__(self, text: bytes, length: int, limit: int | None = None) -> None:
        tokens = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def splits(data: str, root: Path) -> tuple[bytes, bytes, bytes]:
    """Training, validation and test text."""
    if data == "shakespeare":
        text = (root / "text/tinyshakespeare/input.txt").read_bytes()
        first, second = len(text) * 90 // 100, len(text) * 95 // 100
        return text[:first], text[first:second], text[second:]
    names = ("train.shuffled-articles", "valid", "test")
    packed = ((root / f"text/wikitext2/wiki.{name}.tokens.xz").read_bytes() for name in names)
    train, valid, test = (lzma.decompress(content) for content in packed)
    return train, valid, test


def build(kind: str, width: int, layers: int, states: int) -> Any:
    """A model with fresh weights."""
    common = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": layers, "state_size": states}
    common |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "expand": 2}
    if kind == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**common))
    config = transformers.Mamba2Config(**common, head_dim=32, num_heads=2 * width // 32, n_groups=1, chunk_size=64)
    return transformers.Mamba2ForCausalLM(config)


class Clock(TrainerCallback):
    """Seconds of every step, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:  # before any cut
        self.seconds.append(time.perf_counter() - self.started)


def cut_once(trainer: Trainer, states: int, data: Windows, test: Windows) -> dict[str, Any]:
    """What a single cut of the trained model costs, without any training after it."""
    model = copy.deepcopy(trainer.model)
    with fast_scan(model):
        batches = [
            {"input_ids": torch.stack([row["input_ids"] for row in (data[i], data[i + 1])])} for i in range(0, 16, 2)
        ]
        compressm.compress(model, states=states, data=batches)
        loss = Trainer(model, trainer.args, eval_dataset=test).evaluate(metric_key_prefix="test")["test_loss"]
    return {"states": states, "test_loss": loss, "parameters": sum(p.numel() for p in model.parameters())}


def median(values: list[float]) -> float:
    """Of any number of values."""
    return float(np.median(values)) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["mamba", "mamba2"], required=True)
    parser.add_argument("--arm", choices=["big", "shrunk", "small"], required=True)
    parser.add_argument("--data", choices=["shakespeare", "wikitext2"], default="shakespeare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--big", type=int, default=64, help="states of the big model")
    parser.add_argument("--small", type=int, default=16, help="states of the shrunk and of the small model")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eval-windows", type=int, default=200, help="validation windows while training")
    parser.add_argument("--test-windows", type=int, default=None, help="test windows [all]")
    parser.add_argument("--results", type=Path, default=Path("results/hf-language-model"))
    parser.add_argument("--runs", type=Path, default=Path("runs/hf-language-model"))
    a = parser.parse_args()
    name = f"{a.data}-{a.model}-{a.arm}-seed{a.seed}"
    result = a.results / f"{name}.json"
    if result.exists():
        print(f"{result} is there")
        return
    root = Path(os.environ.get("COMPRESSM_DATA", "data"))
    train, valid, test = splits(a.data, root)
    torch.manual_seed(a.seed)
    model = build(a.model, a.width, a.layers, a.small if a.arm == "small" else a.big)
    initial = state_dims(model)
    arguments = TrainingArguments(
        output_dir=str(a.runs / name),
        max_steps=a.steps,
        per_device_train_batch_size=a.batch,
        per_device_eval_batch_size=a.batch,
        learning_rate=a.lr,
        lr_scheduler_type="cosine",
        warmup_steps=a.steps // 20,
        weight_decay=0.05,
        eval_strategy="steps",
        eval_steps=max(1, a.steps // 10),
        save_steps=max(1, a.steps // 10),
        save_total_limit=1,
        logging_steps=max(1, a.steps // 50),
        prediction_loss_only=True,
        report_to="none",
        seed=a.seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Windows(train, a.length),
        eval_dataset=Windows(valid, a.length, a.eval_windows),
    )
    clock, cuts = Clock(), None
    trainer.add_callback(clock)
    if a.arm == "shrunk":
        from compressm.integrations.transformers import CompressionCallback

        cuts = CompressionCallback(trainer, states=a.small)
        trainer.add_callback(cuts)
    started = time.perf_counter()
    with fast_scan(model):
        trainer.train(resume_from_checkpoint=any((a.runs / name).glob("checkpoint-*")))
        seconds = time.perf_counter() - started
        losses = {
            split: trainer.evaluate(Windows(text, a.length, a.test_windows), metric_key_prefix=split)[f"{split}_loss"]
            for split, text in (("validation", valid), ("test", test))
        }
    cut = []
    if a.arm == "big":
        windows = Windows(train, a.length), Windows(test, a.length, a.test_windows)
        cut = [cut_once(trainer, a.big // factor, *windows) for factor in (2, 4, 8)]
    tenth = max(1, a.steps // 10)
    compressor = None if cuts is None else cuts.compressor
    store(
        result,
        settings={key: value for key, value in vars(a).items() if key not in ("results", "runs")},
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        device=str(arguments.device),
        state_dims_before=initial,
        state_dims=state_dims(model),
        parameters=sum(p.numel() for p in model.parameters()),
        validation_loss=losses["validation"],
        test_loss=losses["test"],
        test_bits_per_byte=losses["test"] / math.log(2),
        test_perplexity=math.exp(losses["test"]),
        cut_once=cut,
        train_seconds=seconds,
        step_seconds={
            "first": median(clock.seconds[: max(1, tenth // 5)]),
            "last": median(clock.seconds[-tenth:]),
            "sum": sum(clock.seconds),
        },
        cuts=[] if compressor is None else [event.to_dict() for event in compressor.history],
        curve=trainer.state.log_history,
        compressm=compressm.__version__,
    )
    print(f"{name}: test perplexity per byte {math.exp(losses['test']):.3f}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
