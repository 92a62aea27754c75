"""Associative recall right after a cut by every criterion, and after some hundred more steps, in transformers' classes.

    python benchmarks/recall_after_the_cut.py [--seeds 3] [--steps 2500] [--after 200] [--slices] [--json FILE]

A Mamba-2 and a gated DeltaNet (Qwen3-Next's own class) learn to recall the values of keys that a sequence began with
(MQAR, arXiv 2312.04927), where the state is what limits them. Copies are cut once to a half, a quarter and an eighth of
the state by every criterion of `criteria.py`, from 64 sequences of the training data, and then train on. With
``--slices`` the states are sorted instead, by second moments and by the loss, and sliced to these sizes: at once, and
after so many steps on random prefixes. Models and seeds whose rows are stored are not made again.
"""

from __future__ import annotations

import argparse
import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from criteria import criteria
from recovery import mamba2, qwen3_next
from stored import store, stored_rows
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.cutting.rise import cut_layers
from compressm.integrations.hf_scan import fast_scan
from compressm.lab.data.recall import NO_ANSWER, generate
from compressm.observing.labels import fisher_probes
from compressm.observing.loss_evidence import LossEvidence, gather_evidence
from compressm.observing.over_data import gather

PAIRS, STATES, SHARES, BATCH, SEEN, RATE = 16, 32, (2, 4, 8), 32, 64, 4e-3
MODELS = ("Mamba-2", "Gated DeltaNet (Qwen3-Next)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--after", type=int, default=200)
    parser.add_argument("--slices", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    of_model = slices_of if arguments.slices else cuts_of
    name = "recall_slices" if arguments.slices else "recall_after_the_cut"
    arguments.json = arguments.json or Path(f"results/{name}.json")
    torch.set_num_threads(1)
    rows = stored_rows(arguments.json) if arguments.json.exists() else []
    for seed in range(arguments.seeds):
        for title in MODELS:
            if any(row["model"] == title and row["seed"] == seed for row in rows):
                continue
            recall, model = trained(title, seed, arguments.steps)
            row = {"model": title, "seed": seed, "states": STATES, "uncut": recall.accuracy(model)}
            rows.append({**row, "sizes": of_model(recall, model, seed, arguments.after)})
            print(rows[-1], flush=True)
            store(arguments.json, pairs=PAIRS, steps=arguments.steps, after=arguments.after, rows=rows)


def trained(title: str, seed: int, steps: int) -> tuple[Recall, Any]:
    """The task, and a model that has learnt it."""
    torch.manual_seed(seed)
    recall = Recall(PAIRS, seed)
    model = build(title, recall.vocabulary)
    recall.train(model, steps)
    return recall, model


def cuts_of(recall: Recall, model: Any, seed: int, after: int) -> list[dict[str, Any]]:
    """Every size and criterion: recall in percent after the cut, and after more training."""
    seen = recall.batches()
    torch.manual_seed(seed)  # of the random signs by which the loss is looked at
    moments = gather(model, seen)
    evidence = LossEvidence.of(gather_evidence(model, seen, loss=probes))
    sizes: list[dict[str, Any]] = []
    for states in (STATES // share for share in SHARES):
        size: dict[str, Any] = {"states": states}
        for name, changes, _ in criteria(model, moments, evidence, states, seen, rise):
            with cut_layers(model, changes) as shown:
                smaller = copy.deepcopy(shown)
            at_once = recall.accuracy(smaller)
            recall.train(smaller, after, RATE / 3)
            size[name] = [at_once, recall.accuracy(smaller)]
        sizes.append(size)
    return sizes


def slices_of(recall: Recall, model: Any, seed: int, after: int) -> list[dict[str, Any]]:
    """Every size and order: recall in percent of slices of the sorted model, of the same model trained on as it is, and
    of that trained on with random prefixes. The first row is of all states."""
    sizes: list[dict[str, Any]] = [{"states": STATES // share} for share in (1, *SHARES)]
    for name, loss in (("moments", None), ("loss", rise)):
        torch.manual_seed(seed)
        whole = copy.deepcopy(model)
        order = compressm.sort_states(whole, recall.batches(), loss=loss)
        longer, nested = copy.deepcopy(whole), copy.deepcopy(whole)
        recall.train(longer, after, RATE / 3)
        recall.train(nested, after, RATE / 3, prefixes=True)
        for size in sizes:
            found: list[float] = []
            for one in (whole, longer, nested):
                smaller = copy.deepcopy(one)
                if size["states"] < STATES:
                    order.slice(smaller, states=size["states"])
                found.append(recall.accuracy(smaller))
            size[name] = found
    return sizes


class Recall:
    """Sequences that begin with pairs of a key and a value: for training with 1, 2, 4 and so on up to all pairs."""

    def __init__(self, pairs: int, seed: int) -> None:
        self.pairs, self.length, self.vocabulary, self.seed = pairs, 4 * pairs, 4 * pairs, seed
        sizes = [2**power for power in range(pairs.bit_length())]
        parts = [generate(20_000 // len(sizes), one, self.length, self.vocabulary, 0) for one in sizes]
        order = torch.randperm(sum(len(one) for one, _ in parts), generator=torch.Generator().manual_seed(seed))
        self.tokens, self.answers = (torch.cat(one)[order].long() for one in zip(*parts, strict=True))
        self.held_out = [one.long() for one in generate(500, pairs, self.length, self.vocabulary, 1)]

    def train(self, model: nn.Module, steps: int, rate: float = RATE, prefixes: bool = False) -> None:
        """Go on for some steps, with a rate that rises and falls to zero by a cosine, in compiled scans; with the first
        states alone, of which a random number is drawn at every step, if ``prefixes``."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        draw = torch.Generator().manual_seed(self.seed)
        model.train()
        with fast_scan(model), compressm.random_prefixes(model, seed=self.seed) if prefixes else nullcontext():
            for _ in range(steps):
                chosen = torch.randint(len(self.tokens), (BATCH,), generator=draw)
                optimizer.zero_grad()
                model(input_ids=self.tokens[chosen], labels=self.answers[chosen]).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        model.eval()

    def batches(self) -> list[dict[str, Tensor]]:
        """Training sequences to choose states by."""
        pairs = zip(self.tokens[:SEEN].split(BATCH), self.answers[:SEEN].split(BATCH), strict=True)
        return [{"input_ids": tokens, "labels": answers} for tokens, answers in pairs]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Of recall on held-out sequences of all pairs, in percent."""
        tokens, answers = self.held_out
        found = torch.cat([model(one).logits.argmax(-1) for one in tokens.split(100)])[:, :-1]
        wanted = answers[:, 1:]
        asked = wanted != NO_ANSWER
        return round(float((found == wanted)[asked].double().mean()) * 100, 2)


def probes(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Their gradients have the Fisher information of the answers: nothing else in a sequence is predicted."""
    return fisher_probes(output.logits[:, :-1], "classification", batch["labels"][:, 1:] != NO_ANSWER)


def rise(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of every sequence: nothing but answers counts."""
    logits, wanted = output.logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.mT, wanted, reduction="none", ignore_index=NO_ANSWER).sum(1)


def build(title: str, vocabulary: int) -> Any:
    """Two layers of width 64 with 32 states; short convolutions are those of the classes."""
    if title == "Mamba-2":
        return mamba2(states=STATES, vocab_size=vocabulary)
    model = qwen3_next(
        states=STATES, layers=2, vocab_size=vocabulary, layer_types=["linear_attention"] * 2,
        use_cache=False,  # the class keeps none without attention
    )  # fmt: skip
    for name, bias in model.named_parameters():
        if name.endswith("dt_bias"):  # ones in the class, so that all is forgotten at once; as Mamba-2 begins instead
            steps = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            bias.data = steps + (-(-steps).expm1()).log()  # the inverse of softplus
    return model


if __name__ == "__main__":
    main()
