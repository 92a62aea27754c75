"""What a cut makes of the optimizer's state, held against optimizers that train the new coordinates.

By definition the carried state is the one that the optimizer would have, had it seen the gradients ``G g`` of the new
coordinates at every step. For a matrix ``G`` with one entry in each row and column this is exact for all kinds, with
the approximation that an optimizer itself makes. For kinds that are linear in the gradient it is exact for every ``G``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import compressm
from compressm.adapters.changes import LayerChange, ParameterChange, layer_values
from compressm.cutting.carry import carry_state, prepare_carry
from compressm.errors import UnsupportedOptimizerError
from compressm.layers import Mamba2
from compressm.theory.recurrence import first_states
from optimizer_zoo import ALL, OTHERS, TORCH, Make, tensors_of

ROWS, COLUMNS, STEPS = 6, 4, 5


def gradients(rows: Tensor, columns: Tensor) -> list[Tensor]:
    """Gradients whose squares are of rank one, which is what factored second moments assume."""
    generator = torch.Generator().manual_seed(0)
    sizes = 0.5 + torch.rand(STEPS, generator=generator)
    signs = torch.randint(0, 2, (STEPS, len(rows), len(columns)), generator=generator) * 2.0 - 1
    return [size * sign * rows[:, None] * columns for size, sign in zip(sizes, signs, strict=True)]


def trained(make: Make, start: Tensor, history: list[Tensor]) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for gradient in history:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer


def carried(optimizer: Optimizer, parameter: nn.Parameter, G: Tensor, new: Tensor) -> None:
    matrix = G.double()
    change = LayerChange((ParameterChange(("weight",), (new.detach(),), 0, matrix, matrix.square()),), {})
    store = prepare_carry(optimizer, {"weight": parameter}, change, "transform")
    parameter.data = new.detach().clone()
    store()


@pytest.mark.parametrize("name", ALL)
def test_the_state_is_that_of_an_optimizer_that_trained_the_new_coordinates(name: str) -> None:
    one = name in ("Prodigy", "Adam-mini", "transformers Adafactor with momentum")  # their sizes depend on all entries
    scales = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0] if one else [2.0, -0.5, 1.5, -3.0, 1.0, 0.25])
    G = torch.diag(scales)[torch.tensor([3, 0, 5, 2, 1, 4])]
    sizes = torch.ones(ROWS), torch.ones(COLUMNS)
    if name != "Adam-mini":  # a block has one second moment
        sizes = torch.tensor([1.0, 2.0, 0.5, 1.5, 0.7, 1.2]), torch.tensor([0.8, 1.0, 2.0, 0.6])
    history, start = gradients(*sizes), torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS)
    parameter, optimizer = trained(ALL[name], start, history)
    wanted, other = trained(ALL[name], G.sign() @ start, [G @ gradient for gradient in history])
    carried(optimizer, parameter, G, wanted)
    assert tensors_of(optimizer, parameter).keys() == tensors_of(other, wanted).keys()
    for key, value in tensors_of(other, wanted).items():
        torch.testing.assert_close(tensors_of(optimizer, parameter)[key], value, rtol=2e-4, atol=1e-6, msg=key)
    numbers = {key: value for key, value in other.state[wanted].items() if key not in tensors_of(other, wanted)}
    for key in numbers.keys() - {"RMS"}:
        assert float(optimizer.state[parameter][key]) == pytest.approx(float(numbers[key])), key


@pytest.mark.parametrize("name", ["SGD", "ASGD", "Muon", "schedule-free SGD"])
def test_a_rotation_in_mid_training_changes_nothing_for_optimizers_without_preferred_axes(name: str) -> None:
    # The steps of these do not depend on the basis, so that training may be rotated at any time.
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(ROWS, ROWS)).Q
    history, start = [torch.randn(ROWS, COLUMNS) for _ in range(STEPS)], torch.randn(ROWS, COLUMNS)
    unbroken, _ = trained(ALL[name], start, [*history, *history])
    parameter, optimizer = trained(ALL[name], start, history)
    carried(optimizer, parameter, Q, Q @ parameter)
    for gradient in history:
        parameter.grad = Q @ gradient
        optimizer.step()
    # Ten steps of 0.01. Muon computes their directions in bfloat16.
    torch.testing.assert_close(parameter, Q @ unbroken, rtol=1e-4, atol=2e-3 if name == "Muon" else 1e-5)


def test_every_kind_by_its_formula() -> None:
    class Keeper(Optimizer):
        """Keeps one entry of every kind."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            del closure

    kinds = {
        "m": "linear", "v": "quadratic about m", "u": "magnitude", "s": "step", "d": "direction", "z": "value",
        "w": "quadratic", "r": "rows", "c": "columns",
    }  # fmt: skip
    compressm.register_optimizer_state(Keeper, kinds)
    torch.manual_seed(0)
    G, old, new = torch.randn(3, ROWS).double(), torch.randn(ROWS, COLUMNS).double(), torch.randn(3, COLUMNS).double()
    parameter = nn.Parameter(old.clone())
    optimizer = Keeper([parameter])
    m, d, z = (torch.randn(ROWS, COLUMNS).double() for _ in range(3))
    u, s, w = (torch.rand(ROWS, COLUMNS).double() for _ in range(3))
    v, r = m.square() + torch.rand(ROWS, COLUMNS), torch.rand(ROWS).double()
    c = torch.rand(COLUMNS).double()
    c *= r.mean() / c.mean()
    optimizer.state[parameter] = {"step": 7, "m": m, "v": v, "u": u, "s": s, "d": d, "z": z, "w": w, "r": r, "c": c}
    carried(optimizer, parameter, G, new)
    after = optimizer.state[parameter]
    G2 = G.square()
    wanted = {
        "m": G @ m,
        "v": G2 @ (v - m.square()) + (G @ m).square(),
        "u": (G2 @ u.square()).sqrt(),
        "s": (G2 @ (s * v)) / (G2 @ v),
        "d": (G @ (d * v.sqrt())) / (G2 @ v).sqrt(),
        "z": new + (G @ ((z - old) * v.sqrt())) / (G2 @ v).sqrt(),
        "w": G2 @ w,
        "r": (G2 @ torch.outer(r, c) / r.mean()).mean(1),
        "c": (G2 @ torch.outer(r, c) / r.mean()).mean(0),
    }
    assert after["step"] == 7
    for key, value in wanted.items():
        torch.testing.assert_close(after[key], value, msg=key)
    assert (after["v"] >= after["m"].square()).all()  # otherwise a centered RMSprop takes roots of negative numbers


# Cuts of Mamba-2 only select states.


def selected(layer: Mamba2) -> tuple[LayerChange, dict[str, tuple[int, Tensor]]]:
    """A cut to the states 1, 4 and 6, and the entries of every parameter that it keeps."""
    from compressm.adapters import find_layers

    kept = torch.tensor([[1, 4, 6]])
    reduction = first_states(layer.d_state, 3, 1)
    reduction = type(reduction)(**{**vars(reduction), "kept": kept, "into": torch.eye(8, dtype=torch.float64)[kept]})
    change = find_layers(layer)[""][1].plan(layer_values(layer), reduction)  # type: ignore[attr-defined, union-attr]
    inner, states = layer.d_inner, layer.d_state
    channels = torch.cat([torch.arange(inner), inner + kept[0], inner + states + kept[0]])
    rest = torch.arange(2 * inner + 2 * states, layer.in_proj.weight.shape[0])
    rows = torch.cat([torch.arange(inner), inner + channels, rest])
    return change, {"in_proj.weight": (0, rows), "conv1d.weight": (0, channels), "conv1d.bias": (0, channels)}


def run(layer: Mamba2, optimizer: Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(3, 7, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def chosen(value: Tensor, shape: torch.Size, axis: int, kept: Tensor) -> Tensor | None:
    """The entries that stay, of a tensor of the parameter's shape, flat or not, or of a factor with that axis."""
    if value.shape == shape:
        return value.index_select(axis, kept)
    if value.numel() == shape.numel() and value.ndim == 1:
        return value.view(shape).index_select(axis, kept).flatten()
    return value.index_select(axis, kept) if value.ndim > axis and value.shape[axis] == shape[axis] else None


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("Muon", "Adam-mini")])
def test_a_cut_that_selects_selects_the_state_bit_by_bit_and_goes_on_as_in_the_small_layer(name: str) -> None:
    torch.manual_seed(0)
    layer = Mamba2(4, 8, head_dim=4)
    optimizer = ALL[name](layer.parameters())
    run(layer, optimizer, 4, 0)
    before = copy.deepcopy(optimizer.state_dict())
    change, kept = selected(layer)
    names = [key for key, _ in layer.named_parameters()]
    expected: dict[int, dict[str, Any]] = {}
    for i, key in enumerate(names):
        parameter, old = layer.get_parameter(key), before["state"].get(i, {})
        expected[i] = dict(old)
        for entry, value in old.items():
            if key in kept and isinstance(value, Tensor) and value.ndim:
                expected[i][entry] = chosen(value, parameter.shape, *kept[key])
    carry_state(optimizer, layer, change, "transform")
    for i, key in enumerate(names):
        for entry, value in expected[i].items():
            now = optimizer.state[layer.get_parameter(key)][entry]
            if value is None:  # a factor over the other axes, of the rows that stay
                expected[i][entry] = now.clone()
            elif isinstance(value, Tensor):
                assert torch.equal(now, value), f"{entry} of {key}"
    small = Mamba2(4, 3, head_dim=4)
    small.load_state_dict(layer.state_dict())
    other = ALL[name](small.parameters())
    other.load_state_dict({**before, "state": {i: one for i, one in expected.items() if one}})
    run(layer, optimizer, 3, 1)
    run(small, other, 3, 1)
    for (key, mine), theirs in zip(layer.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(mine, theirs), key
        assert mine.isfinite().all()


@pytest.mark.parametrize("name", ["Adafactor", "transformers Adafactor"])
def test_a_factor_over_the_cut_axis_follows_the_rows_that_stay(name: str) -> None:
    history = gradients(torch.tensor([1.0, 2.0, 0.5, 1.5, 0.7, 1.2]), torch.tensor([0.8, 1.0, 2.0, 0.6]))
    kept = torch.tensor([4, 1, 2])
    parameter, optimizer = trained(ALL[name], torch.ones(ROWS, COLUMNS), history)
    wanted, other = trained(ALL[name], torch.ones(3, COLUMNS), [gradient[kept] for gradient in history])
    carried(optimizer, parameter, torch.eye(ROWS)[kept], wanted)
    for key, value in tensors_of(other, wanted).items():
        torch.testing.assert_close(tensors_of(optimizer, parameter)[key], value, rtol=1e-5, atol=0, msg=key)


@pytest.mark.parametrize("name", [*TORCH, *OTHERS])
def test_the_paper_s_slices_are_first_entries_of_every_kind(name: str) -> None:
    history = gradients(torch.ones(ROWS), torch.ones(COLUMNS))
    parameter, optimizer = trained(ALL[name], torch.ones(ROWS, COLUMNS), history)
    before = {key: value.clone() for key, value in tensors_of(optimizer, parameter).items()}
    old, matrix = parameter.detach().clone(), torch.randn(3, ROWS, dtype=torch.float64)
    change = LayerChange((ParameterChange(("weight",), (old[:3],), 0, matrix, matrix.square()),), {})
    store = prepare_carry(optimizer, {"weight": parameter}, change, "slice")
    parameter.data = old[:3].clone()
    store()
    for key, value in tensors_of(optimizer, parameter).items():
        wanted = chosen(before[key], old.shape, 0, torch.arange(3))
        if wanted is not None:
            assert torch.equal(value, wanted), key
    parameter.grad = history[0][:3].clone()
    optimizer.step()
    assert parameter.isfinite().all()


def test_real_and_imaginary_parts_share_a_change_of_basis_and_one_of_them_may_be_frozen() -> None:
    re, im = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 2))
    optimizer = torch.optim.Adafactor([re, im])
    torch.manual_seed(0)
    a, b = torch.rand(4, 1), torch.rand(1, 2)
    re.grad = a * b
    optimizer.step()  # im has no gradient, and no state
    G = torch.randn(6, 8, dtype=torch.float64)
    news = torch.zeros(3, 2), torch.zeros(3, 2)
    change = LayerChange((ParameterChange(("re", "im"), news, 0, G, G.square()),), {})
    moments = optimizer.state[re]["row_var"] @ optimizer.state[re]["col_var"] / optimizer.state[re]["row_var"].mean()
    prepare_carry(optimizer, {"re": re, "im": im}, change, "transform")()
    wanted = G[:3, :4].square() @ moments.double()
    torch.testing.assert_close(optimizer.state[re]["row_var"].double(), wanted.mean(1, keepdim=True), rtol=1e-5, atol=0)
    torch.testing.assert_close(optimizer.state[re]["col_var"].double(), wanted.mean(0, keepdim=True), rtol=1e-5, atol=0)
    assert im not in optimizer.state


def test_an_average_of_one_part_alone_is_carried_as_if_the_other_s_were_its_value() -> None:
    torch.manual_seed(0)
    re, im = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 2))
    optimizer = torch.optim.ASGD([re, im], t0=0)
    for _ in range(4):
        re.grad = torch.randn(4, 2)
        optimizer.step()
    G, news = torch.randn(6, 8, dtype=torch.float64), (torch.randn(3, 2), torch.randn(3, 2))
    away = (optimizer.state[re]["ax"] - re.detach()).double()
    assert away.norm() > 0
    change = LayerChange((ParameterChange(("re", "im"), news, 0, G, G.square()),), {})
    prepare_carry(optimizer, {"re": re, "im": im}, change, "transform")()
    wanted = news[0] + G[:3, :4] @ away
    torch.testing.assert_close(optimizer.state[re]["ax"].double(), wanted, rtol=1e-5, atol=1e-6)
    assert im not in optimizer.state


def test_prodigy_s_start_at_zero_which_it_stores_as_one_number() -> None:
    history = gradients(torch.ones(ROWS), torch.ones(COLUMNS))
    swap = torch.eye(ROWS)[torch.tensor([3, 0, 5, 2, 1, 4])]
    parameter, optimizer = trained(ALL["Prodigy"], torch.zeros(ROWS, COLUMNS), history)
    wanted, other = trained(ALL["Prodigy"], torch.zeros(ROWS, COLUMNS), [swap @ gradient for gradient in history])
    assert optimizer.state[parameter]["p0"].ndim == 0
    carried(optimizer, parameter, swap, wanted)
    assert optimizer.state[parameter]["p0"].abs().max() < 1e-9
    for by, p in ((optimizer, parameter), (other, wanted)):
        p.grad = swap @ history[0]
        by.step()
    torch.testing.assert_close(parameter, wanted)


def test_an_entry_of_another_shape_than_its_kind_s_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.Adam([parameter])
    optimizer.state[parameter] = {"exp_avg": torch.zeros(2, 2)}  # as GaLore's, of a projected gradient
    change = LayerChange((ParameterChange(("w",), (torch.zeros(3, 2),), 0, *(2 * [torch.eye(3, 4).double()])),), {})
    with pytest.raises(UnsupportedOptimizerError, match=r"^Adam keeps 'exp_avg' for here\.w, and how that changes"):
        prepare_carry(optimizer, {"w": parameter}, change, "transform", "here")


@pytest.mark.parametrize("value", [0.5, [torch.zeros(4, 2)], torch.zeros(())])
def test_an_entry_that_is_no_tensor_of_its_kind_is_refused(value: Any) -> None:
    parameter = nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.Adam([parameter])
    eye = torch.eye(3, 4).double()
    change = LayerChange((ParameterChange(("w",), (torch.zeros(3, 2),), 0, eye, eye),), {})
    optimizer.state[parameter] = {"step": 3, "exp_avg": value}
    with pytest.raises(UnsupportedOptimizerError, match=r"^Adam keeps 'exp_avg' for w"):
        prepare_carry(optimizer, {"w": parameter}, change, "transform")
    optimizer.state[parameter] = {"step": 3, "exp_avg": torch.arange(8.0).view(4, 2), "exp_avg_sq": None}
    prepare_carry(optimizer, {"w": parameter}, change, "transform")()
    after = optimizer.state[parameter]
    assert after["exp_avg_sq"] is None
    assert torch.equal(after["exp_avg"], torch.arange(6.0).view(3, 2))


def test_kinds_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnsupportedOptimizerError, match=r"^kinds: 'm' is of kind 'cubic', which does not exist"):
        compressm.register_optimizer_state("Mine", {"m": "cubic"})
