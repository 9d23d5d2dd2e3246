"""Time and memory of training, on the device that does the work."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import torch

MIB = 2**20


class StepClock:
    """Milliseconds of each step. On CUDA they are read from events, so that measuring does not make the device wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._steps: list[tuple] = []

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._steps.append((self._begin, self._now()))

    def take(self) -> list[float]:
        """The steps since the last call."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        steps, self._steps = self._steps, []
        return [begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin) for begin, end in steps]

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class PeakMemory:
    """Peak memory since this object was made, in MiB.

    On CUDA what torch has allocated at most, model and data included; elsewhere the growth of the process's resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # Reading the digits needs more memory than training does: forget that peak, where the system can (Linux).
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _peak_resident()

    @property
    def meaning(self) -> str:
        """What ``read`` measures, in words."""
        return (
            "torch.cuda.max_memory_allocated"
            if self._device.type == "cuda"
            else "growth of peak resident memory (to some 10 MiB)"
        )

    def read(self) -> float | None:
        """MiB; None where the system does not say (Windows)."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / MIB
        return None if self._before is None else _peak_resident() - self._before


def resident(what: str) -> int | None:
    """Bytes of this process that are in memory, "VmRSS", or were at most, "VmHWM"; None where the system does not say (Linux
    does)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(what)), None)


def _peak_resident() -> float | None:
    # On Linux getrusage says no less than the peak of the process that started this one.
    peak = resident("VmHWM")
    if peak is not None:
        return peak / MIB
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024
