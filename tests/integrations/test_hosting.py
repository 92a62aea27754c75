"""What a plain training loop may hold besides an optimizer: half precision, averaged copies, compiled graphs."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compressm.adapters import find_layers
from compressm.adapters.changes import write
from compressm.cutting import state_dims
from compressm.cutting.carry import follow
from compressm.errors import UnsupportedModelError
from compressm.layers import LRU, SequenceClassifier
from compressm.runtime.compiled_graphs import Pause
from compressm.training.compressor import Compressor

# Accuracies of so few digits cannot resolve a max_drop of 0, and setbacks end the cutting.
pytestmark = pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")

CUTS = (4, 8, 12)


def classifier(d_state: int = 16, n_layers: int = 2) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, 2, d_model=4, d_state=d_state, n_layers=n_layers, dropout=0.0, norm="layer", r_min=0.9)


def batch(step: int, length: int = 40) -> tuple[Tensor, Tensor]:
    u = torch.randn(8, length, 1, generator=torch.Generator().manual_seed(step))
    return u, (u.sum((1, 2)) > 0).long()


def compress(model: nn.Module, optimizer: torch.optim.Optimizer, **arguments: Any) -> Compressor:
    return Compressor(model, optimizer, 24, states=4, window=0.5, cuts=3, **arguments)


def train(dtype: torch.dtype | None, scaler: Any = None) -> tuple[list[float], nn.Module, list[float]]:
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = compress(model, optimizer, scaler=scaler)
    losses, scales = [], []
    for step in range(24):
        u, y = batch(step)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(u).float(), y)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        compressor.step()
        losses.append(float(loss.detach()))
    assert [event.step for event in compressor.history if event.kind == "cut"] == list(CUTS)
    return losses, model, scales


@pytest.fixture(scope="module")
def full_precision() -> list[float]:
    return train(None)[0]


def test_bf16_autocast_through_cuts(full_precision: list[float]) -> None:
    losses, model, _ = train(torch.bfloat16)
    assert max(state_dims(model).values()) <= 4
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    # bfloat16 has 8 bits of mantissa, and the loss is about 0.7.
    torch.testing.assert_close(losses, full_precision, rtol=0, atol=0.03)


def test_fp16_with_a_scaler_through_cuts(full_precision: list[float]) -> None:
    # The scale doubles every 5 steps; the first steps overflow float16 and are skipped.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5)
    losses, model, scales = train(torch.float16, scaler)
    assert max(state_dims(model).values()) <= 4
    assert scales[0] < 2.0**20
    late = scales[CUTS[-1] :]
    assert any(after > before for before, after in itertools.pairwise(late))  # it goes on growing after the last cut
    assert losses[-1] < losses[0]


def test_averaged_copies_follow() -> None:
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    compressor = compress(model, optimizer, followers=[average])
    for step in range(24):
        u, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(u), y).backward()
        optimizer.step()
        average.update_parameters(model)
        before = {name: value.clone() for name, value in average.module.state_dict().items()}
        event = compressor.step()
        if event is not None and event.kind == "cut":
            for name, value in average.module.state_dict().items():
                expected = model.state_dict()[name] if value.shape != before[name].shape else before[name]
                torch.testing.assert_close(value, expected, rtol=0, atol=0)
            copied = average.module.get_parameter("blocks.0.ssm.nu_log")
            assert copied.data_ptr() != model.get_parameter("blocks.0.ssm.nu_log").data_ptr()
    assert state_dims(average.module) == state_dims(model)
    assert not torch.equal(average.module.blocks[0].ssm.nu_log, model.blocks[0].ssm.nu_log)
    assert torch.isfinite(average(batch(0)[0])).all()


def test_averaged_copies_are_rolled_back_with_the_model() -> None:
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    compressor = Compressor(
        model,
        optimizer,
        24,
        fraction=0.5,
        max_drop=0.1,
        window=0.5,
        cuts=1,
        on_setback="stop",
        followers=[average],
        evaluate=lambda m: float(set(state_dims(m).values()) == {16}),
    )
    before: dict[str, Tensor] = {}
    event = None
    while event is None or event.kind != "rolled_back":
        u, y = batch(0)
        optimizer.zero_grad()
        F.cross_entropy(model(u), y).backward()
        optimizer.step()
        average.update_parameters(model)
        now = copy.deepcopy(average.state_dict())
        event = compressor.step()
        if event is not None and event.kind == "cut":
            before = now
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())


def test_an_average_over_all_steps_starts_again_at_a_cut() -> None:
    torch.manual_seed(0)
    model = LRU(2, 8)
    average = AveragedModel(model)
    for _ in range(50):
        average.update_parameters(model)
    change = find_layers(model)[""][1].resized(model, 4)
    write(model, change)
    follow(average, model, {"": change})
    with torch.no_grad():
        model.B_re.fill_(1.0)
    for _ in range(9):
        average.update_parameters(model)
    torch.testing.assert_close(average.module.B_re, torch.full((4, 2), 0.9))  # and not 9/59


def test_a_follower_must_be_a_copy_of_the_model() -> None:
    model, other = classifier(), SequenceClassifier(1, 2, 4, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"followers: SequenceClassifier has 1 .* the model has 2"):
        compress(model, optimizer, followers=[other])


def test_an_average_of_the_model_must_be_passed() -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = AveragedModel(model)
    with pytest.raises(UnsupportedModelError, match=r"AveragedModel averages this model, .* followers=\[...\]"):
        compress(model, optimizer)
    compress(model, optimizer, followers=[average])
    other = SequenceClassifier(1, 2, d_model=4, d_state=16, n_layers=2, norm="layer", r_min=0.9)
    compress(other, torch.optim.SGD(other.parameters(), lr=0.1))  # another model's average is none of its business


class ModelEma(nn.Module):
    """An average as in timm: of everything in the state dict, broadcasting."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mine, theirs in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.9 * mine + 0.1 * theirs)


@pytest.mark.parametrize("kind", [AveragedModel, ModelEma])
def test_an_average_that_a_cut_did_not_reach_refuses_to_broadcast(kind: Any) -> None:
    torch.manual_seed(0)
    model = LRU(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor = Compressor(model, optimizer, 4, states=1, window=0.5, cuts=2, min_reduction=0.0)
    average, other, twin = kind(model), LRU(2, 16), None  # begun too late to be seen
    twin = kind(other)
    update = "update" if kind is ModelEma else "update_parameters"
    getattr(average, update)(model)
    for _ in range(2):
        model(torch.randn(2, 8, 2)).square().mean().backward()
        optimizer.step()
        compressor.step()
    assert compressor.state_dims == {"": 1}  # so that every size broadcasts
    getattr(twin, update)(other)
    with pytest.raises(UnsupportedModelError, match=r"has \[16\] states and the model that it averages \[1\], since a"):
        getattr(average, update)(model)
    model.load_state_dict(other.state_dict())
    getattr(average, update)(model)


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo as dynamo

    limit = dynamo.config.recompile_limit
    trace = logging.getLogger("torch.__trace")  # writes down every tensor as long as anyone listens, as pytest does
    trace.disabled = True
    dynamo.config.recompile_limit = 8  # the default, which other tests' cuts have raised
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    trace.disabled = False
    dynamo.config.recompile_limit = limit
    dynamo.reset()
    dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, of itself
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_graphs_are_compiled_once_per_cut_and_counted(
    dynamo: Any, in_place: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = classifier(n_layers=1), classifier(n_layers=1)
    compiled: Any = model
    if in_place:
        model.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    compressors = [compress(m, o, min_reduction=0.0) for m, o in zip((model, plain), optimizers, strict=True)]
    counts = []
    with caplog.at_level("INFO", logger="compressm"):
        for step in range(24):
            u, y = batch(step, length=16)
            for network, optimizer, compressor in zip((compiled, plain), optimizers, compressors, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(network.train()(u), y).backward()
                optimizer.step()
                compressor.step()
            with torch.no_grad():
                compiled.eval()(u)
            counts.append(dynamo.utils.counters["stats"]["unique_graphs"])
    # One graph for training and one for evaluation, at the start and after every cut; none falls back to eager mode.
    assert [counts[0], *(counts[step] for step in CUTS), counts[-1]] == [2, 4, 6, 8, 8]
    events = [(event.kind, event.step, event.graphs) for event in compressors[0].history if event.kind == "recompiled"]
    assert events == [("recompiled", step + 1, 2) for step in CUTS]
    assert sum("compiled graphs are compiled anew" in message for message in caplog.messages) == 2 * len(CUTS)
    with torch.no_grad():  # of the weights, balanced bases of two models that rounding tells apart may differ in sign
        torch.testing.assert_close(model.eval()(u), plain.eval()(u), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_observation_is_invisible_to_the_compiler(dynamo: Any, in_place: bool) -> None:
    def selective() -> SequenceClassifier:
        torch.manual_seed(0)
        return SequenceClassifier(1, 2, d_model=4, d_state=16, n_layers=1, layer="mamba", dropout=0.0, norm="layer")

    model, plain = selective(), selective()
    compiled: Any = model
    if in_place:
        model.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    arguments: dict[str, Any] = {"states": 4, "window": 1.0, "cuts": 2}  # observed at every second step
    compressors = [Compressor(m, o, 40, **arguments) for m, o in zip((compiled, plain), optimizers, strict=True)]
    graphs = []
    for step in range(44):
        u, y = batch(step, length=16)
        for network, optimizer, compressor in zip((compiled, plain), optimizers, compressors, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(u), y).backward()
            optimizer.step()
            compressor.step()
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    # Observed steps compile nothing, and every size is compiled once, in one piece.
    assert (graphs[0], graphs[1], graphs[19], graphs[20], graphs[21], graphs[-1]) == (0, 1, 1, 1, 2, 3)
    assert not dynamo.utils.counters["graph_break"]
    assert [list(one.state_dims.values()) for one in compressors] == [[4], [4]]
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_compiled_code_is_used_again_when_an_observer_is_gone(dynamo: Any) -> None:
    def graphs_of_a_call() -> int:
        dynamo.reset()
        before = dynamo.utils.counters["stats"]["unique_graphs"]
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        return dynamo.utils.counters["stats"]["unique_graphs"] - before

    first, second = Pause(), Pause()
    first.begin()
    second.begin()
    first.end()
    assert graphs_of_a_call() == 0  # the second lasts
    second.end()
    second.end()
    assert graphs_of_a_call() == 1
    model = SequenceClassifier(1, 2, d_model=4, d_state=8, layer="mamba")
    compressor = Compressor(model, torch.optim.SGD(model.parameters(), lr=0.1), 24, states=4)
    assert graphs_of_a_call() == 0
    del compressor
    gc.collect()
    assert graphs_of_a_call() == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_more_cuts_than_dynamos_limit_still_compile(dynamo: Any) -> None:
    model = classifier(d_state=24, n_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    cuts = dynamo.config.recompile_limit + 2
    compressor = Compressor(model, optimizer, 4 * cuts, states=4, window=1.0, cuts=cuts, min_reduction=0.0)
    made = 0
    for step in range(4 * cuts):
        u, y = batch(step, length=16)
        F.cross_entropy(compiled(u), y).backward()
        optimizer.step()
        event = compressor.step()
        made += event is not None and event.kind == "cut"
    compiled(batch(0, length=16)[0])
    assert made > cuts - 3
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1 + made
