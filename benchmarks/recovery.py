"""Perplexity after a cut by every criterion, after recovery, of slices of a sorted model, and with states in 8 bits.

    COMPRESSM_DATA=DIRECTORY python benchmarks/recovery.py [--model NAME] [--steps 400] [--recover 150] [--out FILE]

A Mamba-2 and a gated DeltaNet with attention (Qwen3-Next's own class), of toy width and of five million parameters, and
two of our own models, whose states have free bases, learn WikiText-2 byte by byte, each with one seed. Copies are cut
once to a half, a quarter and an eighth of the state, by `compressm.compress` and by every criterion of `criteria.py`,
sliced to the same sizes after sorting, and recovered. The directory holds ``text/wikitext2``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from byte_models import root, tokens
from criteria import criteria
from safetensors.torch import load_model, save_model
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.cutting import state_dims
from compressm.cutting.rise import cut_layers
from compressm.integrations.hf_scan import can_be_fast, enable_fast_scan
from compressm.layers import LanguageModel
from compressm.observing.inputs import calls
from compressm.observing.loss_evidence import LossEvidence, gather_evidence
from compressm.observing.over_data import gather
from compressm.observing.perplexity import perplexity

LENGTH, BATCH, RATE = 128, 16, 3e-3
SHARES, SEEN = (2, 4, 8), 4 * BATCH
_TOKENS: dict[str, Any] = {"vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), help="measure this one; the others keep their stored rows")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--recover", type=int, default=150)
    parser.add_argument("--no-lora", action="store_true", help="recover all parameters only, which takes half as long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"), help="where trained models are kept")
    parser.add_argument("--out", type=Path, default=Path("results/recovery.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = {name: tokens(root() / "wikitext2" / file) for name, file in FILES.items()}
    rows: dict[str, Any] = {}
    if arguments.model is not None and arguments.out.exists():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["models"]
    for title, build in MODELS.items():
        if arguments.model not in (None, title):
            continue
        torch.manual_seed(arguments.seed)
        model = build()
        kept = arguments.work / f"{title}-{arguments.steps}-seed{arguments.seed}"
        seconds = trained_once(model, text["train"], arguments.steps, arguments.seed, kept)
        data = Data(text, arguments.recover, arguments.seed)
        torch.manual_seed(arguments.seed)  # of the random signs by which the loss is looked at
        ways = WAYS[:1] if arguments.no_lora else WAYS
        row = served(model, data) if title in BASES else cut(model, data, arguments.recover, ways)
        settings = {"steps": arguments.steps, "recover": arguments.recover, "seed": arguments.seed}
        count = sum(parameter.numel() for parameter in model.parameters())
        rows[title] = {**settings, "parameters": count, "training_seconds": seconds, **row}
        print(title, rows[title], flush=True)
        known = {name: rows[name] for name in MODELS if name in rows}
        store(arguments.out, length=LENGTH, batch=BATCH, models=known)


FILES = {"train": "wiki.train.shuffled-articles.tokens.xz", "valid": "wiki.valid.tokens.xz"}


def mamba2(width: int = 64, states: int = 64, layers: int = 2, **changes: Any) -> Any:
    """Eight heads per layer."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    options: dict[str, Any] = {
        "hidden_size": width,
        "num_heads": 8,
        "head_dim": width // 4,
        "state_size": states,
        "n_groups": 1,
        "chunk_size": 32,
    }
    return Mamba2ForCausalLM(Mamba2Config(**{**_TOKENS, **options, "num_hidden_layers": layers, **changes}))


def qwen3_next(width: int = 64, states: int = 32, layers: int = 3, **changes: Any) -> Any:
    """Gated DeltaNet layers with one of attention between every two, and dense MLPs: two heads of keys, whose dimension
    is the number of states, four of values."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    options: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": 2 * width,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": width // 2,
        "linear_key_head_dim": states, "linear_value_head_dim": width // 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if index % 2 else "linear_attention" for index in range(layers)],
        "mlp_only_layers": list(range(layers)), "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    return Qwen3NextForCausalLM(Qwen3NextConfig(**{**_TOKENS, **options, **changes}))


def own(layer: str) -> LanguageModel:
    """Two layers of 64 channels, two heads of 32 states."""
    return LanguageModel(256, 64, 32, n_layers=2, layer=layer, n_heads=2)


MODELS: dict[str, Any] = {
    "Mamba-2": mamba2,
    "Gated DeltaNet (Qwen3-Next)": qwen3_next,
    "Mamba-2, 5 M": lambda: mamba2(width=256, states=64, layers=11),
    "Gated DeltaNet (Qwen3-Next), 5 M": lambda: qwen3_next(width=256, states=64, layers=7),
    "DeltaNet with linear keys": lambda: own("delta_net"),
    "Linear attention": lambda: own("linear_attention"),
}
BASES = ("DeltaNet with linear keys", "Linear attention")  # whose coordinates are free


class Data:
    """Batches to cut by, to recover on, and to measure on, none of which is among the others."""

    def __init__(self, text: dict[str, Tensor], recover: int, seed: int) -> None:
        windows = text["train"].unfold(0, LENGTH, LENGTH)
        draw = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed + 1))
        chosen = windows[draw[: SEEN + recover * BATCH]].contiguous()
        self.seen, self.text = list(chosen[:SEEN].split(BATCH)), list(chosen[SEEN:].split(BATCH))
        self.held_out = list(text["valid"].unfold(0, LENGTH, LENGTH)[::40][:128].contiguous().split(BATCH))

    def perplexity(self, model: nn.Module) -> float:
        """On held-out text, per byte."""
        return perplexity(model, list(calls(model, self.held_out)))


def trained_once(model: nn.Module, text: Tensor, steps: int, seed: int, kept: Path) -> int:
    """Train, or read the weights that an earlier call kept; the seconds that the training took."""
    weights, took = kept.with_suffix(".safetensors"), kept.with_suffix(".json")
    if not took.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        seconds = trained(model, text, steps, seed)
        save_model(model, weights)
        took.write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
    load_model(model, weights)
    return json.loads(took.read_text(encoding="utf-8"))["seconds"]


def trained(model: nn.Module, text: Tensor, steps: int, seed: int) -> int:
    """Train on random windows; the seconds it took. Layers of transformers keep our scan where there is one."""
    if can_be_fast(model):
        enable_fast_scan(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    windows, draw = text.unfold(0, LENGTH + 1, 1), torch.Generator().manual_seed(seed)
    model.train()
    started = time.perf_counter()
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=draw)]
        out: Any = model(batch[:, :-1])
        logits = out if isinstance(out, Tensor) else out.logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return round(time.perf_counter() - started)


WAYS = (("recovered", None), ("recovered_lora", 8))  # with the rank of the adapters


def cut(model: nn.Module, data: Data, recover: int, ways: Sequence[tuple[str, int | None]] = WAYS) -> dict[str, Any]:
    """Cuts, slices and recoveries of a model of transformers, and its states in 8 bits."""
    full = next(iter(state_dims(model).values()))
    whole = copy.deepcopy(model)
    order = compressm.sort_states(whole, data.seen)
    row: dict[str, Any] = {"states": full, "perplexity": data.perplexity(model), "sorted": data.perplexity(whole)}
    row["bits"] = {str(full): in_bits(model, data)}
    row["sizes"] = []
    moments, evidence = gather(model, data.seen), LossEvidence.of(gather_evidence(model, data.seen))
    for states in (full // share for share in SHARES):
        smaller, sliced = copy.deepcopy(model), copy.deepcopy(whole)
        compressm.compress(smaller, states=states, data=data.seen)
        order.slice(sliced, states=states)
        size: dict[str, Any] = {"states": states, "cut": data.perplexity(smaller), "slice": data.perplexity(sliced)}
        size["criteria"] = by_criteria(model, moments, evidence, states, data)
        size["slice_is_a_direct_cut"] = same_weights(model, states, data)
        row["bits"][str(states)] = in_bits(smaller, data)
        for name, rank in ways:
            student = copy.deepcopy(smaller)
            if can_be_fast(student):
                enable_fast_scan(student)
            done = compressm.recover(
                student, model, data.text, steps=recover, lora_rank=rank, lr=1e-3 if rank is None else 3e-3, quiet=True
            )
            for module in student.modules():
                module.__dict__.pop("forward", None)
            size[name] = data.perplexity(student)
            size[f"{name}_divergence"] = [done.divergence_first, done.divergence_last]
            size[f"{name}_seconds"] = round(done.seconds)
        row["sizes"].append(size)
    return row


def by_criteria(model: nn.Module, moments: Any, evidence: LossEvidence, states: int, data: Data) -> dict[str, float]:
    """The perplexity right after a cut by every criterion."""
    found: dict[str, float] = {}
    for name, changes, _ in criteria(model, moments, evidence, states, data.seen, "classification"):
        with cut_layers(model, changes) as smaller:
            found[name] = data.perplexity(smaller)
    return found


def same_weights(model: nn.Module, states: int, data: Data) -> bool:
    """Whether a slice has the weights of the direct cut of the sorted model by the same score, bit by bit."""
    sliced = copy.deepcopy(model)
    order = compressm.sort_states(sliced, data.seen[:1], selection="gramians")
    direct = copy.deepcopy(sliced)
    order.slice(sliced, states=states)
    compressm.compress(direct, states=states, data=data.seen[:1], selection="gramians")
    pairs = zip(sliced.parameters(), direct.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def served(model: nn.Module, data: Data) -> dict[str, Any]:
    """States in 8 bits, in the coordinates that training left, in the best ones, and after a cut in halves too."""
    full = next(iter(state_dims(model).values()))
    row: dict[str, Any] = {"states": full, "perplexity": data.perplexity(model), "bits": {}}
    smaller = copy.deepcopy(model)
    compressm.compress(smaller, states=full // 2, data=data.seen)
    row["cut"] = data.perplexity(smaller)
    for name, one in ((str(full), model), (str(full // 2), smaller)):
        equal = copy.deepcopy(one)
        compressm.equalise_states(equal, data.seen)
        row["bits"] |= {name: in_bits(one, data), f"{name} equalised": in_bits(equal, data)}
    return row


def in_bits(model: nn.Module, data: Data) -> list[dict[str, Any]]:
    """States in few bits, rounded after every token of one batch."""
    return [one.to_dict() for one in compressm.round_states(model, data.held_out[:1])]


if __name__ == "__main__":
    main()
