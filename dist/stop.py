"""Stopping in order: SIGTERM and SIGUSR1 ask for it, a second signal kills."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop after the current step.

    Attributes: reason, the name of the signal, or "" as long as nobody asked.
    """

    def __init__(self) -> None:
        self.reason = ""

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as requests. Python has signals in the main thread only: elsewhere does nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason = signal.Signals(number).name
