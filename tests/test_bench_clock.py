"""The clock of a GPU, on a device that is not there."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref

import pytest
import torch

from fused_elbo.bench import cuda_clock


class FakeCuda(types.SimpleNamespace):
    """A device on which every call takes 1 ms. ``refuses``: "sync" (calls that wait), "capture" (nothing can be captured)."""

    def __init__(self, refuses: str = "") -> None:
        self.clock, self.kept, self.mode, self.captured = 0.0, 0, 0, None
        self.refuses = refuses
        self.CUDAGraph = lambda: types.SimpleNamespace(calls=0)
        properties = types.SimpleNamespace(name="fake", L2_cache_size=1000)
        super().__init__(
            Event=self._event,
            Stream=lambda: "side",
            stream=lambda stream: contextlib.nullcontext(),
            current_device=lambda: 0,
            get_device_properties=lambda device: properties,
            graph_pool_handle=lambda: "pool",
            synchronize=lambda: None,
            get_sync_debug_mode=lambda: self.mode,
            set_sync_debug_mode=lambda mode: setattr(self, "mode", mode),
        )

    def call(self):
        if self.mode == "error" and self.refuses == "sync":
            raise RuntimeError("called a synchronizing operation\nat some place")
        if self.captured is None:
            self.clock += 1.0
        else:
            self.captured.calls += 1

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        assert (pool, stream) == ("pool", "side")
        if self.refuses == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        assert not gc.isenabled()
        self.captured = graph
        graph.replay = lambda: setattr(self, "clock", self.clock + graph.calls)
        yield
        self.captured = None

    def _event(self, enable_timing):
        assert enable_timing
        event = types.SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.clock)
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """Its addresses would be somebody else's by the time that it is replayed."""
    fake = FakeCuda()
    monkeypatch.setattr(cuda_clock, "cuda", fake)
    device = cuda_clock.CudaClock()
    device.begin()
    operand = torch.zeros(1)
    seen = weakref.ref(operand)
    timed = device.prepare([lambda operand=operand: fake.call()], eager=None, fill=True)
    del operand
    gc.collect()
    assert seen() is not None
    assert "replays of a graph" in timed.how
    del timed
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("refuses", "eager", "how"),
    [
        ("", None, "replays of a graph"),
        ("", "so large", "eager calls: so large"),
        ("sync", None, "eager calls: called a synchronizing operation"),
        ("capture", None, "eager calls: an earlier capture failed: operation not permitted"),
    ],
)
@pytest.mark.parametrize(("runs", "fill", "calls"), [(1, False, 1), (1, True, 16), (5, True, 20)])
def test_the_clock_of_a_gpu_divides_by_all_calls(monkeypatch, refuses, eager, how, runs, fill, calls):
    fake = FakeCuda(refuses)
    monkeypatch.setattr(cuda_clock, "cuda", fake)
    device = cuda_clock.CudaClock()
    device.begin()
    timed = device.prepare([fake.call] * runs, eager=eager, fill=fill)
    assert timed.calls == calls
    assert how in timed.how
    assert timed.seconds(3) == pytest.approx(3 * calls * 1e-3)
    assert fake.mode == 0
    assert gc.isenabled()
    assert (device.broken is not None) == (refuses == "capture")


def test_the_timer_of_a_gpu_is_as_precise_after_an_hour(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda_clock, "cuda", fake)
    timer = cuda_clock.EventTimer()
    fake.clock += 3.6e6
    begin = timer()
    fake.call()
    assert timer() - begin == pytest.approx(1e-3, rel=1e-6)
