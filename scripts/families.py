"""Write docs/families.md from results/families.json, which tests/test_families.py measures.

python scripts/families.py              write the page from the stored measurements
python scripts/families.py --measure    measure first, and store the measurements
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "results" / "families.json", ROOT / "docs" / "families.md"

HEAD = """# Supported families

*Generated from stored results by `python scripts/families.py` (`make pages`). Edit that script, not this page.*

`tests/test_families.py` measures every line with untrained layers of width 16 and 24 states (distilled ones: 10), on
slowly varying random input; `python scripts/families.py --measure` runs it and stores what it measured in
`results/families.json`. Trained models are in the [results](results.md).

- *full rank*: relative difference of the outputs after a cut that keeps all states, in other coordinates where the
  family has any, in double and single precision;
- *half rank*: relative error of the outputs after a cut to half of the states, which the report calls `error_on_data`;
  *expected*: what the certificate said, the relative H2 error of the system (exact) or the error of the recurrence
  expected under the data's second moments (selective layers), before norms and projections that follow; *random*: the
  same cut with states picked at random;
- *trains*, *generates*: after a cut every parameter has a gradient and moves, the optimizer's state is carried over,
  and stepping through a sequence gives what the layer gives for the whole of it.

| layer | how it is cut | full rank (64, 32 bit) | half rank | expected | random | trains | generates |
|---|---|---|---|---|---|---|---|
"""

TAIL = """
What the families need:

- **S4D** has a system per channel and one state dimension for all, so that the channel that needs most decides.
  A system of one input and one output has little to spare: from 32 states to 8 a training step takes 1.4 times less,
  and half a point of accuracy is lost ([results](results.md)).
- **DeltaNet** allows rotations of its keys only: they alone keep `I - beta k k^T` what it is. At full rank, or where
  the keys lie in the kept subspace, that is exact; else the layer scales what is left of a key to norm 1 again.
- **RG-LRU** has one state per channel, and a system of order one cannot be reduced. What is cut is the width of the
  recurrent block, and with it every projection, convolution and gate.
- **S4** is diagonal plus low rank, and its own eigenvectors are too ill-conditioned to diagonalise it by.
  `compressm.distil` goes by its filters instead, and puts an S4D in its place, which is cut like any other
  ([measured](cases.md)).
- **Hyena** has no state. `compressm.distil(model, order=16)` replaces every long convolution by a state space model,
  with an error bound, after which it generates in constant time per token and is cut like any other
  ([measured](cases.md)).
- **Bidirectional** models: `S5(bidirectional=True)` has one recurrence for both directions, which are cut together;
  `compressm.layers.Bidirectional` holds two layers, which are cut apart.
- **Hybrids**: layers without a state, such as attention, stay bit by bit what they were, and so does their optimizer
  state.
- **Hugging Face** models have the same layers under other names; [here](adapters.md) is the list.
"""


def measure() -> None:
    """Run the tests and store what they measured."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/test_families.py", f"--families={RESULT}"]
    subprocess.run(command, check=True, cwd=ROOT)


def line(row: dict[str, Any]) -> str:
    """One family's row of the table."""
    return (
        f"| {row['title']} | {row['how']} | {row['full_rank_float64']:.0e}, {row['full_rank_float32']:.0e} "
        f"| {row['half_rank']:.2f} | {row['said']:.2f} ({row['kind']}) | {row['random']:.2f} "
        f"| {'yes' if row.get('trains') else 'no'} | {'yes' if row.get('generates') else 'no'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/families.md from results/families.json.")
    parser.add_argument("--measure", action="store_true", help="measure first, and store the measurements")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    rows = json.loads(RESULT.read_text(encoding="utf-8")).values()
    arguments.output.write_text(HEAD + "\n".join(map(line, rows)) + "\n" + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main()
