"""The counters by which Triton programs see who is last, on a GPU that is not there."""

from __future__ import annotations

import types

import pytest
import torch

launch = pytest.importorskip("fused_elbo.backends.triton.launch")

GPU = torch.device("cuda", 0)


class FakeCuda:
    """One stream at a time, which is captured where ``capture`` is the number of a capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capture, self.slabs = 1, 0, 0
        driver = types.SimpleNamespace(get_current_stream=lambda device: self.stream)
        monkeypatch.setattr(launch.triton.runtime.driver, "_active", driver)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capture != 0)
        monkeypatch.setattr(launch, "_capture", lambda stream: self.capture)
        monkeypatch.setattr(launch.Tickets, "_slab", self._slab)
        self.tickets = launch.Tickets()

    def _slab(self, device: torch.device) -> list[object]:
        self.slabs += 1
        return [object() for _ in range(launch.Tickets.SLAB)]

    def take(self, stream: int = 1, capture: int = 0) -> object:
        self.stream, self.capture = stream, capture
        return self.tickets.take(GPU)


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_who_may_run_at_once_has_another_ticket(fake):
    launches = [(stream, capture) for capture in (0, 5, 6) for stream in (1, 2)]
    taken = [fake.take(*launch) for launch in launches]
    assert len(set(map(id, taken))) == len(launches)
    assert [fake.take(*launch) for launch in launches] == taken
    assert fake.slabs == 1


def test_a_slab_that_ran_out(fake, monkeypatch):
    monkeypatch.setattr(launch.Tickets, "SLAB", 2)
    eager = fake.take()
    fake.take(capture=1)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: options["device"])
    assert fake.take(capture=2) is GPU
    assert fake.take() is eager
    fake.take(stream=2)
    assert fake.slabs == 2


def test_tickets_are_of_one_kind_to_the_compiler():
    """A kernel that is compiled anew during a capture cannot be loaded there."""
    slab = launch.Tickets._slab(torch.device("cpu"))
    assert len({t.data_ptr() for t in slab}) == launch.Tickets.SLAB
    assert all(t.data_ptr() % 16 == 0 and t.shape == () and t.dtype == torch.int32 and t == 0 for t in slab)
