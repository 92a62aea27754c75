"""Compression inside Hugging Face's Trainer: the three lines are marked (1), (2), (3).

    python examples/hf_trainer_mamba.py [--quick]

A Mamba reads Python's own help texts (they come with Python), byte by byte. The compressed model is saved for plain
transformers: `AutoModelForCausalLM.from_pretrained` loads it where compressm is not installed.
"""

import argparse
import math
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, Trainer, TrainingArguments, set_seed

from compressm.integrations.hf_scan import fast_scan
from compressm.integrations.transformers import CompressionCallback  # (1)


def windows(length: int) -> tuple[list[dict], list[dict]]:
    """Training and test windows of the text."""
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // length * length].view(-1, length)]
    border = len(rows) * 95 // 100
    return rows[:border], rows[border:]


def main(quick: bool) -> float:
    set_seed(0)
    train, test = windows(32 if quick else 256)
    config = MambaConfig(vocab_size=256, hidden_size=16 if quick else 96, num_hidden_layers=2, state_size=64)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model = MambaForCausalLM(config)
    arguments = TrainingArguments(
        "runs/hf_trainer_mamba",
        max_steps=40 if quick else 600,
        per_device_train_batch_size=4 if quick else 8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5 if quick else 30,
        save_strategy="no",
        report_to="none",
        disable_tqdm=quick,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test[:16] if quick else test)
    compression = CompressionCallback(trainer, states=16)  # (2)
    trainer.add_callback(compression)  # (3)
    with fast_scan(model):  # on a CPU, transformers' own way is hundreds of times slower
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    for event in compression.compressor.history:
        print(event)
    if saved := compression.compressor.savings():
        print(saved)
    dims = list(compression.compressor.state_dims.values())
    print(f"test loss {loss / math.log(2):.3f} bits per byte with states {dims}")

    model.save_pretrained("runs/hf_trainer_mamba/small")
    small = AutoModelForCausalLM.from_pretrained("runs/hf_trainer_mamba/small")
    prompt = torch.tensor([list(b"The ")])
    text = small.generate(prompt, max_new_tokens=8 if quick else 100, do_sample=False)[0]
    print(bytes(text.tolist()).decode(errors="replace"))
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small model, a few steps")
    main(parser.parse_args().quick)
