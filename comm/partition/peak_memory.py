"""The most memory that this process has held at one time."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): to clear_refs, resets VmHWM to what is resident now


class PeakMemory:
    """From the moment at which it is made.

    On CUDA what torch's allocator has given out; on a CPU the resident set, all of the process included: so look at
    differences between runs, or to `at_start_bytes`.

    Args:
        device: whose memory.
    Attributes:
        at_start_bytes: held at that moment.
    Raises:
        RuntimeError: a CPU's peak cannot be asked for, as on systems other than Linux.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.at_start_bytes = torch.cuda.memory_allocated(self._device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError as error:
            raise RuntimeError(f"peak memory: the kernel refuses to begin anew at {_CLEAR}: {error}") from error
        self.at_start_bytes = _resident_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """The most held since then."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_bytes("VmHWM")


def _resident_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"peak memory: {_STATUS} has no {field}")
