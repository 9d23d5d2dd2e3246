"""How a call is timed on a CPU: by the wall clock, with as many threads as asked for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import environment, memory
from .clock import Timed

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20}
# Of a machine that does not say.
LARGEST_CACHE = 32 * 2**20


class CpuClock:
    """Wall time of calls one after the other; there is nothing to wait for."""

    device = torch.device("cpu")
    copy_bytes = 2**28

    def __init__(self, *, cold: bool) -> None:
        self.states = ("hot", "cold") if cold else ("hot",)
        self.cache_bytes = _largest_cache()

    def prepare(self, runs: Sequence[Callable[[], Any]], *, eager: str | None, fill: bool) -> Timed:
        def seconds(passes: int) -> float:
            begin = time.perf_counter()
            for _ in range(passes):
                for run in runs:
                    run()
            return time.perf_counter() - begin

        return Timed(seconds, len(runs), "wall clock")

    def running(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def begin(self) -> None:
        return

    def wait(self) -> None:
        return

    def host_us(self, run: Callable[[], Any]) -> None:
        """None: the call is its host time."""
        return

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        return memory.allocated_at_once(run)

    def free_bytes(self) -> int | None:
        return memory.available()

    def release(self) -> None:
        return

    def facts(self) -> dict[str, Any]:
        return {"cache_bytes": self.cache_bytes, "affinity": affinity()}

    def conditions(self) -> dict[str, Any]:
        """What may change during a run: the cores' clocks in MHz, where the system says."""
        lines = environment.read("/proc/cpuinfo").splitlines()
        return {"mhz": [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]}


def pin(threads: int) -> list[int] | None:
    """Keep this process to ``threads`` of the processors that it may use; those are returned, None where it cannot be done."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    os.sched_setaffinity(0, affinity()[:threads])
    return affinity()


def affinity() -> list[int] | None:
    """The processors that this process may use; None where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _largest_cache() -> int:
    sizes = [environment.read(str(path)).strip() for path in _CACHE.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=LARGEST_CACHE)
