"""Byte layout of messages that leave a process, with bounds checks."""

from __future__ import annotations


class PayloadError(ValueError):
    """Received bytes are not what they should be: truncated, corrupted, or written for something else."""
