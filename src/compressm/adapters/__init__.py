"""Adapters read a system out of a layer and write a smaller one back: one file per family, one registry.

No other package knows both layers and systems.
"""

from compressm.adapters.base import Adapter, LayerAdapter, SelectiveAdapter
from compressm.adapters.changes import LayerChange, ParameterChange, layer_values, selection_change
from compressm.adapters.cuts import Cuts, Proposal
from compressm.adapters.fla import FLADeltaNetAdapter, FLAGatedDeltaNetAdapter, FLAGatedLinearAttentionAdapter
from compressm.adapters.hf_delta import HFDeltaRuleAdapter
from compressm.adapters.hf_mamba import FalconMambaAdapter, HFMambaAdapter, JambaAdapter
from compressm.adapters.hf_mamba2 import HFMamba2Adapter
from compressm.adapters.hf_xlstm import XLSTMAdapter
from compressm.adapters.hf_zamba import ZambaAdapter
from compressm.adapters.linear_attention import DeltaNetAdapter, GatedLinearAttentionAdapter, LinearAttentionAdapter
from compressm.adapters.lru import LRUAdapter
from compressm.adapters.mamba import MambaAdapter, projection_change
from compressm.adapters.mamba2 import Mamba2Adapter
from compressm.adapters.mamba3 import Mamba3Adapter, MambaSSM3Adapter
from compressm.adapters.mamba_ssm import MambaSSM2Adapter, MambaSSMAdapter
from compressm.adapters.registry import find_layers, layers_that_need_data, register
from compressm.adapters.rg_lru import RecurrentBlockAdapter, RecurrentGemmaAdapter
from compressm.adapters.s4d import S4DAdapter
from compressm.adapters.s5 import S5Adapter

register(LRUAdapter())
register(S5Adapter())
register(S4DAdapter())
register(MambaAdapter())
register(Mamba2Adapter())
register(Mamba3Adapter())
register(LinearAttentionAdapter())
register(GatedLinearAttentionAdapter())
register(DeltaNetAdapter())
register(RecurrentBlockAdapter())

# Registered by name, so that the packages are not imported.
_HUGGING_FACE = "transformers.models.{0}.modeling_{0}.{1}"
register(HFMambaAdapter(_HUGGING_FACE.format("mamba", "MambaMixer")))
register(FalconMambaAdapter(_HUGGING_FACE.format("falcon_mamba", "FalconMambaMixer")))
register(JambaAdapter(_HUGGING_FACE.format("jamba", "JambaMambaMixer")))
register(HFMamba2Adapter(_HUGGING_FACE.format("mamba2", "Mamba2Mixer")))
register(HFMamba2Adapter(_HUGGING_FACE.format("bamba", "BambaMixer"), "mamba_d_state"))
register(HFMamba2Adapter(_HUGGING_FACE.format("falcon_h1", "FalconH1Mixer"), "mamba_d_state"))
register(HFMamba2Adapter(_HUGGING_FACE.format("granitemoehybrid", "GraniteMoeHybridMambaLayer"), "mamba_d_state"))
register(HFMamba2Adapter(_HUGGING_FACE.format("nemotron_h", "NemotronHMamba2Mixer"), "ssm_state_size"))
register(HFMamba2Adapter(_HUGGING_FACE.format("zamba2", "Zamba2MambaMixer"), "mamba_d_state"))
register(ZambaAdapter(_HUGGING_FACE.format("zamba", "ZambaMambaMixer")))
register(XLSTMAdapter("transformers.models.xlstm.modeling_xlstm.xLSTMLayer"))
register(HFDeltaRuleAdapter(_HUGGING_FACE.format("qwen3_next", "Qwen3NextGatedDeltaNet")))
register(HFDeltaRuleAdapter(_HUGGING_FACE.format("qwen3_5", "Qwen3_5GatedDeltaNet")))
register(HFDeltaRuleAdapter(_HUGGING_FACE.format("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet")))
register(HFDeltaRuleAdapter(_HUGGING_FACE.format("qwen4_exp", "Qwen4ExpTextGatedDeltaNet")))
register(HFDeltaRuleAdapter(_HUGGING_FACE.format("olmo_hybrid", "OlmoHybridGatedDeltaNet")))
register(RecurrentGemmaAdapter(_HUGGING_FACE.format("recurrent_gemma", "RecurrentGemmaRecurrentBlock")))
register(
    FLAGatedLinearAttentionAdapter(
        "fla.layers.gla.GatedLinearAttention", ("chunk_gla", "fused_recurrent_gla", "fused_chunk_gla")
    )
)
register(FLADeltaNetAdapter("fla.layers.delta_net.DeltaNet", ("chunk_delta_rule", "fused_recurrent_delta_rule")))
register(
    FLAGatedDeltaNetAdapter(
        "fla.layers.gated_deltanet.GatedDeltaNet",
        ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    )
)
register(MambaSSMAdapter("mamba_ssm.modules.mamba_simple.Mamba"))
register(MambaSSM2Adapter("mamba_ssm.modules.mamba2.Mamba2"))
register(MambaSSM3Adapter("mamba_ssm.modules.mamba3.Mamba3"))

__all__ = [
    "Adapter",
    "Cuts",
    "DeltaNetAdapter",
    "FLADeltaNetAdapter",
    "FLAGatedDeltaNetAdapter",
    "FLAGatedLinearAttentionAdapter",
    "FalconMambaAdapter",
    "GatedLinearAttentionAdapter",
    "HFDeltaRuleAdapter",
    "HFMamba2Adapter",
    "HFMambaAdapter",
    "JambaAdapter",
    "LRUAdapter",
    "LayerAdapter",
    "LayerChange",
    "LinearAttentionAdapter",
    "Mamba2Adapter",
    "Mamba3Adapter",
    "MambaAdapter",
    "MambaSSM2Adapter",
    "MambaSSM3Adapter",
    "MambaSSMAdapter",
    "ParameterChange",
    "Proposal",
    "RecurrentBlockAdapter",
    "RecurrentGemmaAdapter",
    "S4DAdapter",
    "S5Adapter",
    "SelectiveAdapter",
    "XLSTMAdapter",
    "ZambaAdapter",
    "find_layers",
    "layer_values",
    "layers_that_need_data",
    "projection_change",
    "register",
    "selection_change",
]
