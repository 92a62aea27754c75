"""`compressm report`: one HTML page about one run or several, to be opened anywhere and without a network."""

from compressm.lab.pages.page import write_page
from compressm.lab.pages.runs import Run, load_runs

__all__ = ["Run", "load_runs", "write_page"]
