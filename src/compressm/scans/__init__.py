"""The recurrences under the layers: one function per recurrence."""

from compressm.scans.lti import lti_scan, lti_step
from compressm.scans.selective import selective_scan, selective_step
from compressm.scans.siso import siso_scan, siso_step
from compressm.scans.ssd import ssd_scan, ssd_step

__all__ = ["lti_scan", "lti_step", "selective_scan", "selective_step", "siso_scan", "siso_step", "ssd_scan", "ssd_step"]
