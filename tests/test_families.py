"""What is promised of every kind of layer, held against it; docs/families.md is made of what is measured here."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressm
from compressm.adapters import Adapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.cutting import state_dims
from compressm.layers.families import FAMILIES as MAKERS
from compressm.observing.over_data import gather
from compressm.theory.balancing import balance, truncate
from compressm.theory.recurrence import ErrorEstimate, SelectiveReduction, balance_selective
from compressm.theory.selection import _balanced_maps, reduce_selective

ROOT = Path(__file__).parents[1]
WIDTH, STATES = 16, 24


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        title: for people.
        options: of the layer, beside width and states.
        how: how it is cut, for the table.
    """

    title: str
    options: dict[str, Any]
    how: str


EXACT = "balanced truncation"
HANKEL = "Hankel SVD of the filter"
ROTATED = "keys rotated; queries take over the others' work, per head"
SELECTED = "states selected; the others' work folds into C"
PER_HEAD = f"{EXACT} per head"
FAMILIES = {
    "lru": Family("LRU", {"r_min": 0.9, "max_phase": 0.5}, EXACT),
    "s5": Family("S5", {"dt_min": 1e-2}, EXACT),
    "s5-both": Family("S5, both directions", {"dt_min": 1e-2}, EXACT),
    "s4d": Family("S4D", {"dt_min": 1e-2}, f"{EXACT} per channel, one rank for all"),
    "s4": Family("S4, distilled", {"d_state": 12, "max_length": 128, "dt_min": 1e-2}, f"{HANKEL}, then {EXACT}"),
    "hyena": Family("Hyena, distilled", {"d_state": 0, "max_length": 128}, f"{HANKEL}, then {EXACT}"),
    "mamba": Family("Mamba (S6)", {}, SELECTED),
    "mamba2": Family("Mamba-2 (SSD)", {"head_dim": 8}, "states selected"),
    "mamba3": Family("Mamba-3", {"head_dim": 8}, "pairs of states selected, the same in all heads"),
    "linear-attention": Family("linear attention", {"n_heads": 2}, PER_HEAD),
    "retnet": Family("RetNet (fixed decay)", {"n_heads": 2}, PER_HEAD),
    "gated": Family("linear attention, gated decay", {"n_heads": 2}, PER_HEAD),
    "gla": Family("gated linear attention", {"n_heads": 2}, SELECTED + ", per head"),
    "delta-net": Family("DeltaNet", {"n_heads": 2}, ROTATED),
    "gated-delta-net": Family("Gated DeltaNet", {"n_heads": 2}, ROTATED),
    "rg-lru": Family("RG-LRU (Griffin)", {"n_blocks": 2}, "channels selected; the others' work folds out"),
}


def make(name: str) -> Any:
    layer = MAKERS[name](**{"d_model": WIDTH, "d_state": STATES, **FAMILIES[name].options})
    return distilled(layer) if name in ("s4", "hyena") else layer


def distilled(layer: nn.Module) -> nn.Module:
    holder = nn.ModuleList([layer])  # an S4 is replaced whole
    compressm.distil(holder, order=16)
    return holder[0]


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A layer, and sequences that vary slowly enough for a state to matter."""
    torch.manual_seed(0)
    layer = make(name).to(dtype)
    u = torch.randn(4, 100, WIDTH, dtype=dtype).cumsum(1) / 5
    return layer, u - u.mean(1, keepdim=True)


def change_of_basis(layer: nn.Module, u: Tensor) -> None:
    """A cut that cuts nothing, in place: all states, in other coordinates where the family has any."""
    (path, (module, adapter)), *_ = find_layers(layer).items()
    n = adapter.state_dim(module)
    if isinstance(adapter, Adapter):
        reduction = truncate(balance(adapter.read(layer_values(module))), n, exceed=True)
        write(module, adapter.plan(layer_values(module), reduction))
        return
    balancing = balance_selective(gather(layer, [u])[path])
    if adapter.rotates:
        basis = torch.linalg.qr(torch.randn(balancing.P.shape, dtype=torch.float64))[0]
        reduction = SelectiveReduction(basis, basis, None, ErrorEstimate(n, n, 0.0, 0.0))
    elif adapter.folds_into:
        into, out = _balanced_maps(balancing, n)
        reduction = SelectiveReduction(into, out, None, ErrorEstimate(n, n, 0.0, 0.0))
    else:
        reduction = reduce_selective(balancing, n, False, adapter.folds_out)
    write(module, adapter.plan(layer_values(module), reduction))


def error(layer: nn.Module, u: Tensor, before: Tensor) -> float:
    with torch.no_grad():
        return float((layer(u) - before).norm() / before.norm())


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    rows: dict[str, dict[str, Any]] = {name: {"title": f.title, "how": f.how} for name, f in FAMILIES.items()}
    yield rows
    target = request.config.getoption("--families")
    if target:
        Path(str(target)).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def test_the_stored_measurements_are_of_these_families() -> None:
    """docs/families.md is made of them; ``python scripts/families.py --measure`` makes them anew."""
    stored = json.loads((ROOT / "results" / "families.json").read_text(encoding="utf-8"))
    assert [(name, row["title"], row["how"]) for name, row in stored.items()] == [
        (name, family.title, family.how) for name, family in FAMILIES.items()
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_at_full_rank_outputs_stay(name: str, measured: dict[str, dict[str, Any]]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 2e-5)):
        layer, u = build(name, dtype)
        with torch.no_grad():
            before = layer(u)
        change_of_basis(layer, u)
        found = error(layer, u, before)
        measured[name][f"full_rank_{str(dtype).removeprefix('torch.')}"] = found
        assert found <= tolerance


@pytest.mark.parametrize("name", FAMILIES)
def test_at_half_rank_the_error_is_what_was_said(name: str, measured: dict[str, dict[str, Any]]) -> None:
    layer, u = build(name, torch.float32)
    with torch.no_grad():
        before = layer(u)
    at_random = copy.deepcopy(layer)
    half = next(iter(state_dims(layer).values())) // 2
    (report,) = compressm.compress(layer, states=half, data=[u]).layers
    compressm.compress(at_random, states=half, data=[u], selection="random")
    found, other = error(layer, u, before), error(at_random, u, before)
    certificate: Any = report.certificate
    selective = isinstance(certificate, ErrorEstimate)
    said = certificate.relative_error if selective else certificate.relative_h2_error
    measured[name] |= {"states": [report.states_before, report.states_after], "half_rank": found, "random": other}
    measured[name] |= {"said": said, "kind": "expected" if selective else "H2"}
    assert report.states_after <= report.states_before // 2
    assert certificate.valid
    assert found < 0.75 * other
    if name in ("lru", "s5", "s4d"):  # the layer is the system, and D u besides
        assert found * before.norm() <= certificate.bound * u.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_after_a_cut_it_trains_on(name: str, measured: dict[str, dict[str, Any]]) -> None:
    layer, u = build(name, torch.float32)
    target, optimizer = u.roll(1, 1), torch.optim.Adam(layer.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = (layer(u) - target).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses = [step() for _ in range(10)]
    compressm.compress(layer, states=6, data=[u], optimizer=optimizer)
    before = {key: value.detach().clone() for key, value in layer.named_parameters()}
    losses += [step() for _ in range(10)]
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape
        assert bool((parameter != before[key]).any()), key
    for state in optimizer.state.values():
        assert all(bool(v.isfinite().all()) for v in state.values() if isinstance(v, Tensor))
    assert losses[-1] < losses[0]
    measured[name]["trains"] = True


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "s5-both"])
def test_after_a_cut_it_generates_step_by_step(name: str, measured: dict[str, dict[str, Any]]) -> None:
    layer, u = build(name, torch.float64)
    compressm.compress(layer, states=6, data=[u])
    state, outputs = layer.initial_state(u.shape[0]), []  # type: ignore[operator]
    with torch.no_grad():
        for now in u.unbind(1):
            y, state = layer.step(now, state)  # type: ignore[operator]
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), layer(u), atol=1e-8, rtol=1e-8)
    measured[name]["generates"] = True
