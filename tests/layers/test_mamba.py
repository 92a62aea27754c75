from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressm.layers import LanguageModel, Mamba, Mamba2, SequenceClassifier
from compressm.layers.mamba import causal_conv


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=10)
@given(d_model=st.integers(1, 9), n=st.integers(1, 9), expand=st.integers(1, 3), taps=st.integers(1, 5))
def test_mamba_is_transformers_mamba(d_model: int, n: int, expand: int, taps: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    layer = Mamba(d_model, n, expand, taps, dt_rank=2)
    config = transformers.MambaConfig(
        hidden_size=d_model, state_size=n, expand=expand, conv_kernel=taps, time_step_rank=2, use_mambapy=False
    )
    theirs = MambaMixer(config, layer_idx=0)
    assert not any(theirs.load_state_dict(layer.state_dict()))
    v = inputs(2, 13, d_model)
    torch.testing.assert_close(layer(v), theirs.slow_forward(v) if hasattr(theirs, "slow_forward") else theirs(v))


@settings(max_examples=10)
@given(groups=st.integers(1, 2), heads=st.integers(1, 3), head_dim=st.integers(1, 4), n=st.integers(1, 9))
def test_mamba2_is_transformers_mamba2(groups: int, heads: int, head_dim: int, n: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    heads = heads * groups
    width = heads * head_dim
    layer = Mamba2(width, n, expand=1, head_dim=head_dim, n_groups=groups)
    nn.init.normal_(layer.norm.weight)
    config = transformers.Mamba2Config(
        hidden_size=width, state_size=n, expand=1, head_dim=head_dim, num_heads=heads, n_groups=groups, chunk_size=4
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    assert not any(theirs.load_state_dict(layer.state_dict()))
    v = inputs(2, 13, width)
    torch.testing.assert_close(layer(v), theirs(v), rtol=1e-4, atol=1e-5)


def test_convolution_is_torch_s() -> None:
    conv = nn.Conv1d(5, 5, 4, groups=5, padding=3)
    u = inputs(2, 11, 5)
    expected = nn.functional.silu(conv(u.mT)[..., :11]).mT
    torch.testing.assert_close(causal_conv(conv, u), expected)


@pytest.mark.parametrize("layer", [Mamba(6, 5), Mamba2(6, 5, head_dim=4, n_groups=3), Mamba(4, 3, d_conv=1)])
def test_steps_are_the_sequence(layer: Mamba | Mamba2) -> None:
    v, state, out = inputs(2, 15, layer.d_model), layer.initial_state(2), []
    for t in range(15):
        y, state = layer.step(v[:, t], state)
        out.append(y)
    torch.testing.assert_close(torch.stack(out, 1), layer(v), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "linear_attention"])
def test_language_model_generates_what_it_predicts(kind: str) -> None:
    torch.manual_seed(0)
    options = {"head_dim": 8} if kind == "mamba2" else {}
    model = LanguageModel(11, 8, 4, layer=kind, **options).eval()
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    out = model.generate(tokens, 5, temperature=0)
    assert torch.equal(out[:, :6], tokens)
    assert torch.equal(out[:, 6:], model(out).argmax(-1)[:, 5:-1])
    rebuilt = LanguageModel(**model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens), model(tokens))


def test_classifier_rebuilds_itself_from_its_config() -> None:
    model = SequenceClassifier(1, 3, 8, [4, 6], 2, layer="mamba2", head_dim=4, n_groups=2)
    rebuilt = SequenceClassifier(**model.config)
    rebuilt.load_state_dict(model.state_dict())
    u = inputs(2, 9, 1)
    assert torch.equal(rebuilt.eval()(u), model.eval()(u))


def test_unfit_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="must be at least 1; got 4, 0"):
        Mamba(4, 0)
    with pytest.raises(ValueError, match="dt_min < dt_max"):
        Mamba(4, 4, dt_min=0.1, dt_max=0.01)
    with pytest.raises(ValueError, match=r"head_dim=3 must divide expand \* d_model = 8"):
        Mamba2(4, 4, head_dim=3)
    with pytest.raises(ValueError, match="n_groups=3 must divide the number of heads, 4"):
        Mamba2(4, 4, head_dim=2, n_groups=3)
    with pytest.raises(ValueError, match=r"layer must be one of lru, s5, s4, s4d, mamba, .*; got 's6'"):
        SequenceClassifier(1, 2, 4, 4, layer="s6")
