"""What membership of a run can fail with."""

from __future__ import annotations

from thinwire.comm.errors import CommError


class NoQuorumError(CommError):
    """Nothing was committed for as long as this machine was told to wait: too few machines reach each other."""


class RefusedError(CommError):
    """The run does not take this machine, and says why."""


class HistoryError(CommError):
    """A machine holds another history of rounds that were already committed: two runs of one manifest have met."""


class ModelMismatchError(RuntimeError):
    """The weights of this machine are not those that its log makes of the base model."""


class MessageError(ValueError):
    """Received bytes are not what they should be: damaged, of another run, or of another program."""
