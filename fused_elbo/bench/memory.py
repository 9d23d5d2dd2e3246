"""Memory of a CPU: what there is, and what a call allocates."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from . import environment


def allocated_at_once(run: Callable[[], Any]) -> int | None:
    """The most bytes that torch's allocator had handed out at once during a call and not got back, its results included.

    Counted by torch's profiler, which sees every tensor and no buffer that a library allocates otherwise. The resident set
    would be the whole process's, with what the allocator keeps for later calls.
    """
    # Read at the profiler's first use, which is otherwise announced on stderr every time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    del results
    events = getattr(profiler.profiler, "kineto_results", None)
    if events is None:
        return None
    changes = [(event.start_ns(), event.nbytes()) for event in events.events() if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most


def available() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    for line in environment.read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None
