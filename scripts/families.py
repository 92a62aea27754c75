"""Run tests/test_families.py and write docs/families.md from what it measured: ``python scripts/families.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "results" / "families.json", ROOT / "docs" / "families.md"

HEAD = """# Supported families

Every line is made of what `tests/test_families.py` measured with untrained layers of width 16 and 24 states (distilled
ones: 10), on slowly varying random input; `python scripts/families.py` runs it and writes this page. Trained models are
in the [results](results.md).

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


def main() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/test_families.py", f"--families={RESULT}"]
    subprocess.run(command, check=True, cwd=ROOT)
    rows = json.loads(RESULT.read_text(encoding="utf-8")).values()
    lines = [
        f"| {r['title']} | {r['how']} | {r['full_rank_float64']:.0e}, {r['full_rank_float32']:.0e} "
        f"| {r['half_rank']:.2f} | {r['said']:.2f} ({r['kind']}) | {r['random']:.2f} "
        f"| {'yes' if r.get('trains') else 'no'} | {'yes' if r.get('generates') else 'no'} |"
        for r in rows
    ]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main()
