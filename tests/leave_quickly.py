"""Runs a script and leaves without the interpreter's own end: ``leave_quickly.py SCRIPT [argument ...]``.

gloo's threads outlive a process group that DistributedDataParallel has used, ``destroy_process_group`` or not, and
in about one exit of twenty the process then aborts with "terminate called without an active exception" after all its
work (torch 2.13). An error of the script still ends with its traceback.
"""

import os
import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
