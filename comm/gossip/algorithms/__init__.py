"""Averaging algorithms: one file each. What they have in common is algorithm.py."""
