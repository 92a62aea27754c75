"""Write docs/state-classes.md: every class of transformers that carries a state, and what a cut of it was seen to do.

    python scripts/state_classes.py                 write the page from results/state_classes.json
    python scripts/state_classes.py --measure       look for the classes, run every one at toy width, store the outcome
    python scripts/state_classes.py --measure --published    also at published width with two layers (several GB)
    python scripts/state_classes.py --find          only print the classes, and those that nobody has answered for

The classes are found in the sources of the installed transformers: modules that keep or read a recurrent state or the
last inputs of a convolution in a cache, or take a state as an argument, and models that transformers marks as stateful.
A class that has neither an adapter nor a reason for a refusal makes every command but the first fail. With names of
model types after --measure only these are run.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from toy_models import SIZES, VOCABULARY, Sizes

import compressm
from compressm.adapters.refused import REFUSED
from compressm.adapters.registry import has_adapter
from compressm.errors import UnsupportedModelError

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "results" / "state_classes.json", ROOT / "docs" / "state-classes.md"
MODELS = Path(transformers.__file__).parent / "models"
COMMAND = "python scripts/state_classes.py --measure"

_KEEPS_STATE = re.compile(
    r"\b(get|update)_(recurrent|conv)_state\(|\bset_linear_cache\(|\bself\.recurrent_states\b|\brnn_state\b"
)
_TAKES_STATE = re.compile(r"\bstate\s*[:=,)]")
# Found by the search, but not a state that runs along a sequence.
NO_RECURRENCE = {
    "deepseek_v4": "softmax attention over compressed keys and values; its running window is not a recurrence",
    "esmfold2": "its state is that of iterations over depth, not along a sequence",
    "pi0": "its state is an input, the positions of a robot's joints",
}

HEAD = """# Classes of transformers that carry a state

*Generated from stored results by `python scripts/state_classes.py` (`make pages`). Edit that script, not this page.*

Every line was run by `{command}` with {packages}. The script finds the classes in transformers' own sources, so a new
one appears here as *not answered* before anybody asks for it.

- *cut*: `compressm.compress` to half of the states, on random tokens, from random weights that were moved away from
  where they begin;
- *loads*: a process in which compressm cannot be imported reads what `save_pretrained` wrote, and gives bitwise the
  same logits;
- *generates*: there, the tokens generated with a cache are those generated without one;
- *expected*, *measured*: the error that the report expects of a cut of a layer, before norms and projections that
  follow the recurrence, and the measured one of the layer's output on the same data; medians over the layers. Random
  weights have no states that are worth little, so both are large. Where the input bypasses the state (Mamba), the
  measured error is much smaller.

| model type | layer | width | states | loads | generates | expected | measured |
|---|---|---|---|---|---|---|---|
"""


def stateful_layers(source: str) -> list[str]:
    """Names of the layers in a modeling file that carry a state."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or "Cache" in node.name:
            continue
        if any(word in ast.unparse(base) for base in node.bases for word in ("PreTrained", "Model", "Cache")):
            continue
        forwards = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "forward"]
        arguments = {arg.arg for part in forwards for arg in (*part.args.args, *part.args.kwonlyargs)}
        text = ast.get_source_segment(source, node) or ""
        if forwards and ("state" in arguments or _KEEPS_STATE.search(text)):
            found.append(node.name)
    return found


def found_classes() -> dict[str, list[str]]:
    """Layers that carry a state, by model type; empty for a type that is only marked as stateful."""
    found: dict[str, list[str]] = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        layers = stateful_layers(source) if _KEEPS_STATE.search(source) or _TAKES_STATE.search(source) else []
        if layers or "_is_stateful = True" in source:
            found[file.parent.name] = layers
    return found


def answer(kind: str, layers: list[str]) -> tuple[str, str]:
    """How compressm answers for a model type: ``"cut"`` and the layer, ``"refused"``, ``"around"`` or ``"none"`` and
    the reason, or ``"not answered"``."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    classes = [getattr(module, name) for name in layers if hasattr(module, name)]
    outer = [vars(module)[name] for name in vars(module) if name.endswith("RecurrentBlock")]
    for one in (*outer, *classes):
        if has_adapter(one):
            return "cut", one.__name__
    for one in classes:
        reason = REFUSED.get(f"{kind}.modeling_{kind}.{one.__name__}")
        if reason is not None:
            return "refused", f"`{one.__name__}`: {reason}"
    if kind in NO_RECURRENCE:
        return "none", NO_RECURRENCE[kind]
    inner = sorted(_inner_types(kind) & SIZES.keys())
    return ("around", ", ".join(inner)) if inner and not layers else ("not answered", ", ".join(layers))


def _inner_types(kind: str) -> set[str]:
    """Model types that the default config of a model type contains, as folders of transformers."""
    configs = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    found: set[str] = set()
    for config in vars(configs).values():
        parts = getattr(config, "sub_configs_defaults", None) or {}
        found |= {re.sub(r"_text$", "", str(getattr(part, "model_type", ""))) for part in parts.values()}
    return found


LOAD = """
import json, sys, torch, transformers
sys.modules["compressm"] = None  # cannot be imported
folder, kind = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder).eval()
x = torch.load(folder + "/x.pt")
options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
with torch.no_grad():
    loads = torch.equal(model(input_ids=x).logits, torch.load(folder + "/logits.pt"))
    cached = model.generate(x, **options)
    for _ in range(6):
        x = torch.cat([x, model(input_ids=x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
print(json.dumps(dict(loads=loads, generates=torch.equal(cached, x))))
"""


def run(sizes: Sizes, published: bool) -> dict[str, Any]:
    """Cut one model to half of its states, and look at everything that the table says."""
    started = time.monotonic()
    model = sizes.build(published)
    x = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    before = compressm.cutting.state_dims(model)
    states = max(before.values()) // 2
    report = compressm.compress(model, states=states, data=[{"input_ids": x}])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(x, f"{folder}/x.pt")
        torch.save(model(input_ids=x).logits, f"{folder}/logits.pt")
        model.save_pretrained(folder)
        command = [sys.executable, "-c", LOAD, folder, type(model).__name__]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"loads": False, "generates": False}
    return {
        "width": _width(model.config),
        "states_before": max(before.values()),
        "states": sorted(set(report.state_dims.values())),
        "cut": all(layer.outcome == "cut" for layer in report.layers),
        **told,
        "expected": _median(layer.certificate.relative_error for layer in report.layers),
        "measured": _median(layer.error_on_data for layer in report.layers),
        "seconds": round(time.monotonic() - started, 1),
        "why": "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1],
    }


def _width(config: Any) -> int:
    return int(config.hidden_size)


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def refusal(sizes: Sizes) -> str:
    """The message with which a model is refused; empty if it is not."""
    x = torch.randint(3, VOCABULARY, (2, 8))
    try:
        compressm.compress(sizes.build(), fraction=0.5, data=[{"input_ids": x}])
    except UnsupportedModelError as error:
        return str(error)
    return ""


def measure(kinds: Sequence[str], published: bool) -> None:
    """Run model types, by default all, and store every outcome as it comes. Others keep what is stored of them."""
    stored: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if kinds and RESULT.exists() else {}
    packages = {name: version(name) for name in ("torch", "transformers")}
    known: dict[str, Any] = stored.get("classes", {}) if stored.get("packages") == packages else {}
    rows = {kind: known.get(kind, row) for kind, row in unmeasured().items()}
    for kind, row in rows.items():
        if not kinds or kind in kinds:
            rows[kind] = {**unmeasured_row(kind, row["layers"]), **outcome(kind, row["answer"], published)}
            print(f"{kind:24}{rows[kind]}", flush=True)
            stored = {"command": COMMAND, "packages": packages, "classes": rows}
            RESULT.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def unmeasured() -> dict[str, dict[str, Any]]:
    """How every model type is answered, without a run."""
    return {kind: unmeasured_row(kind, layers) for kind, layers in found_classes().items()}


def unmeasured_row(kind: str, layers: list[str]) -> dict[str, Any]:
    """How a model type is answered, without a run."""
    how, what = answer(kind, layers)
    return {"layers": layers, "answer": how, "what": what}


def outcome(kind: str, how: str, published: bool) -> dict[str, Any]:
    """What a run of a model type showed; empty if it has no sizes to be built at."""
    row: dict[str, Any] = {}
    if kind in SIZES:
        if how == "cut":
            row["toy"] = run(SIZES[kind], published=False)
            if published and SIZES[kind].published is not None:
                row["published"] = run(SIZES[kind], published=True)
        elif how == "refused":
            row["message"] = refusal(SIZES[kind])
    return row


def table(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the table of cuts."""
    for kind, row in rows.items():
        if row["answer"] != "cut":
            continue
        for size in ("toy", "published"):
            if size in row:
                yield _line(kind, row["what"], row[size])
        if "toy" not in row:
            yield f"| `{kind}` | `{row['what']}` | | not run | | | | |"


def _line(kind: str, layer: str, ran: Mapping[str, Any]) -> str:
    states = f"{ran['states_before']} → {', '.join(map(str, ran['states']))}" if ran["cut"] else "not cut"
    errors = ("–" if ran[name] is None else f"{ran[name]:.2g}" for name in ("expected", "measured"))
    said = ("yes" if ran[name] else "**no**" for name in ("loads", "generates"))
    return f"| `{kind}` | `{layer}` | {ran['width']} | {states} | {' | '.join((*said, *errors))} |"


def page(stored: Mapping[str, Any]) -> str:
    """The page."""
    rows: Mapping[str, Mapping[str, Any]] = stored["classes"]
    packages = ", ".join(f"{name} {number}" for name, number in stored["packages"].items())
    lines = [HEAD.format(command=stored["command"], packages=packages) + "\n".join(table(rows))]
    for title, how in (
        ("Refused, with the reason", "refused"),
        ("Models around those above", "around"),
        ("Marked as stateful, without a recurrence", "none"),
        ("Not answered", "not answered"),
    ):
        chosen = {kind: row for kind, row in rows.items() if row["answer"] == how}
        if chosen:
            lines += ["", f"## {title}", ""]
        for kind, row in chosen.items():
            seen = " (*run: refused by this message*)" if row.get("message") else ""
            lines.append(f"- `{kind}`: {row['what']}{seen}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Classes of transformers that carry a state, and cuts of them.")
    parser.add_argument("--measure", nargs="*", metavar="TYPE", help="run these types at toy width, by default all")
    parser.add_argument("--published", action="store_true", help="with --measure, also at published width, two layers")
    parser.add_argument("--find", action="store_true", help="only print the classes and how they are answered")
    parser.add_argument("--output", type=Path, default=PAGE, help="file for the page")
    given = parser.parse_args()
    if given.find:
        rows = unmeasured()
        for kind, row in rows.items():
            print(f"{kind:24}{row['answer']:14}{row['what']}")
        return _unanswered(rows)
    if given.measure is not None:
        measure(given.measure, given.published)
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    given.output.write_text(page(stored), encoding="utf-8")
    return _unanswered(stored["classes"]) if given.measure is not None else 0


def _unanswered(rows: Mapping[str, Mapping[str, Any]]) -> int:
    return int(any(row["answer"] == "not answered" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
