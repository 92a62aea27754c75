"""Write docs/situations.md: what was tried in which training loop, and how it ended.

    python scripts/hosts.py                  write the page from results/hosts.json
    python scripts/hosts.py --measure        run every row first, and store how it ended (some minutes)
    python scripts/hosts.py --try TEXT       run the rows whose host or situation contains TEXT, and print them

The rows are in scripts/situations, one module for each host. Nothing is stored unless all rows were run, and every one
*works* or was *refused* at construction.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from situations import Row, all_rows
from situations.trial import Outcome, tried

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "results" / "hosts.json", ROOT / "docs" / "situations.md"
PACKAGES = ("torch", "transformers", "accelerate", "lightning")

HEAD = """# Situations

*Generated from stored results by `python scripts/hosts.py` (`make pages`). Edit that script or scripts/situations, not
this page.*

Every line was run, by `python scripts/hosts.py --measure`, with
{packages}.
It *works* if training went through its cuts and the checks of its row held: the cuts came after the right steps of the
optimizer, the layers have the wanted states, and weights are bitwise those of an unbroken or undisturbed run, where the
row has one. It is *refused* if compressm's own error came when the compressor was built, or where the host begins.
[In your training loop](hosts.md) says how each host is used.
"""


def outcomes(rows: Sequence[Row]) -> Iterator[Outcome]:
    """Run rows, each in an empty folder."""
    for one in rows:
        with tempfile.TemporaryDirectory() as folder:
            outcome = tried(one, Path(folder))
        print(f"{outcome.outcome:8}{outcome.seconds:6.1f} s  {one.host}: {one.situation}", flush=True)
        if outcome.because:
            print(f"         {outcome.because}", flush=True)
        yield outcome


def measure(rows: Sequence[Row]) -> bool:
    """Run all rows and store how they ended, if none failed."""
    done = list(outcomes(rows))
    failed = [one for one in done if one.outcome == "failed"]
    if failed:
        print(f"{len(failed)} of {len(done)} rows failed; nothing is stored", file=sys.stderr)
        return False
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "rows": [asdict(one) for one in done],
    }
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def line(one: dict[str, Any]) -> str:
    """A line of the table."""
    because = textwrap.shorten(str(one["because"]), 300, placeholder=" ...").replace("|", "\\|")
    end = "works" if one["outcome"] == "works" else f"refused at construction: {because}"
    return f"| {one['situation']} | {end} |"


def page(found: dict[str, Any]) -> str:
    """The whole page."""
    packages = ", ".join(f"{name} {number.partition('+')[0]}" for name, number in found["packages"].items())
    lines = [HEAD.format(packages=packages).rstrip()]
    for host in dict.fromkeys(one["host"] for one in found["rows"]):
        rows = [one for one in found["rows"] if one["host"] == host]
        lines += ["", f"## {host}", "", "| situation | outcome |", "|---|---|", *map(line, rows)]
    works = sum(one["outcome"] == "works" for one in found["rows"])
    lines += ["", f"{len(found['rows'])} situations: {works} work, {len(found['rows']) - works} are refused."]
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/situations.md from results/hosts.json.")
    parser.add_argument("--measure", action="store_true", help="run every row first")
    parser.add_argument("--try", dest="text", metavar="TEXT", help="run some rows and print how they end")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    arguments = parser.parse_args(given)
    if arguments.text is not None:
        some = [one for one in all_rows() if arguments.text.lower() in f"{one.host}: {one.situation}".lower()]
        done = list(outcomes(some))
        return 0 if done and all(one.outcome != "failed" for one in done) else 1
    if arguments.measure and not measure(all_rows()):
        return 1
    arguments.output.write_text(page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
