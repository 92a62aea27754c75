"""DistributedDataParallel in two processes: the options of tests/replicas_script.py, which trains with each of them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compressm.errors import UnsupportedModelError
from situations.trial import Trial, row

HOST = "DistributedDataParallel, two processes on gloo"
TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS))

from replicas_script import CUTS, OPTIONS  # noqa: E402

SITUATIONS = {
    "no buffers": "broadcast_buffers=False",
    "small buckets": "bucket_cap_mb small",
    "hook": "communication hook: allreduce",
    "hook, built in": "communication hook: built in, FP16_COMPRESS",
    "hook, static_graph": "communication hook: fp16_compress, with static_graph",
    "hook, PowerSGD": "communication hook: PowerSGD",
    "hook, PowerSGD, no feedback": "communication hook: PowerSGD without error feedback and warm start",
    "hook of one's own": "communication hook of one's own, with a state that has reset()",
    "hook, post_localSGD": "communication hook: post_localSGD",
    "hook of unknown state": "communication hook of one's own, with a state of unknown kind",
    "cuts by the loss": "gramians='loss', with accumulated batches",
}


@functools.cache
def results() -> dict[str, Any]:
    """How every option ended, by name; all are run together."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        scripts = [str(TESTS / "leave_quickly.py"), str(TESTS / "replicas_script.py"), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run([*command, *scripts], env=environment, check=True, capture_output=True)
        return json.loads(out.read_text())


def _declare(name: str) -> None:
    @row(HOST, SITUATIONS.get(name, name))
    def _(trial: Trial) -> None:
        one = results()[name]
        if "refused" in one:
            refused_at_construction(one["refused"])
        trial.check(one["cuts"] == list(CUTS) and one["states"] == [4], f"cuts {one['cuts']} to {one['states']}")
        trial.check(one["equal"] and one["finite"], "weights differ between the ranks 50 steps after the last cut")
        trial.cuts += len(one["cuts"])


def refused_at_construction(message: str) -> None:
    """Raise the error of a process. The script reports as refused only what `Compressor(...)` raised."""
    raise UnsupportedModelError(message)


for _name in OPTIONS:
    _declare(_name)
