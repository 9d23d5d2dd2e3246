"""How an item is measured: nobody who has not shown right numbers, and everybody in turn."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import environment
from .clock import Clock, Timed, first_line, states_of
from .peers import Peer, copy, selected
from .work import Inputs, Tensors

TURN_SECONDS = 2e-3
WARM_UP_CALLS = 5
WARM_UP_SECONDS = 0.3
LEAST_ROUNDS = 3

# A first call of plain PyTorch that takes longer, compilation included, ends the trials of its mode.
MOST_FIRST_SECONDS = 60.0
# A later call that takes longer is not worth the wait.
MOST_CALL_SECONDS = 5.0

# Who has not begun by then is left out of an item, so that a run's length can be foreseen.
MOST_ITEM_SECONDS = 60.0

# Calls on larger inputs take so long that a GPU never waits for the host; their graphs would keep memory that others need.
MOST_CAPTURED_BYTES = 2**32
LARGE = "of inputs this large the host is far ahead"

COPY_ROUNDS = 20


@dataclass
class Result:
    """What came of one peer in one state of the caches: times in ``ms`` a call, one for each round of ``calls``.

    Or why it was ``refused``, since it failed or was wrong, or ``left_out``, since there was no time for it. ``others`` is the
    share of the machine's CPU time that other processes took meanwhile; None where the system does not say.
    """

    peer: str
    kind: str
    backend: str | None = None
    upstream: float = 1.0
    state: str = "hot"
    first_call_seconds: float = 0.0
    peak_bytes: int | None = None
    host_us: float | None = None
    refused: str | None = None
    left_out: str | None = None
    how: str = ""
    sets: int = 1
    calls: int = 1
    ms: list[float] = field(default_factory=list)
    others: float | None = None

    def summary(self) -> dict[str, Any]:
        """For JSON; the times as ``median_ms`` and ``quartiles_ms`` of ``rounds``."""
        content = {name: value for name, value in vars(self).items() if name not in ("ms", "refused", "left_out")}
        for reason in ("refused", "left_out"):
            if getattr(self, reason) is not None:
                return {
                    name: content[name] for name in ("peer", "kind", "backend", "upstream", "state", "first_call_seconds")
                } | {reason: getattr(self, reason)}
        low, median, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        return content | {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(self.ms)}


@dataclass
class Turn:
    """A peer that is ready to be timed in one state."""

    peer: Peer
    result: Result
    timed: Timed
    passes: int = 1

    def seconds(self) -> float:
        with selected(self.peer):
            return self.timed.seconds(self.passes)


def measure(
    peers: Iterable[Peer],
    inputs: Inputs,
    draw: Callable[[int], Inputs],
    clock: Clock,
    budget: float,
    slow: dict[str, str],
    report: Callable[[str], None] = lambda doing: None,
    *,
    one_set: bool = False,
    one_by_one: bool = False,
) -> dict[str, Result]:
    """Check all peers, then time in rounds those that are right.

    In a round everybody has one turn of at least ``TURN_SECONDS``, so that what the machine does besides meets all alike. Who
    has used up an equal share of ``budget`` (seconds) drops out, after ``LEAST_ROUNDS`` at the earliest: slow peers do not
    take the rounds of the quick ones.

    ``one_by_one`` everybody has all of its turns in a row instead, as in a training, which calls one loss alone: it finds the
    memory that it has freed itself, and the machine may be another for the next.

    Args:
        peers: who takes part.
        inputs: what everybody is checked with.
        draw: more of them from a number, which is the seed.
        clock: how the device is timed.
        budget: seconds of timing.
        slow: modes of torch.compile that are not tried, with the reason; one that takes too long here is added.
        report: is told what is being done.
        one_set: there are no other inputs than the first, so that the caches are hot (a training step has a model of its own).
        one_by_one: see above.

    Returns:
        By name, and in all but the first state with that state: what came of it.
    """
    sets = [inputs]
    states = {"hot": 1} if one_set else states_of(clock, inputs.bytes)
    clock.begin()
    turns: list[Turn] = []
    results: dict[str, Result] = {}
    deadline = time.perf_counter() + MOST_ITEM_SECONDS
    for peer in peers:
        report(peer.name)
        first = Result(peer.name, peer.kind, peer.backend, peer.upstream, next(iter(states)))
        results[peer.name] = first
        if time.perf_counter() > deadline:
            first.left_out = f"the item's {MOST_ITEM_SECONDS:.0f} s were over"
            continue
        run = _admit(peer, first, inputs, clock, slow)
        for state, count in states.items():
            if run is None or (peer.upstream != 1 and state != first.state):
                break
            result = first if state == first.state else Result(**{**vars(first), "state": state, "ms": []})
            results[peer.name if result is first else f"{peer.name}, {state}"] = result
            with _refused(result), selected(peer):
                while len(sets) < count:
                    sets.append(draw(len(sets)))
                timed = clock.prepare(
                    [run, *(peer.bind(s) for s in sets[1:count])],
                    eager=peer.eager or (LARGE if inputs.bytes > MOST_CAPTURED_BYTES else None),
                    fill=len(states) > 1,
                )
                result.how, result.sets, result.calls = timed.how, count, timed.calls
                turns.append(turn := Turn(peer, result, timed))
                turn.passes = _passes(turn)
        run = None
        clock.release()
    running = [turn for turn in turns if turn.result.refused is None]
    level(running)
    report("rounds")
    for together in ([turn] for turn in running) if one_by_one else (running,):
        _rounds(together, budget / max(1, len(turns)))
    return results


def copy_bandwidth(clock: Clock) -> dict[str, Any]:
    """What a copy moves, in GB/s of what it reads and writes: the rate that everything else is a share of."""
    elements = min(clock.copy_bytes, int(clock.free_bytes() or 2**40) // 16) // 4
    # Not zeros, which cost a memory less to move.
    x = torch.rand(elements, device=clock.device)
    timed = clock.prepare([copy().bind(Inputs((x,), ()))], eager=None, fill=False)
    passes = math.ceil(TURN_SECONDS / timed.seconds(1))
    rates = [2e-9 * passes * x.nbytes / timed.seconds(passes) for _ in range(COPY_ROUNDS)]
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return {"bytes": x.nbytes, "gb_per_s": median, "quartiles": [low, high], "how": timed.how}


def _admit(peer: Peer, result: Result, inputs: Inputs, clock: Clock, slow: dict[str, str]) -> Callable[[], Tensors] | None:
    """The call that is to be timed; None where it is not, and ``result`` says why."""
    if peer.mode in slow:
        result.left_out = slow[peer.mode]
        return None
    with _refused(result), selected(peer):
        begin = time.perf_counter()
        run = peer.bind(inputs)
        found = run()
        clock.wait()
        result.first_call_seconds = time.perf_counter() - begin
        result.refused = peer.fault(inputs, found)
        del found
    if peer.mode is not None and result.first_call_seconds > MOST_FIRST_SECONDS:
        slow[peer.mode] = f"its first call at an earlier item took {result.first_call_seconds:.0f} s"
    if result.refused is not None:
        return None
    with _refused(result), selected(peer):
        begin = time.perf_counter()
        result.peak_bytes = clock.peak_bytes(run)
        seconds = time.perf_counter() - begin
        if seconds > MOST_CALL_SECONDS:
            result.left_out = f"a call took {seconds:.1f} s, {MOST_CALL_SECONDS:.0f} s are waited for"
            return None
        if inputs.bytes <= MOST_CAPTURED_BYTES:
            result.host_us = clock.host_us(run)
        return run
    return None


@contextlib.contextmanager
def _refused(result: Result) -> Iterator[None]:
    """An error inside is the result's, and everybody else goes on."""
    try:
        yield
    except Exception as error:
        result.refused = said(error)


def said(error: Exception) -> str:
    """Its kind and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def _passes(turn: Turn) -> int:
    """Warm up, and find how many passes a turn takes."""
    begin = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        seconds = turn.seconds()
        if time.perf_counter() - begin > WARM_UP_SECONDS:
            break
    while seconds < TURN_SECONDS:
        turn.passes *= 2
        seconds = turn.seconds()
    return turn.passes


def level(turns: Sequence[Turn]) -> None:
    """Peers that are about as quick take as many passes: the later calls of a turn find the caches warmer than the first."""
    most = [max(other.passes for other in turns if other.passes <= 2 * turn.passes) for turn in turns]
    for turn, passes in zip(turns, most, strict=True):
        turn.passes = passes
        turn.result.calls *= passes


def _rounds(running: Sequence[Turn], share: float) -> None:
    order = random.Random(0)
    timed, running = running, list(running)
    # What has survived the preparations is not searched for garbage again in the middle of a turn.
    gc.collect()
    gc.freeze()
    begin, before = time.perf_counter(), _others()
    try:
        while running:
            for turn in list(running):
                result = turn.result
                with _refused(result):
                    result.ms.append(1e3 * turn.seconds() / result.calls)
                enough = len(result.ms) >= LEAST_ROUNDS and sum(result.ms) * result.calls >= 1e3 * share
                if enough or result.refused is not None:
                    running.remove(turn)
            # Nobody always finds the caches and the heap as the same one leaves them.
            order.shuffle(running)
    finally:
        gc.unfreeze()
    if before is not None and timed:
        others = max(0.0, _others() - before) / (os.cpu_count() * (time.perf_counter() - begin))
        for turn in timed:
            turn.result.others = others


def _others() -> float | None:
    """CPU seconds that all other processes have spent, and a hypervisor has kept, since the machine started."""
    fields = environment.read("/proc/stat").partition("\n")[0].split()
    if not fields:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()
