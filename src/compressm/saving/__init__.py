"""Checkpoints, model cards and exports."""
