"""States and adjoints against loops of time in float64, with the adjoints that autograd finds at explicit states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import Adapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.errors import ConfigError, UnsupportedModelError
from compressm.layers import LRU, S4D, S5, LanguageModel, SequenceClassifier
from compressm.layers.bidirectional import Bidirectional
from compressm.observing.adjoints import Reading, covariances, readings
from compressm.observing.damage import linear_changes
from compressm.observing.labels import fisher_probes
from compressm.observing.loss_evidence import gather_evidence
from compressm.observing.observer import Observer
from compressm.theory.balancing import balance, truncate
from compressm.theory.covariance import balance_covariances, truncate_covariances
from compressm.theory.evidence import Covariances, white_scales
from compressm.theory.fisher import MaskFisher
from compressm.theory.gramians import real_gramians
from compressm.theory.systems import DiagonalSystem
from helpers import spawned

FAMILIES = ("lru", "s5", "s5_both", "s4d")


def layer(family: str, width: int = 3, n: int = 5) -> nn.Module:
    torch.manual_seed(1)
    if family == "lru":
        return LRU(width, n, r_max=0.95)
    if family == "s4d":
        return S4D(width, n)
    return S5(width, n, bidirectional=family == "s5_both")


def model(family: str, layers: int = 2, vocabulary: int | None = None, **options: Any) -> SequenceClassifier:
    kind = family.partition("_")[0]
    options |= {"bidirectional": True} if family == "s5_both" else {}
    torch.manual_seed(0)
    return SequenceClassifier(
        2, 4, 3, 5, layers, dropout=0.0, norm="layer", layer=kind, vocabulary=vocabulary, **options
    ).double()


def read(module: nn.Module) -> DiagonalSystem:
    return next(iter(find_layers(module).values()))[1].read(layer_values(module))  # type: ignore[union-attr]


class Explicit(nn.Module):
    """A linear layer as a loop in stacked real coordinates, that remembers its states with their gradients."""

    def __init__(self, original: nn.Module) -> None:
        nn.Module.__init__(self)
        self.D, self.width = original.D, original.d_model
        system = read(original)
        both = isinstance(original, S5) and original.bidirectional
        outputs = (system.C[: self.width] / 2**0.5, system.C[self.width :] / 2**0.5) if both else (system.C,)
        self.runs = [(system.lam, system.B, C) for C in outputs]
        self.states: list[list[Tensor]] = []

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        out = self.D * u
        for index, (lam, B, C) in enumerate(self.runs):
            v = backwards(u, lengths) if index else u
            y = self._run(lam, B, C, v)
            out = out + (backwards(y, lengths) if index else y)
        return out

    def _run(self, lam: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        n, single = lam.shape[-1], lam.ndim == 1
        x = torch.zeros(u.shape[0], *lam.shape[:-1], 2 * n, dtype=torch.float64)
        states, outputs = [], []
        for now in u.unbind(1):
            re, im = x[..., :n], x[..., n:]
            drive = now @ B.mT.to(torch.complex128).real if single else now[..., None] * B[..., 0].real
            drive_im = now @ B.mT.imag if single else now[..., None] * B[..., 0].imag
            x = torch.cat([lam.real * re - lam.imag * im + drive, lam.imag * re + lam.real * im + drive_im], -1)
            x.retain_grad() if x.requires_grad else x.requires_grad_()
            states.append(x)
            re, im = x[..., :n], x[..., n:]
            if single:
                outputs.append(re @ C.real.mT - im @ C.imag.mT)
            else:
                outputs.append((re * C[:, 0].real - im * C[:, 0].imag).sum(-1))
        self.states.append(states)
        return torch.stack(outputs, 1)


class ExplicitBoth(Explicit, S5):
    """The same with two directions; blocks tell an `S5` like that the lengths."""

    bidirectional = True


def backwards(u: Tensor, lengths: Tensor | None) -> Tensor:
    """Every row from its last input to its first, padding left where it is."""
    ends = [u.shape[1]] * u.shape[0] if lengths is None else lengths.tolist()
    return torch.stack([torch.cat([row[:end].flip(0), row[end:]]) for row, end in zip(u, ends, strict=True)])


def oracle(net: nn.Module, losses: Any, present: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Sums of outer products of states and of autograd's adjoints, and tokens, of the sum of all sequences' losses."""
    net = copy.deepcopy(net)
    explicit = {}
    for name, (original, _) in find_layers(net).items():
        parent, _, child = name.rpartition(".")
        explicit[name] = (ExplicitBoth if getattr(original, "bidirectional", False) else Explicit)(original)
        setattr(net.get_submodule(parent), child, explicit[name])
    losses(net).sum().backward()
    found = {}
    for name, one in explicit.items():
        P, Q, tokens = 0.0, 0.0, 0.0
        for states in one.states:
            for t, x in enumerate(states):
                # Read backwards each sequence is reversed within its own length, so that padding stays behind it.
                seen = torch.ones(x.shape[0]) if present is None else present[:, t]
                for k in range(x.shape[0]):
                    if seen[k] and x.grad is not None:
                        P = P + x[k, ..., :, None].detach() * x[k, ..., None, :].detach()
                        Q = Q + x.grad[k, ..., :, None] * x.grad[k, ..., None, :]
                        tokens += 1
        found[name] = (P, Q, tokens)
    return found


def check(found: dict[str, Covariances], expected: dict[str, tuple[Tensor, Tensor, float]], sequences: int) -> None:
    assert found.keys() == expected.keys()
    for name, (P, Q, tokens) in expected.items():
        assert float(found[name].tokens) == tokens
        assert float(found[name].sequences) == sequences
        assert float(Q.diagonal(dim1=-2, dim2=-1).max()) > 0
        torch.testing.assert_close(found[name].states, P, rtol=1e-6, atol=1e-9 * float(P.abs().max()))
        torch.testing.assert_close(found[name].adjoints, Q, rtol=1e-6, atol=1e-9 * float(Q.abs().max()))


def inputs(batch: int = 4, length: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 2, dtype=torch.float64, generator=generator).cumsum(1)
    return x, torch.randint(4, (batch,), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_is_the_layer(family: str) -> None:
    one = layer(family).double()
    u = torch.randn(2, 12, 3, dtype=torch.float64)
    torch.testing.assert_close(Explicit(one)(u), one(u))


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_loop_with_autograds_adjoints(family: str) -> None:
    net, (x, y) = model(family), inputs()
    expected = oracle(net, lambda m: F.cross_entropy(m(x), y, reduction="none"))
    observer = Observer(net)
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    check(observer.evidence(), expected, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_spread_is_the_sum_over_sequences(family: str) -> None:
    one, generator = layer(family).double(), torch.Generator().manual_seed(3)
    system = read(one)
    q = system.C.shape[-2] if system.lam.ndim == 1 else system.lam.shape[0]
    p = system.p if system.lam.ndim == 1 else system.lam.shape[0]
    u, g = (torch.randn(5, 7, width, dtype=torch.float64, generator=generator) for width in (p, q))
    whole = covariances(system, Reading(u, g, system.C, None))
    spread = 0.0
    for k in range(5):
        single = covariances(system, Reading(u[k : k + 1], g[k : k + 1], system.C, None))
        scale = white_scales(system)[0]
        spread = spread + (single.states / scale[..., :, None] / scale[..., None, :]).square().sum((-2, -1))
    torch.testing.assert_close(whole.spread_states, spread)


@pytest.mark.parametrize("family", FAMILIES)
def test_white_inputs_and_gradients_give_the_gramians(family: str) -> None:
    one = layer(family).double()
    with torch.no_grad():  # short memories, so that the start from nothing does not count
        for name in ("log_decay",):
            if hasattr(one, name):
                getattr(one, name).add_(2.0)
                one.log_step.fill_(-2.0)
    system = read(one)
    generator, total = torch.Generator().manual_seed(0), None
    for _ in range(4):
        u, g = (torch.randn(16, 2000, 3, dtype=torch.float64, generator=generator) for _ in range(2))
        for run in readings(one, system, u, g, None):
            new = covariances(system, run, first=True)
            total = new if total is None else total.plus(new)
    assert total is not None
    P, Q = real_gramians(system)
    # A layer with two directions is read by a system with both outputs, each times the root of 2: four times the mean.
    Q = Q / 4 if family == "s5_both" else Q
    for found, expected in ((total.P, P), (total.Q, Q)):
        error = (found - expected).norm() / expected.norm()
        assert float(error) < 0.03  # 128,000 tokens, of which about every tenth is independent of the ones before


def test_blocks_of_sequences_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = model("s4d"), inputs(7)
    results = []
    for block in (2**22, 1):
        monkeypatch.setattr("compressm.observing.adjoints._BLOCK", block)
        observer = Observer(net)
        observer.observe_next()
        F.cross_entropy(net(x), y).backward()
        results.append(observer.evidence())
    for name, value in results[0].items():
        for key, tensor in value.tensors().items():
            torch.testing.assert_close(results[1][name].tensors()[key], tensor)


def test_single_precision_is_close_to_double() -> None:
    net, (x, y) = model("lru"), inputs()
    found = []
    for one, data in ((net, x), (copy.deepcopy(net).float(), x.float())):
        observer = Observer(one)
        observer.observe_next()
        F.cross_entropy(one(data), y).backward()
        found.append(observer.evidence()["blocks.0.ssm"])
    for key in ("P", "Q"):
        single, double = getattr(found[1], key), getattr(found[0], key)
        assert (single - double).norm() < 1e-5 * double.norm()


def test_padding_is_not_counted_in_either_direction() -> None:
    net = model("s5_both", vocabulary=6)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 2, 1], [3, 4, 5, 0, 0, 0, 0], [2, 2, 1, 1, 4, 0, 0]])
    y = torch.tensor([0, 1, 2])
    expected = oracle(net, lambda m: F.cross_entropy(m(tokens), y, reduction="none"), tokens != 0)
    observer = Observer(net)
    observer.observe_next()
    F.cross_entropy(net(tokens), y).backward()
    check(observer.evidence(), expected, 3)
    assert float(observer.evidence()["blocks.0.ssm"].tokens) == 2 * 15


@pytest.mark.parametrize("told", [True, False])
def test_padding_stands_where_a_reversed_layer_reads_it(told: bool) -> None:
    class Untold(nn.Module):  # hands its layer no lengths, so that whole rows are reversed
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, u: Tensor) -> Tensor:
            return self.layer(u)

    torch.manual_seed(0)
    net = SequenceClassifier(2, 4, 3, 5, 1, dropout=0.0, norm="layer", vocabulary=6)
    both = Bidirectional(LRU(3, 4, r_max=0.9), LRU(3, 4, r_max=0.9))
    net.blocks[0].ssm = both if told else Untold(both)
    net.double()
    tokens = torch.tensor([[1, 2, 3, 4, 5], [3, 4, 0, 0, 0]])
    observer = Observer(net)
    observer.observe_next()
    F.cross_entropy(net(tokens), torch.tensor([0, 1])).backward()
    found = observer.evidence()["blocks.0.ssm.backwards" if told else "blocks.0.ssm.layer.backwards"]
    assert float(found.tokens) == 7
    # Told the lengths, the reversed layer reads the second sequence's tokens first, and three of padding after them;
    # else it reads the padding first.
    embedded = backwards(net.blocks[0].norm(net.encoder(tokens)).detach(), torch.tensor([5, 2]) if told else None)
    system = read(both.backwards)
    x, total = torch.zeros(2, system.n, dtype=torch.complex128), 0.0
    for t, now in enumerate(embedded.to(torch.complex128).unbind(1)):
        x = system.lam * x + now @ system.B.mT
        stacked = torch.cat([x.real, x.imag], 1)
        for k in range(2):
            if k == 0 or (t < 2 if told else t >= 3):
                total = total + torch.outer(stacked[k], stacked[k])
    torch.testing.assert_close(found.states, total)


@pytest.mark.parametrize("given", ["padding", "lengths"])
def test_the_mean_over_a_language_models_tokens_is_one_over_those_that_are_no_padding(given: str) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5], [3, 4, 0, 0, 0]])
    lengths = None if given == "padding" else torch.tensor([5, 2])
    found = []
    for terms, share in (("tokens", 1 / 7), ("sum", 1.0)):
        torch.manual_seed(0)
        net = LanguageModel(6, 4, 3, 1, padding=0 if given == "padding" else None).double()
        observer = Observer(net, terms)  # pyright: ignore[reportArgumentType]
        observer.observe_next()
        losses = F.cross_entropy(net(tokens, lengths).mT, tokens, reduction="none")
        (share * losses[tokens != 0].sum()).backward()
        (one,) = observer.evidence().values()
        assert isinstance(one, MaskFisher)
        found.append(one.products)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9 * float(found[1].abs().max()))


def test_what_a_cut_changes_is_predicted_within_each_length() -> None:
    # Of the two directions of an S5, against the loss of the layer that is written, with a change so small that the
    # first order is all of it.
    torch.manual_seed(1)
    net = model("s5_both", vocabulary=6)
    tokens, y = torch.tensor([[1, 2, 3, 4, 5, 2, 1], [3, 4, 5, 0, 0, 0, 0]]), torch.tensor([0, 1])
    observer = Observer(net, "sum", memory=1.0, keep=2)
    observer.observe_next()
    F.cross_entropy(net(tokens), y, reduction="sum").backward()
    (calls,) = observer.samples()["blocks.0.ssm"]
    layer = net.get_submodule("blocks.0.ssm")
    before = F.cross_entropy(net(tokens), y, reduction="none").detach()
    system = read(layer)
    step = 1e-6
    with torch.no_grad():
        for name in ("C_re", "C_im"):
            parameter = layer.get_parameter(name)
            parameter += step * torch.randn_like(parameter)
    predicted = linear_changes(layer, system, read(layer), calls)
    measured = F.cross_entropy(net(tokens), y, reduction="none").detach() - before
    torch.testing.assert_close(predicted, measured, rtol=1e-4, atol=1e-3 * float(measured.abs().max()))


def test_a_layer_that_is_called_twice_counts_tokens_twice_and_sequences_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.out = layer("lru").double(), nn.Linear(3, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.one(torch.tanh(self.one(x))).mean(1))

    net, y = Twice(), torch.tensor([0, 1, 2, 3])
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    expected = oracle(net, lambda m: F.cross_entropy(m(x), y, reduction="none"))
    observer = Observer(net)
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    check(observer.evidence(), expected, 4)
    assert observer.evidence()["one"].length == 12


@pytest.mark.parametrize(("terms", "divisor"), [("sequences", 4), ("tokens", 4 * 9), ("sum", 1)])
def test_the_loss_of_a_sequence_is_its_own_whatever_training_computes(terms: Any, divisor: int) -> None:
    net, (x, y) = model("lru"), inputs()
    expected = oracle(net, lambda m: F.cross_entropy(m(x), y, reduction="none"))
    observer = Observer(net, terms)
    observer.observe_next(loss_scale=1024.0)
    (1024.0 * F.cross_entropy(net(x), y, reduction="sum") / divisor).backward()
    check(observer.evidence(), expected, 4)


def test_accumulated_batches_weigh_alike_and_one_pass_is_observed_at_a_time() -> None:
    net, y = model("lru"), torch.tensor([0, 1, 2, 3])
    batches = [inputs(seed=seed)[0] for seed in range(3)]
    expected = oracle(net, lambda m: F.cross_entropy(m(torch.cat(batches[:2])), y.repeat(2), reduction="none"))
    observer = Observer(net, memory=1.0)
    for x in batches[:2]:
        observer.observe_next(loss_scale=1 / 2)
        (F.cross_entropy(net(x), y) / 2).backward()
    F.cross_entropy(net(batches[2]), y).backward()  # nobody asked for it
    check(observer.evidence(), expected, 8)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_what_was_seen_before_is_forgotten() -> None:
    net, y = model("lru"), torch.tensor([0, 1, 2, 3])
    (first, _), (second, _) = inputs(seed=0), inputs(seed=1)
    observer, states = Observer(net, memory=0.5), []
    for x in (first, second):
        observer.reset()
        observer.observe_next()
        F.cross_entropy(net(x), y).backward()
        states.append(observer.evidence()["blocks.0.ssm"].states)
    observer.reset()
    for x in (first, second):
        observer.observe_next()
        F.cross_entropy(net(x), y).backward()
    found = observer.evidence()["blocks.0.ssm"]
    torch.testing.assert_close(found.states, 0.5 * states[0] + states[1])
    assert float(found.sequences) == 6
    assert float(found.weights) == 5


def test_batches_that_are_not_finite_are_left_out_and_counted() -> None:
    net, (x, y) = model("lru", layers=1), inputs()
    observer = Observer(net)
    observer.observe_next()
    (F.cross_entropy(net(x), y) * float("inf")).backward()
    assert observer.dropped == 1
    with pytest.raises(UnsupportedModelError, match=r"'blocks.0.ssm'.*1 calls of layers"):
        observer.evidence()
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    assert bool(observer.evidence()["blocks.0.ssm"].Q.isfinite().all())


def test_a_layer_that_has_diverged_disturbs_nobody() -> None:
    net, (x, y) = model("lru", layers=1), inputs()
    observer = Observer(net)
    with torch.no_grad():
        net.blocks[0].ssm.B_re[0, 0] = float("nan")  # type: ignore[index]
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    assert observer.dropped == 1
    assert observer.unseen == ["blocks.0.ssm"]


def observe_share(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    net, (x, y) = model("lru"), inputs(6)
    observer = Observer(net, memory=1.0)
    observer.observe_next()
    mine = slice(3 * rank, 3 * rank + 3)
    F.cross_entropy(net(x[mine]), y[mine]).backward()
    torch.save({name: one.tensors() for name, one in observer.evidence().items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_sum_what_they_have_seen(tmp_path: Path) -> None:
    spawned(2, observe_share, str(tmp_path))
    net, (x, y) = model("lru"), inputs(6)
    observer = Observer(net)
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, whole in observer.evidence().items():
        for key, tensor in whole.tensors().items():
            assert torch.equal(shares[0][name][key], shares[1][name][key])
            torch.testing.assert_close(shares[0][name][key], tensor)


def test_observing_changes_no_gradient_and_waits_for_training() -> None:
    net, (x, y) = model("s5"), inputs()
    plain = copy.deepcopy(net)
    observer = Observer(net)
    observer.observe_next()
    copied = copy.deepcopy(net)
    for module in (net.eval(), copied):
        F.cross_entropy(module(x), y).backward()
    assert observer.unseen == observer.layers  # evaluation does not count, nor do copies
    net.zero_grad()
    F.cross_entropy(net.train()(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    assert observer.unseen == []
    for mine, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]


def test_a_part_of_a_model_may_be_trained_alone() -> None:
    net, (x, _) = model("lru", layers=1), inputs()
    observer = Observer(net)
    observer.observe_next()
    for _ in range(3):  # the model itself is never called
        net.blocks[0](net.encoder(x)).square().sum().backward()
    assert float(observer.evidence()["blocks.0.ssm"].sequences) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_seen_once(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    net, (x, y) = model("lru"), inputs()
    expected = oracle(net, lambda m: F.cross_entropy(m(x), y, reduction="none"))
    for block in net.blocks:
        inner = block.forward
        block.forward = lambda u, inner=inner: checkpoint(inner, u, use_reentrant=reentrant)  # type: ignore[method-assign]
    observer = Observer(net)
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    check(observer.evidence(), expected, 4)


@pytest.mark.slow
def test_compiled_models_are_observed_eagerly_and_compiled_again_after() -> None:
    net, (x, y) = model("lru"), inputs()
    expected = oracle(net, lambda m: F.cross_entropy(m(x), y, reduction="none"))
    compiled = torch.compile(net, backend="eager")
    F.cross_entropy(compiled(x), y).backward()  # hooks that come later are not in the graph
    for root in (net, compiled):
        observer = Observer(root)
        observer.observe_next()
        F.cross_entropy(compiled(x), y).backward()
        found = {name.removeprefix("_orig_mod."): one for name, one in observer.evidence().items()}
        check(found, expected, 4)  # type: ignore[arg-type]
        F.cross_entropy(compiled(x), y).backward()
        called: list[int] = []
        hook = net.blocks[0].ssm.register_forward_hook(lambda *_, called=called: called.append(1))
        compiled(x)
        hook.remove()
        assert called == []  # the compiled graph is back
    torch._dynamo.reset()


def test_autocast_is_no_obstacle() -> None:
    net, (x, y) = model("lru").float(), inputs()
    exact, found = Observer(net), Observer(net)
    exact.observe_next()
    F.cross_entropy(net(x.float()), y).backward()
    exact.close()
    found.observe_next()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(net(x.float()), y)
    loss.backward()
    for name, value in exact.evidence().items():
        other = found.evidence()[name]
        assert (other.P - value.P).norm() < 0.05 * value.P.norm()  # bfloat16 has eight bits
        assert (other.Q - value.Q).norm() < 0.05 * value.Q.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_by_what_was_observed_is_written_as_it_was_certified(family: str) -> None:
    net, (x, _) = model(family), inputs(20)
    evidence = gather_evidence(net, [x]).evidence()
    for name, (one, adapter) in find_layers(net).items():
        seen = evidence[name]
        assert isinstance(seen, Covariances)
        reduction = truncate_covariances(balance_covariances(read(one), seen), 3)
        assert reduction.certificate.valid
        write(one, adapter.plan(layer_values(one), reduction))  # type: ignore[union-attr]
        assert adapter.state_dim(one) == reduction.system.n <= 3
        # 1e-6: real eigenvalues are written with a phase of 1e-8, and off the axis by a millionth of their rate.
        assert bool((reduction.system.minus(read(one)).h2_norm() <= 1e-6 * reduction.system.h2_norm()).all())


def test_after_a_cut_the_old_moments_go() -> None:
    net, (x, y) = model("lru", layers=1), inputs()
    observer = Observer(net)
    for _ in range(2):
        observer.observe_next()
        F.cross_entropy(net(x), y).backward()
        (name, (one, adapter)) = next(iter(find_layers(net).items()))
        write(one, adapter.plan(layer_values(one), truncate(balance(read(one)), 3)))  # type: ignore[union-attr]
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    assert observer.evidence()[name].states.shape == (6, 6)


def test_state_dict_brings_back_what_was_observed() -> None:
    net, (x, y) = model("lru"), inputs()
    observer, other = Observer(net), Observer(net)
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    other.load_state_dict(copy.deepcopy(observer.state_dict()))
    for name, value in observer.evidence().items():
        assert torch.equal(other.evidence()[name].states, value.states)


@pytest.mark.parametrize("trained", [True, False])
def test_gathering_with_given_labels_is_the_oracle_and_leaves_no_trace(trained: bool) -> None:
    net, (x, y) = model("s4d").train(), inputs()
    net.requires_grad_(trained)
    expected = oracle(net.eval(), lambda m: F.cross_entropy(m(x), y, reduction="none"))
    net.train()
    state = torch.get_rng_state()
    found = gather_evidence(net, [(x, y)], lambda out, batch: F.cross_entropy(out, batch[1], reduction="none"))
    check(found.evidence(), expected, 4)
    assert net.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad == trained and p.grad is None for p in net.parameters())


def test_without_labels_adjoints_give_fisher_information() -> None:
    # E over labels of lambda lambda^T, summed over all four classes with their probabilities, against many probes.
    net, (x, _) = model("lru", layers=1), inputs(2, 5)
    net.eval()
    probabilities = net(x).softmax(-1).detach()
    exact = 0.0
    for a in range(4):
        for k in range(2):
            y = torch.full((1,), a)
            one = oracle(net, lambda m, k=k, y=y: F.cross_entropy(m(x[k : k + 1]), y, reduction="none"))
            exact = exact + float(probabilities[k, a]) * one["blocks.0.ssm"][1]
    seen = gather_evidence(net, [x.repeat(200, 1, 1)]).evidence()["blocks.0.ssm"]
    assert isinstance(seen, Covariances)
    found = 2 * seen.adjoints / seen.sequences
    assert float((found - exact).norm() / exact.norm()) < 0.1


def test_language_models_sum_over_tokens_and_skip_padding() -> None:
    logits = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    losses = fisher_probes(logits, "classification", present)
    assert losses.shape == (2,)
    losses.sum().backward()
    reached = logits.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    assert torch.equal(reached, present.bool())


def test_bad_arguments_are_refused() -> None:
    net = model("lru", layers=1)
    for options, message in (
        ({"terms": "mean"}, "terms must be"),
        ({"sequences": 0}, "sequences must be at least 1"),
        ({"memory": 1.5}, "memory must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            Observer(net, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="positive number"):
        Observer(net).observe_next(loss_scale=0.0)
    x, _ = inputs()
    with pytest.raises(ConfigError, match="likelihood must be"):
        gather_evidence(net, [x], "poisson")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="loss of every sequence"):
        gather_evidence(net, [x], lambda out, _: out.mean())
    with pytest.raises(ConfigError, match="object with such logits"):
        fisher_probes((1, 2), "classification")


Way = Literal["lengths", "token"]


def padded(way: Way, seed: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch of sequences of unequal length, and the same sequences one by one without their padding."""
    generator, lengths = torch.Generator().manual_seed(seed), torch.tensor([7, 3, 1, 5])
    inside = torch.arange(7) < lengths[:, None]
    if way == "token":
        rows = torch.randint(1, 6, (4, 7), generator=generator) * inside
        return {"u": rows}, [{"u": row[None, :n]} for row, n in zip(rows, lengths.tolist(), strict=True)]
    rows = torch.randn(4, 7, 2, dtype=torch.float64, generator=generator)
    rows = torch.where(inside[..., None], rows, 3.0)
    return {"u": rows, "lengths": lengths}, [
        {"u": row[None, :n]} for row, n in zip(rows, lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize("way", ["lengths", "token"])
@pytest.mark.parametrize("kind", ["s5_both", "lru", "s4d", "in both directions"])
def test_padded_sequences_are_evidence_as_they_are_alone(kind: str, way: Way) -> None:
    vocabulary = 6 if way == "token" else None
    net = model("lru" if kind == "in both directions" else kind, vocabulary=vocabulary)
    if kind == "in both directions":  # each direction a layer of its own, which has no part of its batch's lengths
        for block in net.blocks:
            block.ssm = Bidirectional(LRU(3, 5, r_max=0.9), LRU(3, 5, r_max=0.9)).double()
    batch, alone = padded(way)

    def loss(logits: Tensor, _: object) -> Tensor:
        return logits.square().sum(1)

    together = gather_evidence(net, [batch], loss=loss, keep=4)
    one_by_one = gather_evidence(net, alone, loss=loss, keep=4)
    expected = one_by_one.evidence()
    for name, found in together.evidence().items():
        for key, value in found.tensors().items():
            torch.testing.assert_close(value, expected[name].tensors()[key], msg=f"{name}: {key}")
    for name, passes in together.samples().items():
        layer, adapter = find_layers(net)[name]
        assert isinstance(adapter, Adapter)
        system = adapter.read(layer_values(layer))
        half = DiagonalSystem(system.lam, system.B, 0.5 * system.C)
        changes = torch.cat([linear_changes(layer, system, half, one) for one in passes])
        exact = torch.cat([linear_changes(layer, system, half, one) for one in one_by_one.samples()[name]])
        torch.testing.assert_close(changes, exact)
