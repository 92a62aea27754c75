"""Peak memory and time of ``compressm analyze`` and ``compress`` on a checkpoint with the width of Mamba2-2.7b.

    python benchmarks/checkpoint_memory.py --layers 8 --json results/checkpoint_memory.json

Random weights in bfloat16, in shards; random tokens. Every command runs in a process of its own. Its peak is the
largest resident set that the system saw, with the libraries, whose part is given beside it; pages of the checkpoint
that are mapped count. ``--whole`` loads the checkpoint into memory as well, for comparison.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEQUENCES = 4


def make(folder: Path, layers: int, width: int, states: int, vocabulary: int) -> int:
    """Write the checkpoint; returns its bytes."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=vocabulary, hidden_size=width, state_size=states, num_heads=2 * width // 64, head_dim=64, n_groups=1,
        num_hidden_layers=layers, chunk_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Mamba2ForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="400MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
        from transformers import AutoModelForCausalLM  # noqa: F401
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


def run(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    folder = Path(tempfile.mkdtemp(prefix="compressm-benchmark-", dir=options.folder))
    try:
        size = make(folder / "big", options.layers, options.width, options.states, options.vocabulary)
        tokens = np.random.default_rng(0).integers(0, options.vocabulary, (2 * SEQUENCES, options.length))
        np.savez(folder / "tokens.npz", x=tokens)
        data = ["--data", str(folder / "tokens.npz"), "--sequences", str(SEQUENCES), "--length", str(options.length)]
        result: dict[str, Any] = {"libraries": measured([])["peak"], "checkpoint": size, "commands": {}}
        ways = [("mapped", False), *([("whole", True)] if options.whole else [])]
        for name, whole in ways:
            small = folder / f"small-{name}"
            cut = ["compress", str(folder / "big"), *data, "--states", str(options.states // 2), "--output", str(small)]
            for command, line in (("analyze", ["analyze", str(folder / "big"), *data]), ("compress", cut)):
                found = measured([*line, "--json", str(folder / "out.json")], whole)
                result["commands"][f"{command}, {name}"] = {key: found[key] for key in ("peak", "seconds")}
                print(command, name, f"{found['peak'] / 1e9:.2f} GB, {found['seconds']} s", flush=True)
        return result
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 2560), ("states", 128), ("vocabulary", 50288), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--whole", action="store_true", help="also load the checkpoint as a whole")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint [the temporary folder]")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.arguments, options.whole)
        return
    names = ("layers", "width", "states", "vocabulary", "length")
    result = {"settings": {name: getattr(options, name) for name in names}, "sequences": SEQUENCES, **run(options)}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
