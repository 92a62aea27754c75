"""The recurrences under the layers: one function per recurrence, several engines behind it."""

from compressm.scans.lti import lti_scan

__all__ = ["lti_scan"]
