"""Small random models of the installed transformers, family by family."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hypothesis import strategies as st

VOCABULARY = 40
S6 = ("Mamba", "FalconMamba", "Jamba")
SSD = ("Mamba2", "Bamba", "FalconH1", "GraniteMoeHybrid", "NemotronH", "Zamba2")
FAMILIES = (*S6, *SSD)


@st.composite
def hf_models(draw: st.DrawFn, family: str) -> Any:
    """A causal language model in evaluation mode, with trained-like weights: see `perturb`."""
    width, states = draw(st.sampled_from([8, 16])), draw(st.sampled_from([2, 6, 9]))
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": draw(st.booleans()),
    }
    hybrid = {**common, "num_hidden_layers": 3, "intermediate_size": 12, "num_attention_heads": 2}
    hybrid |= {"num_key_value_heads": 2}
    bias, conv_bias, groups = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([1, 2]))
    ssd = {"mamba_d_state": states, "mamba_n_heads": 4, "mamba_d_head": width // 2, "mamba_n_groups": groups}
    ssd |= {"mamba_expand": 2, "mamba_chunk_size": 8, "mamba_proj_bias": bias, "mamba_conv_bias": conv_bias}
    experts = {"num_experts_per_tok": 1}
    if family in ("Mamba", "FalconMamba"):
        rank = draw(st.integers(1, 3))
        options = {**common, "state_size": states, "time_step_rank": rank, "use_bias": bias, "use_conv_bias": conv_bias}
    elif family == "Jamba":
        options = {**hybrid, **experts, "mamba_d_state": states, "mamba_dt_rank": 2, "mamba_proj_bias": bias}
        options |= {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2, "mamba_conv_bias": conv_bias}
    elif family == "Mamba2":
        options = {**common, "state_size": states, "num_heads": 4, "head_dim": width // 2, "n_groups": groups}
        options |= {"chunk_size": 8, "use_bias": bias, "use_conv_bias": conv_bias}
    elif family == "Bamba":
        options = {**hybrid, **ssd, "attn_layer_indices": [1]}
    elif family == "FalconH1":
        options = {**hybrid, **ssd, "mamba_d_ssm": 2 * width, "mamba_rms_norm": draw(st.booleans())}
        options |= {"ssm_multipliers": [0.5, 2.0, 1.5, 0.7, 1.2], "ssm_in_multiplier": 0.8}
    elif family == "GraniteMoeHybrid":
        options = {**hybrid, **ssd, **experts, "layer_types": ["mamba", "attention", "mamba"]}
        options |= {"num_local_experts": 2, "shared_intermediate_size": 12}
    elif family == "NemotronH":
        options = {**hybrid, "ssm_state_size": states, "mamba_num_heads": 4, "mamba_head_dim": width // 2}
        options |= {"n_groups": groups, "chunk_size": 8, "layers_block_type": ["mamba", "attention", "mamba"]}
        options |= {"head_dim": 4, "n_routed_experts": 2, "moe_intermediate_size": 8, "use_conv_bias": conv_bias}
    else:
        options = {**hybrid, "mamba_d_state": states, "n_mamba_heads": 4, "mamba_headdim": width // 2}
        options |= {"mamba_expand": 2, "mamba_ngroups": groups, "chunk_size": 8, "num_mem_blocks": 1}
        options |= {"layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1]}
    torch.manual_seed(draw(st.integers(0, 1000)))
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    perturb(model)
    return model


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Weights as after some training: the states matter, decay rates and norms are not what they were at first."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith("A_log"):
            parameter.add_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


def tokens(batch: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them special, shape ``(batch, length)``."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
