"""Coverage-guided fuzzing of everything that reads files of others: checkpoints and configurations.

    python tests/fuzz/loaders.py [--minutes 30] [--json results/fuzz.json]

An input is one byte for the reader to try, then what that reader is given. Checkpoints are signed anew after every
mutation, as whoever makes a hostile one would: else the checksum would refuse all of them alike. What must come out is
a value or one of compressm's own errors; any other exception, a crash or a hang is a finding, and its input is kept.

The seeds of tests/fuzz/corpus are all that is stored; what a long run finds on its way stays in .fuzz.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import platform
import re
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import atheris
from rich.progress import Progress, TextColumn

INSIDE = "--inside" in sys.argv  # the process that fuzzes, not the one that watches it

with atheris.instrument_imports(["compressm", "yaml", "json", "safetensors"]) if INSIDE else contextlib.nullcontext():
    import torch

    from compressm import __version__, load
    from compressm.cli import main as command_line
    from compressm.errors import CompressmError
    from compressm.lab.config import load_config, parse_config
    from compressm.runtime.files import _own_sha256
    from compressm.saving.checkpoint import load_tree

HERE = Path(__file__).parent
SEEDS, FOUND = HERE / "corpus", Path(".fuzz")
SCRATCH = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
SECONDS_A_CALL = 20


def pair(data: bytes, tensors_name: str, json_name: str) -> Path:
    """A checkpoint: the length of the description, the description, and the tensors' file."""
    (length,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
    text, tensors = data[2 : 2 + length], data[2 + length :]
    (SCRATCH / tensors_name).write_bytes(tensors)
    with contextlib.suppress(ValueError, RecursionError):
        description = json.loads(text)
        if isinstance(description, dict):
            description["sha256"] = hashlib.sha256(tensors).hexdigest()
            description.pop("own_sha256", None)
            text = json.dumps({**description, "own_sha256": _own_sha256(description)}).encode()
    (SCRATCH / json_name).write_bytes(text)
    return SCRATCH


def read_model(data: bytes) -> None:
    load(pair(data, "model.safetensors", "compressm.json"))


def read_tree(data: bytes) -> None:
    load_tree(pair(data, "state.safetensors", "state.json"))


def read_config(data: bytes) -> None:
    path = SCRATCH / "config.yaml"
    path.write_bytes(data)
    load_config(path)


def read_overrides(data: bytes) -> None:
    load_config("digits", data.decode(errors="surrogateescape").split("\n"))


def read_parsed(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        tree = json.loads(data)
        if isinstance(tree, dict):
            parse_config(tree)


def read_arguments(data: bytes) -> None:
    """The command line over a checkpoint that is not there: it says so, or that it was not called rightly."""
    words = data.decode(errors="replace").replace("\0", "").split("\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = command_line([("train", "analyze", "compress", "export")[len(data) % 4], "/nowhere/at/all", *words])
    assert code in (0, 2), code
    assert code == 0 or said.getvalue().count("\n") == 1, said.getvalue()


READERS = (read_model, read_tree, read_config, read_overrides, read_parsed, read_arguments)


def one_input(data: bytes) -> None:
    if not data:
        return
    with contextlib.suppress(CompressmError):
        READERS[data[0] % len(READERS)](data[1:])


def fuzz(minutes: float) -> None:
    """Never returns: libFuzzer ends the process."""
    torch.set_num_threads(1)
    options = [
        f"-max_total_time={round(minutes * 60)}", f"-timeout={SECONDS_A_CALL}", "-rss_limit_mb=4096",
        f"-artifact_prefix={FOUND}/finding-", "-print_final_stats=1", "-max_len=4096", "-use_value_profile=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(FOUND / "corpus"), str(SEEDS)], one_input)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (FOUND / "corpus").mkdir(parents=True, exist_ok=True)
    if arguments.inside:
        fuzz(arguments.minutes)
    before = set(FOUND.glob("finding-*"))
    command = [sys.executable, __file__, "--inside", "--minutes", str(arguments.minutes)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    lines: list[str] = []
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[state]}")) as progress:
        task, started = progress.add_task("fuzzing", total=60 * arguments.minutes, state=""), time.monotonic()
        for line in process.stderr:
            lines.append(line)
            if "cov:" in line:
                progress.update(task, completed=time.monotonic() - started, state=line.split("lim:")[0].strip())
    code = process.wait()
    text = "".join(lines)
    findings = sorted(str(path) for path in set(FOUND.glob("finding-*")) - before)
    executions = re.findall(r"number_of_executed_units: *(\d+)", text)
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    if code or not executions or not coverage:
        sys.exit(f"{text[-4000:]}\n{len(findings)} findings: {' '.join(findings)}; exit code {code}")
    edges, features, inputs = map(int, coverage[-1])
    result = {
        "command": f"make fuzz MINUTES={arguments.minutes:g}",
        "versions": {"compressm": __version__, "atheris": version("atheris"), "python": platform.python_version()},
        "minutes": arguments.minutes,
        "executions": int(executions[-1]),
        "coverage": {"edges": edges, "features": features, "inputs": inputs},
        "crashes": len(findings),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{executions[-1]} executions, {edges} edges, {features} features, {inputs} inputs; {len(findings)} crashes")


if __name__ == "__main__":
    main()
