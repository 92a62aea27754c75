"""Gradients of masks on states: what is masked is what a cut takes away, and the gradients are autograd's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compressm.adapters import SelectiveAdapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.layers import (
    DeltaNet,
    GatedLinearAttention,
    LanguageModel,
    LinearAttention,
    Mamba,
    Mamba2,
    RecurrentBlock,
    SequenceClassifier,
)
from compressm.observing.loss_evidence import gather_evidence
from compressm.observing.masks import can_be_masked, groups_of, mask_gradients, masked_forward
from compressm.observing.observer import Observer
from compressm.theory.fisher import MaskFisher
from compressm.theory.recurrence import ErrorEstimate, SelectiveReduction

WIDTH, N = 8, 6
LAYERS: dict[str, Any] = {
    "mamba": lambda: Mamba(WIDTH, N),
    "mamba2": lambda: Mamba2(WIDTH, N, head_dim=4, n_groups=2),
    "linear_attention": lambda: LinearAttention(WIDTH, N, n_heads=2, d_conv=3),
    "gated_linear_attention": lambda: GatedLinearAttention(WIDTH, N, n_heads=2),
    "delta_net": lambda: DeltaNet(WIDTH, N, n_heads=2, gated=True),
    "rg_lru": lambda: RecurrentBlock(WIDTH, N, n_blocks=2),
}


def build(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[family]().double()


def adapter_of(layer: nn.Module) -> SelectiveAdapter:
    adapter = next(iter(find_layers(layer).values()))[1]
    assert isinstance(adapter, SelectiveAdapter)
    return adapter


def cut(layer: nn.Module, kept: Tensor) -> nn.Module:
    """A copy without the other states, by the adapter, with nobody taking over."""
    adapter, smaller = adapter_of(layer), copy.deepcopy(layer)
    n = adapter.state_dim(layer)
    rows = torch.eye(n, dtype=torch.float64)[kept]
    reduction = SelectiveReduction(rows, rows, kept, ErrorEstimate(n, kept.shape[1], 0.0, 0.0))
    write(smaller, adapter.plan(layer_values(smaller), reduction))
    return smaller


def mask_of(kept: Tensor, n: int, batch: int) -> Tensor:
    mask = torch.zeros(kept.shape[0], n, dtype=torch.float64).scatter(1, kept, 1.0)
    return mask.expand(batch, -1, -1)


def hidden(batch: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)


KEPT = {1: torch.tensor([[0, 3, 4]]), 2: torch.tensor([[0, 3, 4], [1, 2, 5]])}


@pytest.mark.parametrize("family", LAYERS)
def test_a_mask_of_zeros_and_ones_is_the_cut(family: str) -> None:
    layer, u = build(family), hidden()
    kept = KEPT[groups_of(layer)]
    masked = masked_forward(layer, mask_of(kept, N, 3))
    assert masked is not None
    torch.testing.assert_close(masked(u), cut(layer, kept)(u), rtol=1e-9, atol=1e-9)
    ones = masked_forward(layer, torch.ones(3, groups_of(layer), N, dtype=torch.float64))
    assert ones is not None
    torch.testing.assert_close(ones(u), layer(u))
    assert (masked(u) - layer(u)).abs().max() > 1e-4


def scaled(layer: nn.Module, family: str, mask: Tensor) -> dict[str, Tensor]:
    """Parameters with which the layer computes the masked recurrence, where there are such."""
    p, flat = dict(layer.named_parameters()), mask.flatten()
    if family == "mamba":
        factor = torch.cat([torch.ones(p["x_proj.weight"].shape[0] - N, dtype=torch.float64), flat])
        return {"x_proj.weight": p["x_proj.weight"] * factor[:, None]}
    if family == "rg_lru":
        return {
            "conv_1d.weight": p["conv_1d.weight"] * flat[:, None, None],
            "conv_1d.bias": p["conv_1d.bias"] * flat,
        }
    names = ("q_proj.weight", "k_proj.weight") if family == "delta_net" else ("q_proj.weight",)
    return {name: p[name] * flat[:, None] for name in names}


def looped(layer: Mamba2, u: Tensor, mask: Tensor) -> Tensor:
    """Mamba-2 step by step with masked states."""
    x, delta, B, C, z = layer.recurrence(u)
    per = layer.n_heads // layer.n_groups
    B, C, m = (v.repeat_interleave(per, -2) for v in (B, C, mask[None]))
    S, outputs = torch.zeros(u.shape[0], layer.n_heads, layer.head_dim, N, dtype=torch.float64), []
    for t in range(u.shape[1]):
        decay = torch.exp(-delta[:, t] * layer.A_log.exp())[..., None, None]
        S = decay * S + (x[:, t] * delta[:, t, :, None])[..., None] * B[:, t, :, None]
        outputs.append((S * m[:, :, None] * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1) + layer.D[:, None] * x
    return layer.out_proj(layer.norm(y.flatten(-2), z))


@pytest.mark.parametrize("family", LAYERS)
def test_fisher_matrix_is_autograds_on_an_explicit_mask(family: str) -> None:
    torch.manual_seed(0)
    options = {"mamba": {}, "rg_lru": {"n_blocks": 2}, "mamba2": {"head_dim": 4, "n_groups": 2}}
    net = SequenceClassifier(
        2, 3, WIDTH, N, 1, dropout=0.0, layer=family, **options.get(family, {"n_heads": 2})
    ).double()
    x = torch.randn(4, 10, 2, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1])
    layer: Any = net.blocks[0].ssm
    groups, expected = groups_of(layer), []
    for k in range(4):
        mask = torch.ones(groups, N, dtype=torch.float64, requires_grad=True)
        if family == "mamba2":
            replaced = copy.deepcopy(net)
            inner = replaced.blocks[0].ssm
            inner.forward = lambda u, inner=inner, mask=mask: looped(inner, u, mask)  # type: ignore[method-assign]
            out = replaced(x[k : k + 1])
        else:
            parameters = {f"blocks.0.ssm.{name}": v for name, v in scaled(layer, family, mask).items()}
            out = functional_call(net, parameters, (x[k : k + 1],))
        expected.append(torch.autograd.grad(F.cross_entropy(out, y[k : k + 1]), mask)[0])
    g = torch.stack(expected)
    observer = Observer(net, keep=10)
    observer.observe_next()
    F.cross_entropy(net(x), y).backward()
    (fisher,) = observer.evidence().values()
    assert isinstance(fisher, MaskFisher)
    torch.testing.assert_close(fisher.F, torch.einsum("kai,kbj->aibj", g, g) / 4, rtol=1e-6, atol=1e-12)
    (samples,) = observer.samples().values()
    assert isinstance(samples[0], Tensor)
    torch.testing.assert_close(samples[0].diagonal(dim1=-2, dim2=-1), g, rtol=1e-6, atol=1e-10)


def test_a_layer_that_is_called_twice_has_one_mask() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = build("mamba")

        def forward(self, u: Tensor) -> Tensor:
            return self.one(torch.tanh(self.one(u))).mean(1)

    net, u = Twice(), hidden()
    y = torch.tensor([0, 1, 2])
    mask = torch.ones(3, 1, N, dtype=torch.float64, requires_grad=True)
    masked = masked_forward(net.one, mask)
    assert masked is not None
    out = masked(torch.tanh(masked(u))).mean(1)
    expected = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), mask)[0]
    observer = Observer(net, keep=3)
    observer.observe_next()
    F.cross_entropy(net(u), y).backward()
    (fisher,) = observer.evidence().values()
    assert isinstance(fisher, MaskFisher)
    assert float(fisher.sequences) == 3
    torch.testing.assert_close(fisher.products, torch.einsum("kai,kbj->aibj", expected, expected))
    (samples,) = observer.samples().values()
    assert isinstance(samples[0], Tensor)
    torch.testing.assert_close(samples[0].diagonal(dim1=-2, dim2=-1), expected)


@pytest.mark.parametrize("family", ["Mamba", "FalconMamba", "Jamba", "Mamba2", "Bamba"])
def test_layers_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    from hf_models import perturb, tokens

    common = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
    common |= {"eos_token_id": 2, "tie_word_embeddings": True}
    hybrid = {**common, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    options = {
        "Mamba": {**common, "state_size": N, "time_step_rank": 2},
        "FalconMamba": {**common, "state_size": N, "time_step_rank": 2},
        "Jamba": {**hybrid, "mamba_d_state": N, "mamba_dt_rank": 2, "num_experts": 2, "num_experts_per_tok": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1},
        "Mamba2": {**common, "state_size": N, "num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 8},
        "Bamba": {**hybrid, "mamba_d_state": N, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_n_groups": 2}
        | {"mamba_expand": 2, "mamba_chunk_size": 8, "attn_layer_indices": [1]},
    }[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options)).eval()
    perturb(model)
    name, (layer, adapter) = next(iter(find_layers(model).items()))
    assert can_be_masked(layer)
    groups = groups_of(layer)
    u = torch.randn(3, 9, 8)
    g = torch.randn(3, 9, 8)
    found = mask_gradients(layer, adapter, (u,), {}, g)  # type: ignore[arg-type]
    assert found.shape == (3, groups, N, N)
    # Central differences of single entries of the masks.
    for k, a, i in ((0, 0, 1), (2, groups - 1, 4)):
        values = []
        for sign in (1, -1):
            mask = torch.ones(3, groups, N)
            mask[k, a, i] += sign * 0.02
            forward = masked_forward(layer, mask)
            assert forward is not None
            with torch.no_grad():
                values.append(float((forward(u) * g).double().sum()))
        assert float(found[k, a, i, i]) == pytest.approx((values[0] - values[1]) / 0.04, rel=0.02, abs=2e-3)
    if family in ("Mamba", "Mamba2", "Bamba"):  # the others divide by a norm of what is left
        kept = KEPT[groups]
        forward = masked_forward(layer, mask_of(kept, N, 3).float())
        assert forward is not None
        with torch.no_grad():
            torch.testing.assert_close(forward(u), cut(layer, kept)(u), rtol=1e-3, atol=1e-4)
    # In evaluation mode transformers fills caches on the way, which the layer must not read when it runs again.
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(2, 13, dtype=torch.long)}
    evidence = {}
    for use_cache in (True, False):
        torch.manual_seed(3)
        evidence[use_cache] = gather_evidence(model, [{**batch, "use_cache": use_cache}]).evidence()[name]
    torch.testing.assert_close(evidence[True].products, evidence[False].products, rtol=1e-3, atol=1e-7)  # type: ignore[union-attr]
    assert float(evidence[True].products.abs().max()) > 0  # type: ignore[union-attr]


def test_the_block_of_recurrent_gemma() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        hidden_size=8, lru_width=12, num_attention_heads=2, num_hidden_layers=1, vocab_size=40
    )
    layer = RecurrentGemmaRecurrentBlock(config, 0).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    u, position_ids = torch.randn(3, 9, 8), torch.arange(9)[None].expand(3, -1)
    arguments = {"position_ids": position_ids, "attention_mask": None, "use_cache": False}
    mask = mask_of(KEPT[2], N, 3).float()
    forward = masked_forward(layer, mask)
    assert forward is not None
    with torch.no_grad():
        expected = cut(layer, KEPT[2])(u, **arguments)
        torch.testing.assert_close(forward(u, **arguments), expected, rtol=1e-4, atol=1e-5)
        layer(u, **{**arguments, "use_cache": True})
        cached = layer.conv1d_state.clone(), layer.rg_lru.recurrent_states.clone()
        forward(u, **arguments)
    assert torch.equal(layer.conv1d_state, cached[0])
    assert torch.equal(layer.rg_lru.recurrent_states, cached[1])
    assert not layer.rg_lru._forward_pre_hooks


@pytest.mark.parametrize("sequences", [None, 2])
def test_language_models_and_a_part_of_a_batch(sequences: int | None) -> None:
    torch.manual_seed(0)
    net = LanguageModel(11, WIDTH, N, 2, layer="mamba2", head_dim=4).double()
    tokens = torch.randint(11, (4, 8))
    count = sequences or 4

    def losses(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[: len(logits), 1:], reduction="none").sum(1)

    expected = gather_evidence(net, [tokens[:count]], lambda out, _: losses(out)).evidence()
    observer = Observer(net, "tokens", sequences)
    observer.observe_next()
    # The mean over all positions, as a training that predicts a next token everywhere computes it.
    (losses(net(tokens)).sum() / tokens.numel()).backward()
    for name, value in observer.evidence().items():
        assert float(value.sequences) == count
        torch.testing.assert_close(value.products, expected[name].products)  # type: ignore[union-attr]


def test_autocast_is_as_it_was_at_the_call() -> None:
    torch.manual_seed(0)
    net, u = SequenceClassifier(2, 3, WIDTH, N, 1, dropout=0.0, layer="mamba"), torch.randn(4, 10, 2)
    y, found = torch.tensor([0, 1, 2, 0]), []
    for enabled in (False, True):
        observer = Observer(net)
        observer.observe_next()
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss = F.cross_entropy(net(u), y)
        loss.backward()
        (fisher,) = observer.evidence().values()
        found.append(fisher.products)  # type: ignore[union-attr]
    assert 0 < float((found[1] - found[0]).norm()) < 0.1 * float(found[0].norm())  # eight bits


def test_samples_from_before_a_cut_go() -> None:
    net, y = nn.Sequential(build("mamba")), torch.tensor([0, 1, 2])
    observer = Observer(net, keep=100)
    for _ in range(2):
        observer.observe_next()
        F.cross_entropy(net(hidden()).mean(1), y).backward()
    net = nn.Sequential(cut(net[0], KEPT[1]))
    after = Observer(net, keep=100)
    after.load_state_dict(observer.state_dict())
    after._samples = observer._samples
    after._passes = 2
    after.observe_next()
    F.cross_entropy(net(hidden()).mean(1), y).backward()
    (samples,) = after.samples().values()
    assert [tuple(one.shape) for one in samples] == [(3, 1, 3, 3)]  # type: ignore[union-attr]
    (fisher,) = after.evidence().values()
    assert float(fisher.sequences) == 3


def test_a_layer_of_another_package_is_named_and_left_out() -> None:
    class Theirs(nn.Module):
        """A layer whose class has the name of the authors', and whose kernels are not known here."""

        def forward(self, u: Tensor) -> Tensor:
            return u

    Theirs.__module__, Theirs.__qualname__ = "mamba_ssm.modules.mamba_simple", "Mamba"
    assert masked_forward(Theirs(), torch.ones(1, 1, 1)) is None
    observer = Observer(nn.Sequential(build("mamba"), Theirs()))
    assert observer.unsupported == ["1"]
    assert observer.layers == ["0"]
