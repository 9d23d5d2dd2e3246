"""Single calls of the library for developers: ``make microbench`` stores a run, and compares it with the one before.

On a GPU the timer is an event on the stream that is waited for, so that a call's time is the device's from the call before it
to its own end; on a CPU it is the wall clock. ``python -m fused_elbo bench`` compares with other libraries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from fused_elbo.bench import cuda_clock, peers, work
from fused_elbo.bench.items import Item, items
from fused_elbo.bench.options import DTYPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What is larger is bound by memory, and changes little from one commit to the next.
MOST_ELEMENTS = 2**22

pytestmark = pytest.mark.benchmark(timer=cuda_clock.EventTimer() if DEVICE.type == "cuda" else time.perf_counter)


def cases() -> Iterator[object]:
    runnable = [name for name, reason in peers.backends(DEVICE.type).items() if reason is None]
    fast = [name for name in runnable if name != peers.SPECIFICATION] or runnable
    for item in items(DEVICE.type):
        if item.stage not in work.STAGES or max(item.elements) > MOST_ELEMENTS:
            continue
        for name, dtype in DTYPES.items():
            if name != "float64":
                for backend in fast:
                    yield pytest.param(item, dtype, backend, id=f"{item.name}-{name}-{backend}")


@pytest.mark.parametrize(("item", "dtype", "backend"), list(cases()))
def test_call(benchmark, item: Item, dtype: torch.dtype, backend: str):
    inputs = work.draw(item, dtype, DEVICE)
    peer = next(iter(peers.peers(item, dtype, DEVICE, [backend], {})))
    run = peer.bind(inputs)
    benchmark.group = f"{item.name}, {dtype}"
    with peers.selected(peer):
        assert peer.fault(inputs, run()) is None
        benchmark(run)
