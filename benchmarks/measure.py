"""How it is timed: nobody who has not shown right numbers, and everybody in turn."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fused_elbo as fe

from .work import Peer

# Largest error of a value or gradient, as a share of the largest exact one of its tensor: wide enough for the sums and
# cancellations of plain PyTorch in that dtype, which are not judged here.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Deviation of the noise's mean and mean square from 0 and 1, in units of the latter's standard error.
NOISE_BOUND = 6.0

TURN_SECONDS = 2e-3
WARM_UP_CALLS = 5
WARM_UP_SECONDS = 1.0
LEAST_ROUNDS = 3


@dataclass
class Result:
    """What came of one peer: times in ``ms`` a call, one for each round of ``calls``; or why it was ``refused``.

    ``others`` is the share of the machine's CPU time that other processes took meanwhile; None where the system does not say.
    """

    kind: str
    backend: str | None
    first_call_seconds: float = 0.0
    refused: str | None = None
    calls: int = 1
    ms: list[float] = field(default_factory=list)
    others: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def summary(self) -> dict[str, object]:
        """For JSON: ``median_ms``, ``quartiles_ms``, ``rounds`` of ``calls`` each, ``others``; or ``refused``."""
        content = {"kind": self.kind, "backend": self.backend, "first_call_seconds": self.first_call_seconds}
        if self.refused is not None:
            return {**content, "refused": self.refused}
        low, median, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        content |= {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(self.ms), "calls": self.calls}
        return content | {"others": self.others}


def measure(peers: Sequence[Peer], dtype: torch.dtype, budget: float) -> dict[str, Result]:
    """Check all peers, then time in rounds those that are right.

    In a round everybody has one turn of at least ``TURN_SECONDS``, so that what the machine does besides meets all alike. Who
    has used up an equal share of ``budget`` (seconds) drops out, after ``LEAST_ROUNDS`` at the earliest: slow peers do not
    take the rounds of the quick ones.
    """
    results = {peer.name: _checked(peer, BOUNDS[dtype]) for peer in peers}
    running = [peer for peer in peers if results[peer.name].refused is None]
    for peer in running:
        results[peer.name].calls = _calls(peer)
    share = budget / len(peers)
    order = random.Random(0)
    # What has survived the preparations is not searched for garbage again in the middle of a turn.
    gc.collect()
    gc.freeze()
    timed, begin, before = list(running), time.perf_counter(), _others()
    while running:
        for peer in list(running):
            result = results[peer.name]
            result.ms.append(1e3 * _seconds(peer, result.calls) / result.calls)
            if len(result.ms) >= LEAST_ROUNDS and sum(result.ms) * result.calls >= 1e3 * share:
                running.remove(peer)
        # Nobody always finds the caches and the heap as the same one leaves them.
        order.shuffle(running)
    gc.unfreeze()
    if before is not None:
        others = max(0.0, _others() - before) / (os.cpu_count() * (time.perf_counter() - begin))
        for peer in timed:
            results[peer.name].others = others
    return results


def _checked(peer: Peer, bound: float) -> Result:
    result = Result(peer.kind, peer.backend)
    begin = time.perf_counter()
    try:
        with _selected(peer):
            found = peer.run()
        result.first_call_seconds = time.perf_counter() - begin
        result.refused = _fault(found, *peer.expected(found), bound)
    except Exception as error:
        result.refused = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return result


def _fault(found: Sequence[Tensor], exact: Sequence[Tensor], noise: Tensor | None, bound: float) -> str | None:
    """What is wrong with ``found``, values and then gradients, beside the same in float64; None if nothing is."""
    for index, (ours, right) in enumerate(zip(found, exact, strict=True)):
        if ours.shape != right.shape:
            return f"result {index} has shape {tuple(ours.shape)}, not {tuple(right.shape)}"
        right = right.detach()
        error = float((ours.detach().double() - right).abs().max() / right.abs().max())
        if not error <= bound:
            return f"result {index} is off by {error:.1e} of its largest, {bound:.0e} is allowed"
    if noise is not None:
        error = max(abs(float(noise.mean())), abs(float(noise.square().mean()) - 1)) / math.sqrt(2 / noise.numel())
        if not error <= NOISE_BOUND:
            return f"the noise is not standard normal: off by {error:.1f} standard errors, {NOISE_BOUND:.0f} are allowed"
    return None


def _calls(peer: Peer) -> int:
    """Warm up, and find how many calls a turn takes."""
    begin = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        _seconds(peer, 1)
        if time.perf_counter() - begin > WARM_UP_SECONDS:
            break
    calls = 1
    while _seconds(peer, calls) < TURN_SECONDS:
        calls *= 2
    return calls


def _seconds(peer: Peer, calls: int) -> float:
    with _selected(peer):
        begin = time.perf_counter()
        for _ in range(calls):
            peer.run()
        return time.perf_counter() - begin


def _others() -> float | None:
    """CPU seconds that all other processes have spent, and a hypervisor has kept, since the machine started."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _selected(peer: Peer) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if peer.backend is None else fe.backend(peer.backend)
