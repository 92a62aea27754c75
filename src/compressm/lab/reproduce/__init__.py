"""`compressm reproduce`: the paper's claims and ours, each a grid of runs that anyone can make again."""

from compressm.lab.reproduce.experiments import EXPERIMENTS, Arm, Experiment, experiment
from compressm.lab.reproduce.grid import plan_runs, read_results, run_grid

__all__ = ["EXPERIMENTS", "Arm", "Experiment", "experiment", "plan_runs", "read_results", "run_grid"]
