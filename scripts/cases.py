"""Write docs/cases.md from the stored results of benchmarks and examples: ``python scripts/cases.py``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "cases.md"

HEAD = """# Cases

*Generated from stored results by `python scripts/cases.py` (`make pages`). Edit that script, not this page.*

Four kinds of models that people train: big, shrunk while training, small from the start, and cut to random states. One
seed each; times are of one thread of a CPU that had other work as well.
"""


def read(name: str) -> dict[str, Any]:
    """A stored result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def arms(folder: str, order: Iterable[str] = ("big", "shrunk", "small", "random")) -> dict[str, dict[str, Any]]:
    """The results of all arms."""
    return {arm: read(f"{folder}/{arm}.json") for arm in order}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Markdown."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def command(line: str) -> list[str]:
    """A block that can be copied."""
    return ["```console", line, "```", ""]


def ukrainian() -> list[str]:
    """The language model."""
    found = arms("ukrainian")
    first = next(iter(found.values()))
    rows = [
        (
            arm,
            " + ".join(str(states) for states in one["state_dims"].values()),
            f"{one['test_bits_per_byte']:.3f}",
            f"{one['step_milliseconds']:.0f} ms",
            f"{one['train_seconds'] / 60:.1f} min",
        )
        for arm, one in found.items()
    ]
    return [
        "## A language model of Ukrainian, byte by byte, on one core",
        "",
        f"Linear attention with gated decay, two layers of width 128 and four heads, {first['steps']:,} steps on the "
        "BrUK corpus (1 million words, split by document), cut in the first tenth of the steps: the case of a team "
        "with no data centre.",
        "",
        *table(("", "states", "test, bits per byte", "a step at the end", "training"), rows),
        "The four are nearly level: in so short a training the state dimension is not what limits the model, and which "
        "states are kept hardly matters. What the cut brings here is a third of the time.",
        "",
        "The shrunk model goes on from `Україна `:",
        "",
        "> " + found["shrunk"]["sample"].split("\n")[0].strip("\ufffd "),
        "",
        *command("COMPRESSM_DATA=DIRECTORY python benchmarks/ukrainian.py"),
    ]


def identification() -> list[str]:
    """Silverbox and cascaded tanks."""
    lines = [
        "## System identification: a robot's case",
        "",
        "An LRU model of two blocks, width 16, learns a nonlinear system from its input and output. Errors are root "
        "mean squares of the *simulation*: the model sees the input alone. The linear model is ARX by least squares, "
        "its order chosen on the validation part. *One step* is one sample of one sequence through the whole model, "
        "[exported](deploy.md) and run by ONNX Runtime on one thread.",
        "",
    ]
    for task, title, unit, scale in (
        ("silverbox", "Silverbox (an electronic mass-spring-damper with a hardening spring)", "mV", 1e3),
        ("tanks", "Cascaded tanks (they overflow)", "V", 1.0),
    ):
        found = read(f"system-identification/{task}.json")
        tests = [name for name in ("test", "sweep") if name in found["big"]]
        rows = []
        for arm in ("linear", "big", "shrunk", "small", "random"):
            one = found[arm]
            errors = [f"{scale * one[name]:#.3g} {unit}" for name in tests]
            states = " + ".join(map(str, one["states"])) if "states" in one else f"order {one['order']}"
            step = f"{one['onnx_step_microseconds']:.0f} µs" if "onnx_step_microseconds" in one else ""
            seconds = f"{one['seconds']:.0f} s" if "seconds" in one else ""
            rows.append((arm, states, *errors, step, seconds))
        lines += [f"### {title}", "", f"{found['steps']:,} steps.", ""]
        lines += table(("", "states", *(f"error, {name}" for name in tests), "one step", "training"), rows)
        lines += command(f"python examples/system_identification.py --data DIRECTORY --task {task}")
    return lines


def hyena() -> list[str]:
    """Distillation of long convolutions."""
    found = read("hyena.json")
    long, small = found["convolution"], found["small"]
    rows = [("convolution", "", "", f"{long['test_bits_per_byte']:.3f}")]
    for one in found["distilled"]:
        rows.append(
            (
                f"order {one['order']}",
                " + ".join(map(str, one["states"])),
                " and ".join(f"{error:.1e}" for error in one["relative_h2_error"]),
                f"{one['test_bits_per_byte']:.3f}",
            )
        )
    tuned = next(one for one in found["distilled"] if one["order"] == 16)
    rows += [
        ("order 16, trained on", "", "", f"{tuned['trained_on_test_bits_per_byte']:.3f}"),
        (
            "small from the start",
            f"{small['states']} + {small['states']}",
            "",
            f"{small['test_bits_per_byte']:.3f}",
        ),
    ]
    lengths = [f"after {length}" for length in long["lengths"]]
    tokens = [
        (name, *(f"{value:.2f} ms" for value in one["token_milliseconds"]))
        for name, one in (("convolution", long), ("order 16", tuned))
    ]
    return [
        "## Hyena: long convolutions distilled into states",
        "",
        f"A language model of two Hyena layers on tiny Shakespeare, byte by byte, {found['steps']:,} steps at length "
        f"{found['length']}. After training every filter becomes a state space model by the singular value "
        "decomposition of its Hankel matrix; the H2 error is relative, of all filters of a layer together, for the two "
        "layers. *Trained on*: a twentieth of the steps more. *Small*: state space models of as many states in the "
        "convolutions' places from the start.",
        "",
        *table(("", "complex states", "relative H2 error", "test, bits per byte"), rows),
        "Generation, one token of one sequence: the convolution looks back at everything, the states do not.",
        "",
        *table(("", *lengths), tokens),
        *command("COMPRESSM_DATA=DIRECTORY python benchmarks/hyena.py"),
    ]


def s4() -> list[str]:
    """S4 by way of S4D."""
    found = arms("s4")
    rows = [
        (
            arm,
            " + ".join(map(str, one["state_dims"])),
            f"{100 * one['test_accuracy']:.2f} %",
            f"{one['step_milliseconds']:.0f} ms",
            f"{one['train_seconds'] / 60:.1f} min",
        )
        for arm, one in found.items()
    ]
    errors = " and ".join(f"{error:.2f}" for error in found["shrunk"]["distilled_relative_h2_error"])
    return [
        "## S4: diagonal plus low rank",
        "",
        f"Sequential MNIST in 196 steps, two blocks of width 32, {found['big']['steps']:,} steps. After a tenth of "
        f"them the filters of `shrunk` become an S4D of real order 16 per channel, 8 pairs or a real eigenvalue "
        f"more (relative H2 errors {errors} in the two layers), which trains on.",
        "",
        *table(("", "states per channel", "test accuracy", "a step at the end", "training"), rows),
        *command("COMPRESSM_DATA=DIRECTORY python benchmarks/s4.py"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/cases.md from stored results.")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    output = parser.parse_args().output
    parts = [HEAD.rstrip(), "", *ukrainian(), *identification(), *hyena(), *s4()]
    output.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
