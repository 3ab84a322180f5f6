"""Keys of stochastic rounding: new in every step, and as those of a run that was never interrupted."""

from __future__ import annotations

from thinwire.comm.compress.draw import Draw


def gradient_key(seed: int, draws: int, rank: int) -> int:
    """The key of one rank's exchange of a unit's gradient; what it sends in the next hops has the keys after it.

    Args:
        draws: how many such exchanges there have been since the beginning of the training.
    """
    return Draw(seed, draws, "partition/gradients", rank).own_key()


def update_key(seed: int, step: int, unit: str, owner: int) -> int:
    """The key of an owner's new weights, the same on all its replicas, so that they send the same.

    Args:
        step: updates that have been made before.
        unit: its name.
    """
    return Draw(seed, step, f"partition/update/{unit}", owner).own_key()
