"""`compressm report`: one HTML page about one run or several, to be opened anywhere and without a network."""

from compressm.lab.report.page import write_report
from compressm.lab.report.runs import Run, load_runs

__all__ = ["Run", "load_runs", "write_report"]
