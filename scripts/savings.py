"""Write docs/savings.md: what cuts saved in the stored trainings, and what they would save in larger models.

    python scripts/savings.py              write the page from stored results
    python scripts/savings.py --measure    count the operations of larger layers first, and store them

Larger models are never trained: the operations of one of their layers are counted in one training step of a short
sequence (`compressm.training.step_cost`), and multiplied.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import compressm
from compressm.cutting.serving import human
from compressm.lab.reproduce import experiment, read_results
from compressm.lab.reproduce.scale import scale
from compressm.lab.reproduce.tables import Row, operations, rows
from compressm.layers import LanguageModel
from compressm.training.step_cost import step_cost

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "results" / "savings.json", ROOT / "docs" / "savings.md"
COMMAND = "python scripts/savings.py"
WATTS = 6  # of one busy core: 180 W over the 32 cores of a server's processor
CUT_AFTER = 0.1  # share of the steps that a larger model makes uncut
TOKENS = 512  # counted per step, whole chunks of every scan; operations are in proportion to it


@dataclass(frozen=True)
class Large:
    """A language model of a published size.

    Attributes:
        title, source: what it is, and where its sizes are from.
        layer, layers, width, vocabulary: of the model.
        states: at the start, and after the cuts that are shown.
        options: of the layer.
    """

    title: str
    source: str
    layer: str
    layers: int
    width: int
    vocabulary: int
    states: tuple[int, ...]
    options: dict[str, Any]

    @property
    def values(self) -> int:
        """Numbers that a layer keeps per state."""
        return int(self.width * self.options["expand"])


LARGE = (
    Large(
        "Mamba-2, 130 M", "state-spaces/mamba2-130m", "mamba2", 24, 768, 50_288, (128, 64, 32, 16),
        {"expand": 2, "head_dim": 64},
    ),
    Large(
        "Mamba-2, 2.7 B", "state-spaces/mamba2-2.7b", "mamba2", 64, 2560, 50_288, (128, 64, 32, 16),
        {"expand": 2, "head_dim": 64},
    ),
    Large(
        "Gated DeltaNet, width 2048", "24 layers, 8 heads of 512 values", "delta_net", 24, 2048, 32_000,
        (256, 128, 64, 32), {"expand": 2, "n_heads": 8, "gated": True},
    ),
)  # fmt: skip


def count(large: Large, states: int) -> dict[str, float]:
    """Operations of a training step per token, memory kept for the backward pass per token, and parameters."""
    found = []
    for layers in (1, 2):
        torch.manual_seed(0)
        model = LanguageModel(16, large.width, states, layers, layer=large.layer, **large.options)
        tokens = torch.randint(16, (1, TOKENS))
        cost = step_cost(model, lambda model, tokens=tokens: F.cross_entropy(model(tokens)[0], tokens[0]))
        found.append((cost.flops, cost.kept_bytes, sum(one.numel() for one in model.parameters())))
    flops, kept, parameters = (two - one for one, two in zip(*found, strict=True))
    head = 6 * large.vocabulary * large.width  # logits, and the gradients of weights and states
    return {
        "flops_per_token": large.layers * flops / TOKENS + head,
        "kept_bytes_per_token": large.layers * kept / TOKENS,
        "parameters": large.layers * parameters + large.vocabulary * large.width,
    }


def measure() -> None:
    """Count, and store."""
    made = [
        {"title": large.title, "states": states, **count(large, states)} for large in LARGE for states in large.states
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "compressm": compressm.__version__}
    content = {"command": "python " + shlex.join(sys.argv), "versions": versions, "tokens": TOKENS, "rows": made}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# Experiment, big arm, cut arm, arm that is as small from the start.
MEASURED = (
    ("ablation-loss", "full", "loss12", "small12"),
    ("psmnist-loss", "full", "loss28", "small28"),
    ("scifar-loss", "full", "loss22", "small22"),
    ("family-s5", "full", "loss", "small"),
    ("mamba", "full", "shrunk", "small"),
    ("family-mamba2", "full", "shrunk", "small"),
    ("wikitext-mamba2", "full", "loss32", "small32"),
    ("wikitext-delta-net", "full", "loss16", "small16"),
)


def measured() -> list[str]:
    """One line for every stored training with a cut, beside the big one and the small one."""
    lines = [
        "| training | states | test | operations | seconds | energy | memory kept |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, *arms in MEASURED:
        stored = read_results(experiment(name), ROOT / "results")
        seeds = {seed for _, seed in stored if all((arm, seed) in stored for arm in arms)}
        made = {
            row.arm.name: row for row in rows(experiment(name), {key: stored[key] for key in stored if key[1] in seeds})
        }
        for arm in arms if seeds else ():
            title = f"`{name}` {arm}" + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")
            lines.append(f"| {title} | {' | '.join(_cells(made[arm]))} |")
    return lines


def _cells(row: Row) -> list[str]:
    seconds = [one for one in row.seconds if one is not None]
    took = statistics.median(seconds) if seconds else None
    return [
        row.states,
        row.score + scale(row.runs).unit,
        f"{operations(row.runs) / 1e12:.3g} T",
        "" if took is None else f"{took:.0f} s",
        "" if took is None else f"{took * WATTS / 3600:.2f} Wh",
        human(statistics.fmean(run.phases[-1]["kept_bytes"] for run in row.runs)),
    ]


def extrapolated() -> list[str]:
    """One line for every size of a larger model."""
    lines = [
        "| model | states per head | parameters | operations of the training | memory kept per token "
        "| state of a sequence |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    counted = {(row["title"], row["states"]): row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}
    for large in LARGE:
        big = counted[large.title, large.states[0]]
        for states in large.states:
            row = counted[large.title, states]
            spent = CUT_AFTER + (1 - CUT_AFTER) * row["flops_per_token"] / big["flops_per_token"]
            whole = 1.0 if states == large.states[0] else spent
            kept = row["kept_bytes_per_token"]
            state = 2 * large.layers * large.values * states
            lines.append(
                f"| {large.title} | {states} | {row['parameters'] / 1e6:,.0f} M | {100 * whole:.0f} % | "
                f"{human(kept)} ({100 * kept / big['kept_bytes_per_token']:.0f} %) | "
                f"{human(state)} ({100 * states / large.states[0]:.0f} %) |"
            )
    return lines


HEAD = f"""# What you save

*Generated from stored results by `{COMMAND}` (`make pages`). Edit that script, not this page.*

A cut makes two things cheaper: the part of the training that the recurrence takes, and the memory of a served sequence,
which is its state. **Narrow models with many states** (S5, a Mamba with 128 states, and LRU to a lesser degree) save
training time. **Wide language models** spend their training in projections: a cut to an eighth of the states saves 4 to
24 % of its operations, and most of the memory that a served sequence takes.

## Measured

Whole trainings from [results](results.md), cuts included: the big model, the one that is cut while it trains, and one
that is small from the start. *Test* is accuracy, or perplexity. *Seconds* are computing time on one core of the machine
that ran them, which had other work too, so rows may differ by tenths for that alone; times on another processor than
the big model's are left out. *Energy* is those seconds at {WATTS} W, the
share of one core in a server's 180 W for 32 cores: a model, not a reading; `run.energy` has codecarbon measure yours.
*Operations* are those of the engine that a machine picks for its scans: Fourier transforms count less than recurrences.
*Memory kept* is what autograd keeps of the forward pass of one of the last steps.

"""
MIDDLE = f"""
## Extrapolated by the cost model

Nothing of this was trained. The operations of one layer of the published width, with compressm's own layers and scans,
were counted in a training step of {TOKENS} tokens, and multiplied by layers and steps; the logits are added. Every
model makes the first tenth of its steps with all states. Operations are not time: they leave out element-wise work and
memory traffic, of which recurrences have more than projections. The step of a small Mamba-2, cut from 128 to 16 states,
was measured to take 0.60 of the time ([benchmarks](bench.md)). The state is in 16 bit.

"""
TAIL = f"""
Sizes are those of {"; ".join(f"{large.title}: {large.source}" for large in LARGE)}.

What accuracy such cuts cost is another question: for checkpoints that people serve see [serving](serving.md), and
[when not](when-not.md) to cut at all.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/savings.md from stored results.")
    parser.add_argument("--measure", action="store_true", help="count the larger layers first, and store the counts")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    text = HEAD + "\n".join(measured()) + "\n" + MIDDLE + "\n".join(extrapolated()) + "\n" + TAIL
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
