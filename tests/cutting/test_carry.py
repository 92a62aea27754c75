from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.optim import Optimizer

from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values
from compressm.cutting import compress
from compressm.cutting.carry import carry_state, check_optimizer, unwrap_optimizer
from compressm.cutting.spectrum import analyze
from compressm.errors import UnsupportedModelError, UnsupportedOptimizerError
from compressm.layers import LRU, LinearAttention, Mamba, Mamba2, SequenceClassifier, parameter_groups
from compressm.theory.balancing import balance, truncate
from compressm.training.compressor import Compressor

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
}


def trained(make: Callable[[Any], Optimizer], steps: int = 3) -> tuple[SequenceClassifier, Optimizer]:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 3, d_model=6, d_state=20, n_layers=2, dropout=0.0, norm="layer", r_min=0.9)
    optimizer = make(parameter_groups(model, 1e-3))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: SequenceClassifier, optimizer: Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(torch.randn(8, 30, 2)), torch.randint(0, 3, (8,)))
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("mode", ["transform", "slice", "reset"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_cut_the_next_step_moves_every_tensor(name: str, mode: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    last = step(model, optimizer)  # held, with its graph, as most training loops do
    report = compress(model, states=9, optimizer=optimizer, carry=mode)  # type: ignore[arg-type]
    assert report.cut
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer)
    for key, parameter in model.named_parameters():
        assert (parameter != before[key]).any(), key
        assert torch.isfinite(parameter).all()
        for value in optimizer.state[parameter].values():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == parameter.shape
    assert torch.isfinite(last)


@pytest.mark.parametrize("layer", ["lru", "s5", "s4d"])
def test_momentum_of_one_gradient_is_pulled_back_like_the_gradient(layer: str) -> None:
    # After one step of plain momentum the buffer is the gradient. A cut at full order is a pure change of basis, so the
    # carried buffer must be the gradient of the new parameters at the point where the old gradient was taken: also that
    # of the phases, half of which change their sign, since of every conjugate pair the new state is the upper one.
    torch.manual_seed(1)
    options = {} if layer == "lru" else {"dt_max": 0.02}  # slow enough that no frequency is another one's alias
    model = SequenceClassifier(2, 3, d_model=6, d_state=12, dropout=0.0, norm="layer", layer=layer, **options).double()
    if layer != "lru":
        model.get_parameter("blocks.0.ssm.frequency").data[..., ::2] *= -1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # rate zero: the point stays where it is
    u, target = torch.randn(4, 25, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(model(u), target).backward()
    optimizer.step()
    ssm = model.get_submodule("blocks.0.ssm")
    adapter = find_layers(model)["blocks.0.ssm"][1]
    reduction = truncate(balance(adapter.read(layer_values(ssm))), 12, exceed=True)
    change = adapter.plan(layer_values(ssm), reduction)
    carry_state(optimizer, ssm, change, "transform")
    carried = {name: optimizer.state[ssm.get_parameter(name)]["momentum_buffer"] for name in change.values()}
    model.zero_grad()
    F.cross_entropy(model(u), target).backward()
    for name, buffer in carried.items():
        gradient = ssm.get_parameter(name).grad
        torch.testing.assert_close(buffer, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("layer", ["lru", "s5", "s4d"])
def test_second_moments_have_the_size_of_the_gradients_after_the_cut(layer: str) -> None:
    # Adam divides by their roots: one that is five times too small makes steps that are five times too long.
    torch.manual_seed(0)
    options = {"r_min": 0.9, "max_phase": 0.6} if layer == "lru" else {}
    model = SequenceClassifier(1, 4, d_model=6, d_state=64, dropout=0.0, norm="layer", layer=layer, **options).double()
    data = [(torch.randn(8, 60, 1, dtype=torch.float64).cumsum(1) / 4, torch.randint(0, 4, (8,))) for _ in range(30)]
    ssm = model.get_submodule("blocks.0.ssm")

    def squares() -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for u, y in data:
            model.zero_grad()
            F.cross_entropy(model(u), y).backward()
            for name, parameter in ssm.named_parameters():
                sums[name] = sums.get(name, 0) + parameter.grad.square() / len(data)
        return sums

    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for name, value in squares().items():
        zero = torch.zeros_like(value)
        optimizer.state[ssm.get_parameter(name)] = {"step": torch.tensor(9.0), "exp_avg": zero, "exp_avg_sq": value}
    assert compress(model, states=24, optimizer=optimizer).cut
    actual = squares()
    for name in ("log_decay", "nu_log", "frequency", "theta_log", "gamma_log"):
        if name in actual:
            true, carried = actual[name], optimizer.state[ssm.get_parameter(name)]["exp_avg_sq"]
            seen = true > 1e-12 * true.max()
            ratio = (carried[seen] / true[seen]).sqrt()
            assert 0.5 < float(ratio.median()) < 2, name
            assert float(((ratio > 0.2) & (ratio < 5)).double().mean()) > 0.75, name


def test_second_moments_stay_non_negative_and_slices_are_slices() -> None:
    model, optimizer = trained(OPTIMIZERS["adam-amsgrad"])
    layer = model.get_submodule("blocks.0.ssm")
    old = copy.deepcopy(optimizer.state[layer.get_parameter("B_re")])
    sliced, sliced_optimizer = copy.deepcopy((model, optimizer))
    compress(model, states=9, optimizer=optimizer)
    for parameter in layer.parameters():
        assert (optimizer.state[parameter]["exp_avg_sq"] >= 0).all()
        assert (optimizer.state[parameter]["max_exp_avg_sq"] >= 0).all()
    compress(sliced, states=9, optimizer=sliced_optimizer, carry="slice")
    new = sliced_optimizer.state[sliced.get_submodule("blocks.0.ssm").get_parameter("B_re")]
    assert torch.equal(new["exp_avg"], old["exp_avg"][: new["exp_avg"].shape[0]])
    assert new["step"] == old["step"]


SETTINGS: dict[str, dict[str, Any]] = {
    "Adagrad": {"initial_accumulator_value": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "LBFGS": {"max_iter": 3},
    "Rprop": {"lr": 1e-3},
    "ASGD": {"t0": 1.0},
}
OF_TORCH = sorted(
    name for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
)  # fmt: skip


def small(name: str) -> tuple[Mamba, Optimizer, Callable[[], float]]:
    """A layer, its optimizer, and a closure that computes gradients on always the same data."""
    torch.manual_seed(0)
    layer, u = Mamba(4, 8), 3 * torch.randn(3, 10, 4)
    with torch.no_grad():
        layer.dt_proj.bias.fill_(0.0)  # steps of ordinary size, so that no gradient is lost in the parameter's rounding
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.ndim == 2)  # Muon takes no others, and a cut changes two of these
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    kind: Any = getattr(torch.optim, name)
    optimizer = kind(trainable, **{"lr": 1e-2, **SETTINGS.get(name, {})})

    def closure() -> float:
        optimizer.zero_grad()
        loss = layer(u).square().mean()
        loss.backward()
        return float(loss.detach())

    return layer, optimizer, closure


@pytest.mark.parametrize("name", [name for name in OF_TORCH if name != "SparseAdam"])
def test_after_a_reset_every_optimizer_of_torch_steps_as_if_it_were_new(name: str) -> None:
    layer, optimizer, closure = small(name)
    for _ in range(4):
        closure()
        optimizer.step(closure)
    data = [torch.randn(3, 10, 4)]
    assert compress(layer, states=5, data=data, optimizer=optimizer, carry="reset").cut
    cut = [layer.A_log, layer.x_proj.weight]
    fresh_layer, settings = copy.deepcopy(layer), {"lr": 1e-2, **SETTINGS.get(name, {})}
    whole = name == "LBFGS"  # it has one history of all parameters
    kept = [p for p in fresh_layer.parameters() if p.requires_grad]
    fresh: Optimizer = getattr(torch.optim, name)(kept, **settings)
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    closure()
    for mine, other in zip(layer.parameters(), fresh_layer.parameters(), strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()
    if whole:
        u = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(1))
        for one, by in ((layer, optimizer), (fresh_layer, fresh)):
            by.step(lambda one=one, by=by: again(one, by, u))  # type: ignore[misc]
    else:
        optimizer.step()
        fresh.step()
    for (key, mine), other in zip(layer.named_parameters(), fresh_layer.parameters(), strict=True):
        if not mine.requires_grad:
            continue
        assert (mine != before[key]).any(), key
        if whole or any(mine is one for one in cut):
            assert torch.equal(mine, other), key


def again(layer: Mamba, optimizer: Optimizer, u: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = layer(u).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("carry", ["transform", "slice", "reset"])
def test_every_optimizer_of_torch_goes_on_or_is_refused_at_once(name: str, carry: Any) -> None:
    layer, optimizer, closure = small(name)
    arguments: dict[str, Any] = {"states": 4, "cuts": 1, "carry": carry}
    if name == "SparseAdam" or (name == "LBFGS" and carry != "reset"):
        reason = "keeps what cannot follow a cut" if name == "LBFGS" else "makes no step with the dense gradients"
        with pytest.raises(UnsupportedOptimizerError, match=f"{name} {reason}"):
            Compressor(layer, optimizer, 20, **arguments)
        with pytest.raises(UnsupportedOptimizerError, match=name):
            compress(layer, states=4, data=[torch.randn(3, 10, 4)], optimizer=optimizer, carry=carry)
        return
    compressor, events = Compressor(layer, optimizer, 20, **arguments), []
    for _ in range(6):
        before = {key: p.detach().clone() for key, p in layer.named_parameters()}
        optimizer.step(closure)
        for key, parameter in layer.named_parameters():
            if parameter.requires_grad:
                assert (parameter != before[key]).any(), key
                assert parameter.isfinite().all(), key
        events.append(compressor.step())
    assert [event.kind for event in events if event] == ["cut"]


@pytest.mark.parametrize("name", ["LBFGS", "Adagrad", "Rprop"])
@pytest.mark.filterwarnings("ignore:.*no more cuts will be tried")
def test_a_roll_back_after_a_reset_goes_on_too(name: str) -> None:
    layer, optimizer, closure = small(name)
    compressor = Compressor(
        layer, optimizer, 20, states=4, cuts=1, carry="reset", max_drop=0.1,
        evaluate=lambda one: float(one.d_state == 8),
        on_setback="stop", check_after=2,
    )  # fmt: skip
    kinds = []
    for _ in range(7):
        optimizer.step(closure)
        event = compressor.step()
        kinds += [event.kind] if event else []
    assert kinds == ["cut", "rolled_back"]
    assert layer.d_state == 8


PARAMETRIZED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight_norm": (torch.nn.utils.parametrizations.weight_norm, r"remove_parametrizations\(module, 'weight'\)"),
    "spectral_norm": (torch.nn.utils.parametrizations.spectral_norm, r"remove_parametrizations\(module, 'weight'\)"),
    "old weight_norm": (torch.nn.utils.weight_norm, r"remove_weight_norm\(module, 'weight'\)"),
    "old spectral_norm": (torch.nn.utils.spectral_norm, r"remove_spectral_norm\(module, 'weight'\)"),
    "pruning": (lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.3), r"prune.remove\(module, 'weight'\)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", PARAMETRIZED)
@pytest.mark.parametrize("part", ["x_proj", "conv1d", "k_proj", "out_proj"])
def test_weights_that_are_computed_from_others_are_refused_with_the_remedy(how: str, part: str) -> None:
    layers = {"conv1d": lambda: Mamba2(4, 8, head_dim=4), "k_proj": lambda: LinearAttention(4, 8, 2)}
    model = torch.nn.Sequential(layers.get(part, lambda: Mamba(4, 8))())
    apply, remedy = PARAMETRIZED[how]
    apply(model.get_submodule(f"0.{part}"))
    data = [torch.randn(2, 6, 4)]
    calls: list[Callable[[], Any]] = [
        lambda: Compressor(model, torch.optim.Adam(model.parameters()), 40, states=3),
        lambda: compress(model, states=3, data=data),
    ]
    for call in calls:
        if part == "out_proj" or (part, how) == ("conv1d", "weight_norm"):  # not written; channels are selected
            call()
            continue
        with pytest.raises(
            UnsupportedModelError, match=rf"^0\.{part}\.weight is computed from other .*: call .*{remedy}"
        ):
            call()


@pytest.mark.parametrize("analyse", [lambda m: analyze(m), lambda m: compress(m, states=4)])
def test_computed_parameters_of_time_invariant_layers_are_refused_too(analyse: Callable[[Any], Any]) -> None:
    model = torch.nn.Sequential(LRU(4, 8))
    torch.nn.utils.parametrizations.weight_norm(model[0], "B_re")
    with pytest.raises(UnsupportedModelError, match=r"^0\.B_re is computed from other parameters"):
        analyse(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "B_re")
    analyse(model)


def test_a_wrapped_projection_is_refused_by_name() -> None:
    class Adapted(torch.nn.Module):
        """As LoRA wraps a layer."""

        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return self.base_layer(u)

    model = torch.nn.Sequential(Mamba(4, 8))
    model[0].x_proj = Adapted(model[0].x_proj)  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"^0\.x_proj\.weight is not a parameter of Mamba any more"):
        compress(model, states=3, data=[torch.randn(2, 6, 4)])


def test_optimizer_with_unknown_state_is_refused_before_anything_is_written() -> None:
    model, optimizer = trained(lambda p: torch.optim.Adagrad(p, lr=1e-2))
    for state in optimizer.state.values():
        state["basis"] = torch.eye(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnsupportedOptimizerError, match=r"Adagrad keeps 'basis' for blocks\.0\.ssm\.nu_log.*carry='reset'"
    ):
        compress(model, states=9, optimizer=optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert compress(model, states=9, optimizer=optimizer, carry="reset").cut
    step(model, optimizer)


def test_wrappers_are_unwrapped_and_others_refused() -> None:
    model, optimizer = trained(OPTIMIZERS["sgd"])
    from accelerate import Accelerator

    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert unwrap_optimizer(wrapped) is optimizer
    with pytest.raises(UnsupportedOptimizerError, match="got SequenceClassifier"):
        unwrap_optimizer(model)


@pytest.mark.parametrize("mode", ["transform", "slice", "reset"])
def test_half_of_a_pair_may_have_no_state(mode: str) -> None:
    torch.manual_seed(0)
    layer = LRU(4, 16)
    layer.B_im.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3)

    def train() -> None:
        optimizer.zero_grad()
        layer(torch.randn(2, 9, 4)).square().mean().backward()
        optimizer.step()

    train()
    old, first = layer.B_re.detach().clone(), optimizer.state[layer.B_re]["exp_avg"].clone()
    compress(layer, states=8, optimizer=optimizer, carry=mode)  # type: ignore[arg-type]
    assert layer.B_im not in optimizer.state
    if mode == "reset":
        assert layer.B_re not in optimizer.state  # as before the first step
    else:
        assert optimizer.state[layer.B_re]["exp_avg"].shape == (8, 4)
    assert old.shape == first.shape == (16, 4)
    if mode == "transform":  # as if the other half's average were zero
        assert optimizer.state[layer.B_re]["exp_avg"].abs().max() > 0
    train()
    assert layer.B_re.isfinite().all()


def test_an_optimizer_is_asked_before_its_first_step() -> None:
    layer = LRU(4, 16)

    class Unknown(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            done = super().step(closure)
            for state in self.state.values():
                state["basis"] = torch.eye(2)
            return done

    with pytest.raises(UnsupportedOptimizerError, match=r"Unknown keeps 'basis' for the_layer\.nu_log"):
        check_optimizer(Unknown(layer.parameters()), {"the_layer": layer})
    for make in OPTIMIZERS.values():
        check_optimizer(optimizer := make(layer.parameters()), {"the_layer": layer})
        assert not optimizer.state


def test_factored_moments_begin_anew() -> None:
    layer = LRU(4, 16)
    optimizer = torch.optim.Adafactor(layer.parameters(), lr=1e-3)
    for states in (16, 8):
        compress(layer, states=states, optimizer=optimizer, carry="reset")
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(2, 9, 4)).square().mean().backward()
            optimizer.step()
    assert optimizer.state[layer.B_re]["row_var"].shape == (8, 1)


def test_all_that_a_cut_changes_must_be_in_the_optimizer() -> None:
    layer = LRU(4, 16)
    rest = [p for name, p in layer.named_parameters() if name != "C_im"]
    optimizer = torch.optim.AdamW(rest)
    with pytest.raises(UnsupportedOptimizerError, match=r"^C_im is a parameter that a cut changes"):
        Compressor(layer, optimizer, 100, states=4)
    layer.C_im.requires_grad_(False)
    Compressor(layer, optimizer, 100, states=4)
