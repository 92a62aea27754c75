"""Spectrum, plan, report, write, carry: one reduction of one model."""
