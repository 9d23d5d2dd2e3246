"""How a call is timed on a GPU: by the device's own events, around replays of a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import cuda

from .clock import Timed, first_line

# A graph is made of at least so many calls, where they are short: between two graphs the device waits some microseconds.
LEAST_CALLS = 16
# For the host's time: so few that not even eager PyTorch's kernels fill the queue, where the host would have to wait.
HOST_CALLS = 10
HOST_ROUNDS = 5

# https://docs.nvidia.com/deploy/nvidia-smi/ lists them under --help-query-gpu.
QUERIED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")
QUERIED_ONCE = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


class CudaClock:
    """Device time, from the first kernel's start to the last one's end.

    Calls are captured in a CUDA graph, one after the other with the results of each kept where inputs rotate, so that the
    host's time is left out and outputs rotate too. All graphs of an item share one pool of memory, which is right since nobody
    reads what they leave (pytorch/pytorch#166975). A call that cannot be captured runs eagerly between two events, and ``how``
    says so.
    """

    states = ("cold", "hot")
    copy_bytes = 2**30

    def __init__(self) -> None:
        self.device = torch.device("cuda", cuda.current_device())
        self.properties = cuda.get_device_properties(self.device)
        self.cache_bytes = self.properties.L2_cache_size
        self.pool = None
        # One stream for all: a backward runs on its forward's, and a graph is captured from one only.
        self.stream = cuda.Stream()
        # A capture that failed may leave torch's generator in the middle of it: then nothing is captured any more.
        self.broken: str | None = None

    def prepare(self, runs: Sequence[Callable[[], Any]], *, eager: str | None, fill: bool) -> Timed:
        for run in runs:
            run()
        self.wait()
        rotating = len(runs) > 1
        if fill:
            runs = list(runs) * math.ceil(LEAST_CALLS / len(runs))
        reason = eager or self._uncapturable(runs[0])
        if reason is None:
            graph = cuda.CUDAGraph()
            try:
                with _no_garbage(), cuda.graph(graph, pool=self.pool, stream=self.stream):
                    results = []
                    for run in runs:
                        result = run()
                        if rotating:
                            results.append(result)
                    result = None
                    results.clear()
            except RuntimeError as error:
                reason = self.broken = f"an earlier capture failed: {first_line(error)}"
            else:
                # It knows addresses alone: what lies there, the calls hold.
                graph.calls_held = runs
                return Timed(lambda passes: self._between(graph.replay, passes), len(runs), "events around replays of a graph")

        def eagerly() -> None:
            for run in runs:
                run()

        return Timed(lambda passes: self._between(eagerly, passes), len(runs), f"events around eager calls: {reason}")

    def running(self) -> contextlib.AbstractContextManager:
        return cuda.stream(self.stream)

    def begin(self) -> None:
        # A pool that all graphs have left must not be taken up again.
        self.pool = cuda.graph_pool_handle()

    def wait(self) -> None:
        cuda.synchronize()

    def host_us(self, run: Callable[[], Any]) -> float:
        times = []
        for _ in range(HOST_ROUNDS):
            self.wait()
            begin = time.perf_counter()
            for _ in range(HOST_CALLS):
                run()
            times.append(1e6 * (time.perf_counter() - begin) / HOST_CALLS)
        self.wait()
        return statistics.median(times)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        self.wait()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        results = run()
        self.wait()
        peak = cuda.max_memory_allocated() - before
        del results
        return peak

    def free_bytes(self) -> int:
        return cuda.mem_get_info()[0] + cuda.memory_reserved() - cuda.memory_allocated()

    def release(self) -> None:
        self.wait()
        cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        p = self.properties
        return {
            "name": p.name,
            "architecture": f"sm_{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "cache_bytes": self.cache_bytes,
            "cuda": torch.version.cuda,
            "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
            **self._query(QUERIED_ONCE),
        }

    def conditions(self) -> dict[str, Any]:
        return self._query(QUERIED)

    def _between(self, launch: Callable[[], Any], passes: int) -> float:
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(passes):
            launch()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    def _uncapturable(self, run: Callable[[], Any]) -> str | None:
        """Why a call cannot be captured, asked without a capture: it waits for the device."""
        if self.broken is not None:
            return self.broken
        before = cuda.get_sync_debug_mode()
        cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            return first_line(error)
        finally:
            cuda.set_sync_debug_mode(before)
        return None

    def _query(self, fields: Sequence[str]) -> dict[str, str]:
        """What nvidia-smi says of this device; nothing where it is not to be had."""
        program = shutil.which("nvidia-smi")
        if program is None:
            return {}
        command = [program, f"--id=GPU-{self.properties.uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"nvidia-smi": (done.stdout + done.stderr).strip()}
        return dict(zip(fields, (value.strip() for value in done.stdout.strip().split(",")), strict=False))


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Inside, no garbage is collected: to free what it holds (a kernel, say) may be what a capture forbids."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class EventTimer:
    """Seconds that the device has passed so far, for whoever takes the difference of two calls as the time between.

    Each call marks the stream with an event, waits for it and adds what lies between it and the last one, so that the time
    is the device's own, and as precise late in a long run as early.
    """

    def __init__(self) -> None:
        self.passed = 0.0
        self.last = self._mark()

    def __call__(self) -> float:
        event = self._mark()
        self.passed += 1e-3 * self.last.elapsed_time(event)
        self.last = event
        return self.passed

    def _mark(self) -> cuda.Event:
        event = cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event
