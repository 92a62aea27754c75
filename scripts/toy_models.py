"""Small and published sizes of the model types of transformers that carry a recurrent state.

A type that transformers adds is found by `state_classes.py`, and stays unbuilt there until it has its sizes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 64
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 8}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_DELTA: dict[str, Any] = {
    **_ATTENTION, "head_dim": 8, "num_hidden_layers": 3, "layer_types": _MIXED, "linear_key_head_dim": 8,
    "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_SSD = {
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
_MLA = {
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": None,
}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_THREE = {**_ATTENTION, "num_hidden_layers": 3}


@dataclass(frozen=True)
class Sizes:
    """How to build a model type.

    Attributes:
        name: of its config and model classes, without ``Config`` and ``ForCausalLM``.
        toy: settings of its config at toy width.
        published: settings over the defaults of its config, which are a published model's, for few layers, experts and
            tokens; None if that is too large for a common machine.
        config: name of the config class, if it is not the name followed by ``Config``.
        model: name of the model class, if it is not the name followed by ``ForCausalLM``.
    """

    name: str
    toy: Mapping[str, Any]
    published: Mapping[str, Any] | None = None
    config: str = ""
    model: str = ""

    def build(self, published: bool = False) -> Any:
        """A model with random weights as after some training, in evaluation mode.

        The weights are moved away from where they begin, since many begin where states have no effect.
        """
        settings = self.published if published else self.toy
        assert settings is not None
        torch.manual_seed(0)
        config = getattr(transformers, self.config or f"{self.name}Config")(**{**_TOKENS, **settings})
        model = getattr(transformers, self.model or f"{self.name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and not name.endswith("A_log"):
                    parameter.add_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model


_FEW = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
_FEW_MIXED = {**_FEW, "layer_types": _MIXED[:2]}
_FEW_EXPERTS = {**_FEW_MIXED, "num_experts": 4, "num_experts_per_tok": 2}

SIZES = {
    "mamba": Sizes("Mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 2}, _FEW),
    "falcon_mamba": Sizes(
        "FalconMamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 2}, _FEW
    ),
    "mamba2": Sizes(
        "Mamba2",
        {
            "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 2,
            "chunk_size": 8,
        },
        _FEW,
    ),
    "jamba": Sizes(
        "Jamba",
        {**_THREE, "mamba_d_state": 8, "mamba_dt_rank": 2, "attn_layer_period": 3, "attn_layer_offset": 1,
         "num_experts": 2, "num_experts_per_tok": 1},
    ),
    "bamba": Sizes("Bamba", {**_THREE, **_SSD, "attn_layer_indices": [1]}),
    "falcon_h1": Sizes("FalconH1", {**_THREE, **_SSD, "mamba_d_ssm": 32}),
    "granitemoehybrid": Sizes(
        "GraniteMoeHybrid",
        {**_THREE, **_SSD, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2,
         "num_experts_per_tok": 1, "shared_intermediate_size": 12},
    ),
    "nemotron_h": Sizes(
        "NemotronH",
        {**_THREE, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8,
         "layers_block_type": ["mamba", "attention", "mamba"], "head_dim": 4, "n_routed_experts": 2,
         "moe_intermediate_size": 8, "num_experts_per_tok": 1},
    ),
    "zamba": Sizes(
        "Zamba",
        {**_ATTENTION, "num_hidden_layers": 4, "attention_head_dim": 16, "n_mamba_heads": 2, "mamba_d_state": 8,
         "mamba_dt_rank": 2, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    ),
    "zamba2": Sizes(
        "Zamba2",
        {**_THREE, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 8, "mamba_expand": 2, "mamba_ngroups": 2,
         "chunk_size": 8, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid", "mamba"],
         "hybrid_layer_ids": [1]},
    ),
    "recurrent_gemma": Sizes(
        "RecurrentGemma",
        {**_ATTENTION, "num_hidden_layers": 3, "lru_width": 16, "block_types": ["recurrent", "recurrent", "attention"],
         "attention_window_size": 8, "conv1d_width": 4},
    ),
    "qwen3_next": Sizes("Qwen3Next", {**_DELTA, **_SHARED}, _FEW_EXPERTS),
    "qwen3_5": Sizes("Qwen3_5", _DELTA, _FEW_MIXED, config="Qwen3_5TextConfig"),
    "qwen3_5_moe": Sizes("Qwen3_5Moe", {**_DELTA, **_SHARED}, _FEW_EXPERTS, config="Qwen3_5MoeTextConfig"),
    "qwen4_exp": Sizes(
        "Qwen4Exp", {**_DELTA, **_SHARED, **_INDEXER}, {**_FEW_EXPERTS, **_INDEXER, "indexer_head_dim": 256},
        config="Qwen4ExpTextConfig",
    ),
    "olmo_hybrid": Sizes("OlmoHybrid", _DELTA, _FEW_MIXED),
    "xlstm": Sizes(
        "xLSTM",
        {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 0.5,
         "autocast_kernel_dtype": "float32", "chunk_size": 16},
        {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "autocast_kernel_dtype": "float32"},
    ),
    "kimi_linear": Sizes(
        "KimiLinear",
        {**_THREE, **_MLA, **_EXPERTS, "linear_head_dim": 8, "linear_num_heads": 2, "layer_types": _MIXED,
         "mlp_layer_types": ["dense"] * 3},
    ),
    "bailing_hybrid": Sizes(
        "BailingHybrid",
        {**_THREE, **_MLA, "head_dim": 8, "layer_types": _MIXED, "mlp_layer_types": ["dense"] * 3,
         "moe_intermediate_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    ),
    "glm5_next": Sizes(
        "Glm5Next",
        {**_THREE, "linear_head_dim": 8, "linear_num_heads": 2, "layer_types": ["linear_attention"] * 3,
         "mlp_layer_types": ["dense"] * 3, "moe_intermediate_size": 8},
        config="Glm5NextTextConfig", model="Glm5NextTextModel",
    ),
    "minimax": Sizes(
        "MiniMax", {**_ATTENTION, "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    ),
    "rwkv": Sizes("Rwkv", {"hidden_size": 16, "num_hidden_layers": 2}),
    "lfm2": Sizes("Lfm2", {**_ATTENTION, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": Sizes(
        "Lfm2Moe", {**_ATTENTION, **_EXPERTS, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    ),
    "lfm3": Sizes("Lfm3", {**_ATTENTION, "num_hidden_layers": 3, "head_dim": 8}),
    "inkling": Sizes("Inkling", {**_THREE, **_EXPERTS, "head_dim": 8, "swa_head_dim": 8}, config="InklingTextConfig"),
    "zaya": Sizes("Zaya", {**_ATTENTION, "num_hidden_layers": 2, "head_dim": 8}),
}  # fmt: skip

__all__ = ["SIZES", "VOCABULARY", "Sizes"]
