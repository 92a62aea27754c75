"""States in order of worth: the same function at full size, and every prefix the cut that it claims to be."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm import StateOrder, sort_states
from compressm.cutting import state_dims
from compressm.cutting.ordering import ORDER_FILE
from compressm.errors import CheckpointError, InvalidRankRuleError, UnsupportedModelError
from compressm.layers import SequenceClassifier
from compressm.theory.fisher import MaskFisher, removal_rounds
from sorting_cases import OWN, THEIRS, model_of, own, tokens


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Any = model(x)
    return out if isinstance(out, Tensor) else out.logits


ALL = [*(("own", name) for name in OWN), *(("transformers", name) for name in THEIRS)]


@pytest.mark.parametrize(("where", "name"), ALL)
def test_sorting_changes_nothing_and_a_prefix_is_the_direct_cut(where: str, name: str) -> None:
    """By a score, whose direct cuts compensate by nothing: the same function as the cut of the unsorted model, and bit
    by bit the weights of the cut of the sorted one."""
    model, data, x = model_of(where, name), [tokens()], tokens(seed=1)
    half = {layer: n // 2 for layer, n in state_dims(model).items()}
    states = next(iter(half.values()))
    before, direct = logits(model, x), copy.deepcopy(model)
    tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9} if where == "own" else {"rtol": 2e-3, "atol": 2e-4}
    order = sort_states(model, data, selection="gramians")
    torch.testing.assert_close(logits(model, x), before, **tolerance)
    again = copy.deepcopy(model)
    report = order.slice(model, states=states)
    assert state_dims(model) == half == report.state_dims
    compressm.compress(direct, states=states, data=data, selection="gramians")
    torch.testing.assert_close(logits(model, x), logits(direct, x), **tolerance)
    compressm.compress(again, states=states, data=data, selection="gramians")
    for (parameter, mine), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, msg=parameter)


@pytest.mark.parametrize(("where", "name"), ALL)
def test_the_default_order_changes_nothing(where: str, name: str) -> None:
    model, x = model_of(where, name), tokens(seed=1)
    before = logits(model, x)
    order = sort_states(model, [tokens()])
    tolerance: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-7} if where == "own" else {"rtol": 2e-3, "atol": 2e-4}
    torch.testing.assert_close(logits(model, x), before, **tolerance)
    for one in order.layers.values():
        assert one.expected[0] > 0.3
        assert one.expected[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("where", "name"), [("own", "mamba2"), ("own", "rg_lru"), ("own", "mamba"), ("transformers", "mamba2")]
)
def test_by_the_loss_the_order_is_taken_whose_slices_cost_least(where: str, name: str) -> None:
    model, data, x = model_of(where, name), [tokens(8, seed=s) for s in (0, 2)], tokens(seed=1)
    before, whole = logits(model, x), copy.deepcopy(model)
    order = sort_states(model, data, loss="classification")
    tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9} if where == "own" else {"rtol": 2e-3, "atol": 2e-4}
    torch.testing.assert_close(logits(model, x), before, **tolerance)
    assert set(order.rises) == {"moments", "fisher", "saliency", "powers"}
    assert order.selection == next(iter(order.rises))
    logs = [sum(math.log(max(rise, 1e-9)) for rise in rises) for rises in order.rises.values()]
    assert logs == sorted(logs)
    n = next(iter(state_dims(whole).values()))
    for share, told in zip((2, 4, 8), order.rises[order.selection], strict=True):
        smaller = copy.deepcopy(model)
        order.slice(smaller, states=n // share)
        nats, count = 0.0, 0
        for batch in data:
            p, q = (F.log_softmax(logits(one, batch).double(), -1) for one in (whole, smaller))
            nats += float((p.exp() * (p - q)).sum())
            count += batch.numel()
        assert told == pytest.approx(nats / count, rel=1e-3, abs=1e-9)
    assert sort_states(whole, data).rises == {}


def test_a_layer_whose_coordinates_are_free_has_one_best_order() -> None:
    model, other = own("linear_attention"), own("linear_attention")
    order = sort_states(model, [tokens()], loss="classification")
    plain = sort_states(other, [tokens()])
    assert list(order.rises) == ["moments"]
    assert order.layers == plain.layers
    with pytest.raises(InvalidRankRuleError, match="selection='gramians' beside a loss"):
        sort_states(model, [tokens()], selection="gramians", loss="classification")


def test_the_order_by_the_fisher_matrix_is_that_of_greedy_removal() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 2, 5, dtype=torch.float64, generator=generator)
    fisher = MaskFisher.of(gradients)
    F_all, left = fisher.shrunk(), [set(range(5)), set(range(5))]
    gone, removed = list[int](), [list[int](), list[int]()]
    for _ in range(5):
        waiting = {0, 1}
        while waiting:
            costs = {
                (g, i): float(F_all[5 * g + i, 5 * g + i] + 2 * F_all[5 * g + i, gone].sum())
                for g in waiting
                for i in left[g]
            }
            g, i = min(costs, key=lambda one: costs[one])
            gone.append(5 * g + i)
            removed[g].append(i)
            left[g].remove(i)
            waiting.remove(g)
    assert removal_rounds(fisher).tolist() == removed


def test_prefixes_of_linear_attention_are_balanced_truncations() -> None:
    model, data, x = own("linear_attention"), [tokens()], tokens(seed=1)
    direct, rotated = copy.deepcopy(model), own("delta_net")
    order = sort_states(model, data)
    report = order.slice(model, states=3)
    made = compressm.compress(direct, states=3, data=data)
    torch.testing.assert_close(logits(model, x), logits(direct, x), rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(report.layers, made.layers, strict=True):
        assert mine.certificate is not None
        assert theirs.certificate is not None
        assert mine.certificate.errors()[0] == pytest.approx(theirs.certificate.errors()[0], rel=1e-3)
    for one in sort_states(rotated, data).layers.values():  # nested subspaces
        assert one.order is None
        assert list(one.expected) == sorted(one.expected, reverse=True)


def test_an_order_is_saved_and_a_slice_of_a_slice_is_a_slice(tmp_path: Path) -> None:
    model = own("mamba2", states=16)
    order = sort_states(model, [tokens()])
    once = copy.deepcopy(model)
    order.slice(once, states=5)
    order.save(tmp_path)
    read = StateOrder.load(tmp_path)
    assert read == order
    read.slice(model, fraction=0.8, multiple_of=4)
    assert set(state_dims(model).values()) == {12}
    rest = read.of(model)
    rest.slice(model, states=5)
    torch.testing.assert_close(model.state_dict(), once.state_dict(), rtol=0, atol=0)
    assert rest.of(model).layers["blocks.0.ssm"].states == 5


def test_what_cannot_be_sorted_or_sliced_is_refused(tmp_path: Path) -> None:
    model = own("mamba2", states=16)
    before = copy.deepcopy(model.state_dict())
    order = sort_states(own("mamba2", states=16), [tokens()])
    with pytest.raises(InvalidRankRuleError, match="llama"):
        order.slice(model, states=8, target="llama.cpp")
    with pytest.raises(InvalidRankRuleError, match="states"):
        order.slice(model)
    other = own("mamba2", states=9)
    with pytest.raises(UnsupportedModelError, match="has 9 states, and 16 were sorted"):
        order.slice(other, states=4)
    with pytest.raises(UnsupportedModelError, match="is a linear layer"):
        sort_states(SequenceClassifier(1, 2, d_model=4, d_state=4), [torch.zeros(2, 5, 1)])
    with pytest.raises(CheckpointError, match="sort them first"):
        StateOrder.load(tmp_path)
    order.save(tmp_path)
    content = json.loads((tmp_path / ORDER_FILE).read_text())
    content["layers"]["blocks.0.ssm"]["order"][0].pop()
    (tmp_path / ORDER_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="do not fit together"):
        StateOrder.load(tmp_path)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
