"""Training in few bits through a cut: weights in bfloat16 and float16, and optimizers with 8-bit state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import LayerChange, ParameterChange, layer_values
from compressm.cutting.carry import check_optimizer, prepare_carry
from compressm.cutting.copies import copied_state
from compressm.cutting.quantised_state import is_quantised, read_state, write_state
from compressm.layers import Mamba, SequenceClassifier
from compressm.observing.over_data import gather
from compressm.training.compressor import Compressor
from layer_cases import LAYERS, WIDTH

KEPT = ("A_log", "D", "dt_bias")  # what published checkpoints keep in float32


def halved(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model with weights in few bits, and in float32 what published checkpoints keep so."""
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in KEPT:
            parameter.data = parameter.data.float()
    return model


MIXED = [
    name for name, make in LAYERS.items() if any(n.rpartition(".")[2] in KEPT for n, _ in make().named_parameters())
]


@pytest.mark.parametrize("name", [name for name in MIXED if name != "s4"])  # whose eigenvectors need float32 throughout
def test_a_layer_computes_in_its_weights_dtype_beside_float32_rates(name: str) -> None:
    torch.manual_seed(0)
    layer, u = LAYERS[name](), torch.randn(2, 16, WIDTH)
    wanted = layer(u).detach()
    halved(layer)
    y = layer(u.bfloat16())
    assert y.dtype == torch.bfloat16
    assert float((y.detach().float() - wanted).norm() / wanted.norm()) < 0.02  # bfloat16 has 8 bits
    y.float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype for p in layer.parameters() if p.grad is not None)
    if name in ("s5-both", "bidirectional"):
        return
    state = layer.initial_state(2)  # type: ignore[operator]
    for t in range(3):
        out, state = layer.step(u[:, t].bfloat16(), state)  # type: ignore[operator]
        assert out.dtype == torch.bfloat16
    assert float((out.detach().float() - wanted[:, 2]).norm() / wanted[:, 2].norm()) < 0.03


@pytest.mark.parametrize("family", ["mamba", "mamba2", "MambaForCausalLM", "Mamba2ForCausalLM"])
def test_moments_are_observed_beside_float32_rates(family: str) -> None:
    # The observation read the input in the dtype of the layer's first parameter, which is A_log.
    torch.manual_seed(0)
    if "For" in family:
        transformers: Any = pytest.importorskip("transformers")
        settings = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8}
        if family.startswith("Mamba2"):
            settings |= {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
        model = getattr(transformers, family)(
            getattr(transformers, family.replace("ForCausalLM", "Config"))(**settings)
        )
        data: Any = {"input_ids": torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(1))}
    else:
        options = {"head_dim": 4} if family == "mamba2" else {}
        model = SequenceClassifier(2, 3, d_model=8, d_state=8, dropout=0.0, norm="layer", layer=family, **options)
        data = torch.randn(2, 12, 2)
    (exact,) = gather(model, data).values()
    model = halved(model)
    data = data if isinstance(data, dict) else data.bfloat16()
    (rounded,) = gather(model, data).values()
    for key, value in exact.tensors().items():
        if value.is_floating_point() and value.norm() > 0:
            assert float((rounded.tensors()[key] - value).norm() / value.norm()) < 0.05, key


OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "stochastic rounding": lambda p: low_bit("_AdamW", p, bf16_stochastic_round=True),
    "8 bits": lambda p: low_bit("AdamW8bit", p),
}


def low_bit(name: str, parameters: Any, **settings: Any) -> Optimizer:
    kind: Any = getattr(pytest.importorskip("torchao.optim"), name)
    return kind(parameters, lr=1e-3, **settings)


@pytest.fixture
def _eager() -> Iterator[None]:
    """torchao compiles every step, which takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["lru", "mamba", "mamba2"])
@pytest.mark.parametrize("pure", [False, True], ids=["float32 rates", "pure"])
def test_bfloat16_trains_and_is_cut(kind: str, name: str, pure: bool) -> None:
    torch.manual_seed(0)
    options = {"head_dim": 4} if kind == "mamba2" else {}
    model = SequenceClassifier(2, 3, d_model=8, d_state=16, dropout=0.0, norm="layer", layer=kind, **options)
    model = model.bfloat16() if pure else halved(model)
    dtypes = {key: p.dtype for key, p in model.named_parameters()}
    optimizer = OPTIMIZERS[name](model.parameters())
    compressor, events = Compressor(model, optimizer, 40, states=6, cuts=1, window=0.1), []
    for _ in range(7):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 9, 2).bfloat16()).float(), torch.randint(0, 3, (4,))).backward()
        optimizer.step()
        events.append(compressor.step())
    assert [event.kind for event in events if event] == ["cut"]
    assert max(compressor.state_dims.values()) <= 6
    for key, parameter in model.named_parameters():
        assert parameter.dtype == dtypes[key], key
        assert parameter.isfinite().all(), key


def test_float16_with_a_scaler_whose_first_step_overflows() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 3, d_model=8, d_state=16, dropout=0.0, norm="layer", layer="mamba")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    compressor, events = Compressor(model, optimizer, 40, states=6, cuts=2, window=0.3, scaler=scaler), []
    for _ in range(30):  # of which the first ones overflow, and do not count
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(torch.randn(4, 9, 2)).float(), torch.randint(0, 3, (4,)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        events.append(compressor.step())
    assert [event.kind for event in events if event] == ["cut", "cut"]
    assert scaler.get_scale() < 2.0**24
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


def test_training_that_fails_without_cuts_is_not_refused_for_its_optimizer() -> None:
    # Adam's second moments vanish in float16. The examination looks at what a cut adds to that.
    layer = Mamba(4, 8).half()
    Compressor(layer, torch.optim.AdamW(layer.parameters()), 20, states=4)


# 8-bit state.


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao_s_state_is_read_carried_and_stored_in_few_bits_again(kind: str) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 256))
    optimizer = low_bit(kind, [parameter])
    for _ in range(3):
        parameter.grad = torch.randn(64, 256)
        optimizer.step()
    before = {key: read_state(optimizer.state[parameter], key) for key in ("exp_avg", "exp_avg_sq")}
    G = torch.randn(32, 64, dtype=torch.float64)
    change = LayerChange((ParameterChange(("w",), (torch.zeros(32, 256),), 0, G, G.square()),), {})
    store = prepare_carry(optimizer, {"w": parameter}, change, "transform")
    assert all(torch.equal(read_state(optimizer.state[parameter], key), value) for key, value in before.items())
    parameter.data = torch.zeros(32, 256)
    store()
    state = optimizer.state[parameter]
    assert state["step"] == 3
    for key, wanted in (("exp_avg", G @ before["exp_avg"]), ("exp_avg_sq", G.square() @ before["exp_avg_sq"])):
        assert is_quantised(state, key)
        error = (read_state(state, key) - wanted).abs() / wanted.abs().amax(1, keepdim=True)
        assert float(error.max()) < (0.2 if kind == "AdamW4bit" else 0.04), key  # the code's largest distance
    parameter.grad = torch.randn(32, 256)
    optimizer.step()
    assert parameter.isfinite().all()


@pytest.mark.usefixtures("_eager")
def test_a_parameter_that_a_cut_makes_too_small_for_8_bits_gets_full_state() -> None:
    layer = Mamba(16, 32)  # A_log has 32 x 32 entries, x_proj 65 x 32
    torch.manual_seed(0)
    big = nn.Parameter(torch.randn(32, 256))
    optimizer = low_bit("AdamW8bit", [big])
    big.grad = torch.randn(32, 256)
    optimizer.step()
    assert is_quantised(optimizer.state[big], "exp_avg")
    wanted = read_state(optimizer.state[big], "exp_avg")[:5]
    eye = torch.eye(5, 32, dtype=torch.float64)
    change = LayerChange((ParameterChange(("w",), (big.detach()[:5],), 0, eye, eye),), {})
    store = prepare_carry(optimizer, {"w": big}, change, "transform")
    big.data = big.detach()[:5].clone()
    store()
    assert not is_quantised(optimizer.state[big], "exp_avg")
    assert torch.equal(optimizer.state[big]["exp_avg"].double(), wanted)
    check_optimizer(low_bit("AdamW8bit", layer.parameters()), {"": layer})


@pytest.mark.usefixtures("_eager")
@pytest.mark.filterwarnings("ignore:.*no more cuts will be tried")
def test_8_bit_state_is_not_touched_by_the_examination_and_goes_back_with_a_roll_back() -> None:
    # Such tensors cannot be cloned. A twin that shared them made steps of its own on the real state.
    torch.manual_seed(0)
    layer, u = Mamba(64, 64), torch.randn(2, 8, 64)
    optimizer = low_bit("AdamW8bit", layer.parameters())

    def train() -> None:
        optimizer.zero_grad()
        layer(u).square().mean().backward()
        optimizer.step()

    train()
    assert is_quantised(optimizer.state[layer.x_proj.weight], "exp_avg_sq")

    def present() -> list[Tensor]:
        keys = ("exp_avg", "exp_avg_sq")
        return [read_state(optimizer.state[p], key) for p in layer.parameters() for key in keys] + [
            state["step"].clone() for state in optimizer.state.values()
        ]

    before = present()
    check_optimizer(optimizer, {"": layer})
    assert all(map(torch.equal, present(), before))
    compressor = Compressor(
        layer, optimizer, 20, states=16, cuts=1, window=0.1, max_drop=0.1,
        evaluate=lambda one: float(one.d_state == 64), check_after=2, on_setback="stop",
    )  # fmt: skip
    kinds: list[str] = []
    for step in range(4):
        train()
        before = present() if step == 1 else before
        kinds += [event.kind] if (event := compressor.step()) else []
    assert kinds == ["cut", "rolled_back"]
    assert all(map(torch.equal, present(), before))


def codes(numbers: Tensor, qmap: Tensor, block: int = 256) -> dict[str, Tensor]:
    """A state as bitsandbytes stores it, entry by entry: the nearest code of the share of the block's largest value."""
    flat, absmax, state = numbers.flatten(), [], []
    for start in range(0, flat.numel(), block):
        part = flat[start : start + block]
        absmax.append(part.abs().max())
        state += [int((qmap - x / absmax[-1]).abs().argmin()) for x in part]
    stored = torch.tensor(state, dtype=torch.uint8).view(numbers.shape)
    return {"state1": stored, "qmap1": qmap, "absmax1": torch.stack(absmax)}


def test_codes_in_blocks_are_read_and_written_as_bitsandbytes_does() -> None:
    torch.manual_seed(0)
    qmap = torch.cat([-torch.logspace(0, -6, 128), torch.zeros(1), torch.logspace(-6, 0, 127)]).sort().values
    numbers = torch.randn(15, 300)  # 17 blocks and a shorter one
    state = codes(numbers, qmap)
    wanted = torch.stack([
        qmap[int(code)] * state["absmax1"][i // 256] for i, code in enumerate(state["state1"].flatten())
    ])  # fmt: skip
    assert torch.equal(read_state(state, "state1").flatten().float(), wanted)
    empty = {"state1": torch.zeros(15, 300, dtype=torch.uint8), "qmap1": qmap, "absmax1": torch.zeros(18)}
    write_state(empty, "state1", numbers.double())
    assert torch.equal(empty["absmax1"], state["absmax1"])
    differ = empty["state1"] != state["state1"]
    assert float(differ.float().mean()) < 1e-3  # ties between two codes
    write_state(empty, "state1", torch.zeros(15, 300).double())
    assert read_state(empty, "state1").abs().max() == 0


def test_the_real_bitsandbytes() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 128))
    optimizer = bnb.optim.Adam8bit([parameter], lr=1e-3)
    for _ in range(2):
        parameter.grad = torch.randn(64, 128)
        optimizer.step()
    before = {key: read_state(optimizer.state[parameter], key) for key in ("state1", "state2")}
    G = torch.randn(32, 64, dtype=torch.float64)
    change = LayerChange((ParameterChange(("w",), (torch.zeros(32, 128),), 0, G, G.square()),), {})
    store = prepare_carry(optimizer, {"w": parameter}, change, "transform")
    parameter.data = torch.zeros(32, 128)
    store()
    state = optimizer.state[parameter]
    for key, wanted in (("state1", G @ before["state1"]), ("state2", G.square() @ before["state2"])):
        assert state[key].dtype == torch.uint8 or state[key].numel() < 4096
        blocks = wanted.flatten().view(-1, 256).abs().amax(1, keepdim=True)
        error = (read_state(state, key) - wanted).flatten().view(-1, 256).abs() / blocks
        assert float(error.max()) < 0.04
    parameter.grad = torch.randn(32, 128)
    optimizer.step()
    assert parameter.isfinite().all()


def test_copies_share_no_memory() -> None:
    parameter = nn.Parameter(torch.ones(2))
    tensors = [parameter, torch.zeros(3)]
    value: dict[str, Any] = {"a": tensors, "b": (tensors[1], {"c": tensors[1]}), "d": None, "e": {1, 2}, "f": tensors}
    new = copied_state(value)
    assert new.keys() == value.keys()
    assert isinstance(new["a"][0], nn.Parameter)
    assert new["b"][0] is new["b"][1]["c"] is new["a"][1]  # what was one object is one object
    assert new["f"] is new["a"]
    for one in new["a"]:
        one.data.fill_(7.0)
    assert torch.equal(parameter, torch.ones(2))
    assert torch.equal(tensors[1], torch.zeros(3))
    assert torch.equal(copied_state(value, {id(tensors[1]): parameter})["b"][0], parameter)


def test_the_system_of_a_layer_is_the_same_beside_float32_rates() -> None:
    model = halved(SequenceClassifier(2, 3, d_model=8, d_state=16, dropout=0.0, norm="layer", layer="lru"))
    ((layer, adapter),) = find_layers(model).values()
    assert adapter.system(layer).lam.dtype == torch.complex128  # type: ignore[union-attr]
    before = {key: value.dtype for key, value in layer_values(layer).items()}
    compressm.compress(model, states=6)
    assert {key: value.dtype for key, value in layer_values(layer).items()} == before
