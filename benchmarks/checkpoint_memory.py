"""Peak memory and time of ``compressm analyze`` and ``compress`` on a checkpoint of published width.

    python benchmarks/checkpoint_memory.py --layers 8 --json results/checkpoint_memory.json
    python benchmarks/checkpoint_memory.py --family mamba --width 768 --states 16 --layers 24 --length 512 \\
        --sequences 32

The first has the width of Mamba2-2.7b, the second is Mamba-130m with the usual amount of data.

Random weights in bfloat16, in shards; random tokens. Every command runs in a process of its own. Its peak is the
largest resident set that the system saw, with the libraries, whose part is given beside it; pages of the checkpoint
that are mapped count. ``--whole`` loads the checkpoint into memory as well, for comparison.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def make(folder: Path, family: str, layers: int, width: int, states: int, vocabulary: int) -> None:
    """Write the checkpoint."""
    import torch
    import transformers

    known: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": width, "state_size": states, "num_hidden_layers": layers,
        "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**known))
    else:
        known |= {"num_heads": 2 * width // 64, "head_dim": 64, "n_groups": 1, "chunk_size": 256}
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**known))
    model.bfloat16().save_pretrained(folder, max_shard_size="400MB")


def work(arguments: list[str], whole: bool) -> None:
    """What a measured process does: run a command line, and print its peak and time."""
    import compressm.lab.one_shot_inputs as inputs
    from compressm.cli import main

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if whole:
        inputs.open_mapped = lambda _: None  # type: ignore[assignment]
    started = time.perf_counter()
    code = main(arguments) if arguments else 0
    if not arguments:
        importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - started
    print(json.dumps({"code": code, "peak": peak, "before": before, "seconds": round(seconds, 1)}))


def measured(arguments: list[str], whole: bool = False) -> dict[str, Any]:
    """Run a command line in a process of its own."""
    command = [sys.executable, __file__, *(["--whole"] if whole else []), "--work", "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["code"]:
        raise SystemExit(done.stderr)
    return found


def run(options: argparse.Namespace) -> None:
    """Measure every command."""
    import numpy as np

    folder = Path(tempfile.mkdtemp(prefix="compressm-benchmark-", dir=options.folder))
    try:
        big = folder / "big" if options.checkpoint is None else options.checkpoint
        if not big.exists():
            make(big, options.family, options.layers, options.width, options.states, options.vocabulary)
        size = sum(file.stat().st_size for file in big.glob("*.safetensors"))
        tokens = np.random.default_rng(0).integers(0, options.vocabulary, (2 * options.sequences, options.length))
        np.savez(folder / "tokens.npz", x=tokens)
        data = [
            "--data",
            str(folder / "tokens.npz"),
            "--sequences",
            str(options.sequences),
            "--length",
            str(options.length),
        ]
        result: dict[str, Any] = {"libraries": measured([])["peak"], "checkpoint": size, "commands": {}}
        ways = [("mapped", False), *([("whole", True)] if options.whole else [])]
        for name, whole in ways:
            small = folder / f"small-{name}"
            cut = ["compress", str(big), *data, "--states", str(options.states // 2), "--output", str(small)]
            for command, line in (("compress", cut), ("analyze", ["analyze", str(big), *data])):
                found = measured([*line, "--json", str(folder / "out.json")], whole)
                result["commands"][f"{command}, {name}"] = {key: found[key] for key in ("peak", "seconds")}
                print(command, name, f"{found['peak'] / 1e9:.2f} GB, {found['seconds']} s", flush=True)
                store(options, result)
    finally:
        shutil.rmtree(folder)


def store(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the figures that are known so far."""
    names = ("family", "layers", "width", "states", "vocabulary", "length")
    known = {"settings": {name: getattr(options, name) for name in names}, "sequences": options.sequences, **result}
    if options.json is not None:
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("mamba", "mamba2"), default="mamba2")
    sizes = {"layers": 8, "width": 2560, "states": 128, "vocabulary": 50288, "length": 128, "sequences": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--whole", action="store_true", help="also load the checkpoint as a whole")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint [the temporary folder]")
    parser.add_argument("--checkpoint", type=Path, help="a folder that holds the checkpoint, or will [a temporary one]")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.arguments, options.whole)
        return
    run(options)


if __name__ == "__main__":
    main()
