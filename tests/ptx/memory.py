"""What a kernel may touch: tensors' memory at its real addresses, and a block's shared memory. Every access is checked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from .units import UNSIGNED, Values

# Of a byte that nobody has written to, or read; and that several warps have read.
NOBODY, SEVERAL = -1, -2
# Bytes that a GPU's memory is read and written by.
SECTOR = 32


class Region(NamedTuple):
    """Bytes that may be read and written."""

    start: int
    size: int


class Fault(RuntimeError):
    """What a GPU, or a checker of its memory, would have stopped at."""


class Global:
    """The memory that a launch was given.

    A block sees what another has written in the same launch only past its first cache, and only after an atomic operation.

    Attributes:
        read, written: bytes, by all threads.
        moved: bytes of the sectors of ``SECTOR`` that each warp's instructions touch: what they read and wrote, and what they
            did not ask for beside it.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        found = sorted({r for r in regions if r.size})
        self.starts, self.sizes = np.array(found, dtype="u8").reshape(-1, 2).T
        self.bytes = [_bytes(int(s), int(n)) for s, n in zip(self.starts, self.sizes, strict=True)]
        self.writers = [np.full(int(n), NOBODY, dtype="i4") for n in self.sizes]
        self.read = self.written = self.moved = 0

    def load(
        self, addresses: Values, bits: int, count: int, blocks: Values, warps: Values, synchronised: Values, *, cached: bool
    ) -> Values:
        """(threads, count) numbers; ``synchronised`` blocks have passed an atomic operation."""
        found = np.empty((len(addresses), count), dtype=UNSIGNED[bits])
        for k, chosen in self._regions(addresses, bits, count):
            places = self._places(k, addresses[chosen], bits * count // 8)
            if (self._strange(k, places, blocks[chosen]) & (cached | ~synchronised[chosen][:, None])).any():
                raise Fault(f"a block reads what another has written, {'through its own cache' if cached else 'unordered'}")
            found[chosen] = self.bytes[k][places].view(UNSIGNED[bits])
        self.read += found.nbytes
        self.moved += _moved(addresses, warps)
        return found

    def store(self, addresses: Values, numbers: Values, blocks: Values, warps: Values, synchronised: Values) -> None:
        """``numbers`` (threads, count)."""
        count, bits = numbers.shape[1], 8 * numbers.itemsize
        for k, chosen in self._regions(addresses, bits, count):
            places, own = self._places(k, addresses[chosen], bits * count // 8), blocks[chosen]
            unordered = self._strange(k, places, own) & ~synchronised[chosen][:, None]
            self.bytes[k][places] = np.ascontiguousarray(numbers[chosen]).view("u1")
            self.writers[k][places] = own[:, None]
            # Of several that write at once one is in the books.
            if (unordered | self._strange(k, places, own)).any():
                raise Fault("a block writes over what another has written, unordered")
        self.written += numbers.nbytes
        self.moved += _moved(addresses, warps)

    def _regions(self, addresses: Values, bits: int, count: int) -> list[tuple[int, Values | slice]]:
        if not len(addresses):
            return []
        size = np.uint64(bits * count // 8)
        if (addresses % size).any():
            raise Fault(f"misaligned: {size} bytes at {int(addresses[addresses % size != 0][0]):#x}")
        region = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (region >= 0) & (addresses + size <= self.starts[region] + self.sizes[region])
        if not inside.all():
            raise Fault(f"out of bounds: {size} bytes at {int(addresses[~inside][0]):#x}, {(~inside).sum()} threads")
        if (region == region[0]).all():
            return [(int(region[0]), slice(None))]
        return [(int(k), region == k) for k in np.unique(region)]

    def _strange(self, region: int, places: Values, blocks: Values) -> Values:
        """Whether another block has written there."""
        writers = self.writers[region][places]
        return (writers != NOBODY) & (writers != blocks[:, None])

    def _places(self, region: int, addresses: Values, size: int) -> Values:
        return (addresses - self.starts[region])[:, None] + np.arange(size, dtype="u8")


class Shared:
    """The shared memory of ``blocks`` blocks. Between two barriers a byte belongs to one warp, or is only read."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        # No number that anybody would have put there.
        self.bytes = np.full(blocks * size, 0xA5, dtype="u1")
        self.writer, self.reader = (np.full(blocks * size, NOBODY, dtype="i4") for _ in range(2))

    def synchronise(self, block: int) -> None:
        self.writer[block * self.size : (block + 1) * self.size] = NOBODY
        self.reader[block * self.size : (block + 1) * self.size] = NOBODY

    def load(self, addresses: Values, bits: int, count: int, blocks: Values, warps: Values) -> Values:
        places = self._places(addresses, bits * count // 8, blocks)
        self._race((self.writer,), places, warps)
        own, before = warps[:, None], self.reader[places]
        self.reader[places] = np.where((before == NOBODY) | (before == own), own, SEVERAL)
        # Of several that read at once one is in the books.
        self.reader[places[self.reader[places] != own]] = SEVERAL
        return self.bytes[places].view(UNSIGNED[bits])

    def store(self, addresses: Values, numbers: Values, blocks: Values, warps: Values) -> None:
        places = self._places(addresses, numbers[0].nbytes if len(numbers) else 0, blocks)
        self._race((self.writer, self.reader), places, warps)
        self.writer[places] = warps[:, None]
        self.bytes[places] = np.ascontiguousarray(numbers).view("u1")

    def _places(self, addresses: Values, size: int, blocks: Values) -> Values:
        if (addresses % max(1, size)).any():
            raise Fault(f"misaligned: {size} bytes of shared memory")
        if len(addresses) and int(addresses.max()) + size > self.size:
            raise Fault(f"out of bounds: byte {int(addresses.max())} of {self.size} of shared memory")
        return (blocks * self.size + addresses.astype("i8"))[:, None] + np.arange(size)

    def _race(self, owners: tuple[Values, ...], places: Values, warps: Values) -> None:
        for owner in owners:
            if ((owner[places] != NOBODY) & (owner[places] != warps[:, None])).any():
                raise Fault("two warps share a byte of shared memory without a barrier between them")


def _bytes(start: int, size: int) -> Values:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(start), dtype="u1")


def _moved(addresses: Values, warps: Values) -> int:
    # An access is aligned to its size, which is no more than a sector's.
    return SECTOR * len(np.unique(np.stack((warps.astype("u8"), addresses // np.uint64(SECTOR)), axis=1), axis=0))


def regions_of(value: object) -> Iterator[Region]:
    """The memory of the tensors among a launch's arguments, tuples looked into."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield Region(storage.data_ptr(), storage.nbytes())
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from regions_of(v)
