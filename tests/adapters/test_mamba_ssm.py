from __future__ import annotations

import pytest
import torch
from torch import nn

from compressm.adapters import Mamba2Adapter, MambaAdapter, MambaSSM2Adapter, MambaSSMAdapter
from compressm.adapters.changes import layer_values
from compressm.layers import Mamba, Mamba2
from compressm.theory.recurrence import balance_selective, moments
from compressm.theory.selection import reduce_selective

HIDDEN = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))


class AuthorsMamba(Mamba):
    """Our layer, which has the authors' parameters, under the names of their attributes."""

    d_state = 6  # type: ignore[assignment]


class AuthorsMamba2(Mamba2):
    d_state, d_ssm, headdim, nheads, ngroups = 6, 16, 4, 4, 2  # type: ignore[assignment]
    rmsnorm, dt_limit = True, (0.0, float("inf"))


CASES = [
    (lambda: AuthorsMamba(8, 6), MambaSSMAdapter("mamba_ssm.modules.mamba_simple.Mamba"), MambaAdapter()),
    (
        lambda: AuthorsMamba2(8, 6, head_dim=4, n_groups=2),
        MambaSSM2Adapter("mamba_ssm.modules.mamba2.Mamba2"),
        Mamba2Adapter(),
    ),
]


@pytest.mark.parametrize(("build", "theirs", "ours"), CASES, ids=["Mamba", "Mamba2"])
def test_the_same_parameters_are_read_and_cut_as_in_our_layer(build, theirs, ours) -> None:
    torch.manual_seed(1)
    layer: nn.Module = build()
    with torch.no_grad():
        expected, found = ours.signals(layer, HIDDEN), theirs.signals(layer, HIDDEN)
    for name in ("x", "step", "rates", "B", "C", "gain"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    reduction = reduce_selective(balance_selective(moments(found)), 3, False, ours.folds_out)
    changes = [adapter.plan(layer_values(layer), reduction) for adapter in (theirs, ours)]
    assert changes[0].values().keys() == changes[1].values().keys()
    for name, value in changes[1].values().items():
        assert torch.equal(changes[0].values()[name], value), name
    assert changes[0].attributes == {**changes[1].attributes, "d_state": 3}
    assert theirs.state_dim(layer) == 6
    resized = theirs.resized(layer, 4).values()
    assert {name: value.shape for name, value in resized.items()} == {
        name: value.shape for name, value in ours.resized(layer, 4).values().items()
    }


@pytest.mark.parametrize(("build", "theirs", "ours"), CASES, ids=["Mamba", "Mamba2"])
def test_signals_stay_on_the_layers_device(build, theirs, ours) -> None:
    layer: nn.Module = build().to("meta")
    for adapter in (theirs, ours):
        signals = adapter.signals(layer, HIDDEN.to("meta"))
        assert {value.device.type for value in vars(signals).values() if torch.is_tensor(value)} == {"meta"}
