"""What a clock does for the measurement, and how many sets of inputs it takes to find the caches cold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

# "Cold": inputs rotate over sets that are together larger than this many times the last cache.
COLD_FACTOR = 3
# No more sets than that: below some kilobytes a set, a call takes its time whatever the cache holds.
MOST_SETS = 256


class Timed(NamedTuple):
    """``seconds(passes)`` is the time of ``passes`` times ``calls`` calls; ``how`` it was taken, in words."""

    seconds: Callable[[int], float]
    calls: int
    how: str


class Clock(Protocol):
    """How a device is timed.

    Attributes:
        device: where everything runs.
        states: of the caches, "hot" (the same inputs again) or "cold" (inputs that rotate), the one that is reported first.
        cache_bytes: of the largest cache.
        copy_bytes: the size of a tensor whose copy tells the bandwidth.
    """

    device: torch.device
    states: tuple[str, ...]
    cache_bytes: int
    copy_bytes: int

    def prepare(self, runs: Sequence[Callable[[], Any]], *, eager: str | None, fill: bool) -> Timed:
        """Make ready to time a pass over ``runs``.

        ``eager``: why they are not to be captured, or None; ``fill``: small calls may be put together to a longer pass.
        """

    def running(self) -> AbstractContextManager:
        """Everything that is measured is prepared and run in there."""

    def begin(self) -> None:
        """An item begins: what was prepared before is not used any more."""

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""

    def host_us(self, run: Callable[[], Any]) -> float | None:
        """Microseconds until a call returns, whether or not the device is done; None where it has then."""

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """The most that a call allocates at once, results included; None where that cannot be told."""

    def free_bytes(self) -> int | None:
        """Memory that can still be had."""

    def release(self) -> None:
        """Give back what earlier calls have left behind."""

    def facts(self) -> dict[str, Any]:
        """What stays, for the record."""

    def conditions(self) -> dict[str, Any]:
        """What may change during a run, for the record."""


def sets_of(state: str, set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs of ``set_bytes`` a state takes."""
    return 1 if state == "hot" else min(COLD_FACTOR * cache_bytes // set_bytes + 1, MOST_SETS)


def states_of(clock: Clock, set_bytes: int) -> dict[str, int]:
    """The states that are worth a measurement, and their numbers of sets.

    Of inputs that no cache holds the two are one.
    """
    found = {state: sets_of(state, set_bytes, clock.cache_bytes) for state in clock.states}
    if found.get("cold") == 1:
        return {clock.states[0]: 1}
    return found


def first_line(error: Exception) -> str:
    """Of its message."""
    return str(error).strip().partition("\n")[0]
