"""The recurrences under the layers: one function per recurrence.

All can be differentiated any number of times, in forward mode, and by the transforms of `torch.func`; see
`compressm.scans.transforms`. An empty batch, or sequences of length 0, give empty outputs and return the initial state.
"""

from compressm.scans.delta import delta_scan, delta_step
from compressm.scans.gla import gla_scan, gla_step
from compressm.scans.lti import lti_scan, lti_step
from compressm.scans.selective import selective_scan
from compressm.scans.selective_step import selective_step
from compressm.scans.siso import siso_scan, siso_step
from compressm.scans.ssd import ssd_scan, ssd_step

__all__ = [
    "delta_scan",
    "delta_step",
    "gla_scan",
    "gla_step",
    "lti_scan",
    "lti_step",
    "selective_scan",
    "selective_step",
    "siso_scan",
    "siso_step",
    "ssd_scan",
    "ssd_step",
]
