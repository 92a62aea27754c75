"""One cut by data and loss in two processes, each with its own share of the data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed on gloo"),
]


def main(out: Path, unfit: bool) -> None:
    """What one process does."""
    import compressm
    from compressm.errors import ConfigError
    from compressm.layers import SequenceClassifier

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = SequenceClassifier(2, 4, d_model=8, d_state=12, n_layers=2, layer="lru", r_min=0.3, r_max=0.95)
    generator = torch.Generator().manual_seed(rank + 1)
    data = [torch.randn(6, 16, 2, generator=generator).cumsum(1) * (1 + 2 * rank) for _ in range(8)]
    if unfit and rank == 1:
        data[2] *= torch.nan
    found: dict[str, Any] = {}
    try:
        report = compressm.compress(net, total_states=9, data=data, loss="classification")
        found = {"dims": report.state_dims, "rises": [report.predicted_loss, report.measured_loss]}
        found["weights"] = [value.sum().item() for value in net.state_dict().values()]
    except ConfigError as error:
        found = {"error": str(error)}
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("unfit", [False, True])
def test_all_processes_make_one_cut_or_raise_one_error(tmp_path: Path, unfit: bool) -> None:
    from helpers import torchrun  # not found where this file runs as a script

    torchrun(2, Path(__file__), tmp_path, int(unfit))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    if unfit:
        assert "batch 2 of data holds nan" in first["error"]
    else:
        assert sum(first["dims"].values()) == 9


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")
