"""Spectrum, plan, report, write, carry: one reduction of one model."""

from compressm.cutting.compression import compress
from compressm.cutting.plan import Plan, plan_reduction
from compressm.cutting.report import LayerReport, Report
from compressm.cutting.sizes import resize_states, state_dims

__all__ = ["LayerReport", "Plan", "Report", "compress", "plan_reduction", "resize_states", "state_dims"]
