"""From tensors to launches: which dimensions merge, how much a program takes, and the tickets of the last to arrive."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from ...spec import Noise
from .tiles import COMBINE_TILE

TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

WARPS = 4
# Left alone, the assembler aims for more blocks on a multiprocessor, and spills a register or two to get there.
REGISTERS = {
    "rsample_kl": 128, "rsample_kl_backward": 128, "elbo": 96, "gaussian_nll_backward": 96, "rescale": 96,
    "likelihood": 128, "posterior": 128, "posterior_backward": 128,
}  # fmt: skip
# Elements of a tile: 16 a thread, so at least two 16-byte loads of each tensor in flight; half of that, or a
# quarter, where arithmetic or addresses need more registers.
TILE = {"data": 2048, "latent": 2048, "likelihood": 1024, "posterior": 1024, "narrow": 512}
# (up to so many elements, tiles of a row that one program takes in turn): small work is spread, large work amortises.
STEPS = ((2**20, 1), (2**24, 2), (2**28, 8), (math.inf, 16))
RESCALE_BLOCK = 2048
RESCALE_PROGRAMS = 1024
COMBINE_WIDTH = COMBINE_TILE.value
# 16-byte accesses need this many elements of the least power-of-two tile.
SMALLEST_BLOCK = 16

WIDE_FROM = 2**31

# Shapes with their strides whose rows, and lengths whose plans, are kept: a training meets few, and to find them again would
# take as long as Triton's launch.
REMEMBERED = 1024

_T = TypeVar("_T")


def operation(function: Callable[..., _T]) -> Callable[..., _T]:
    """What is called with tensors as they are in memory: a negated view (of a conjugate's imaginary part) is made one.

    A compiler is kept out: traced, the launch code would make one graph's tickets everybody's.
    """

    @torch.compiler.disable
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> _T:
        return function(*map(_in_memory, args), **{name: _in_memory(value) for name, value in kwargs.items()})

    return run


def _in_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.resolve_neg() if value.is_neg() else value
    return value._replace(eps=_in_memory(value.eps)) if isinstance(value, Noise) and value.eps is not None else value


class Rows(NamedTuple):
    """Tensors of one shape (N, ...) seen as N rows.

    ``sizes`` are the row's dimensions that could not be merged, outermost first, and ``strides`` one tuple a tensor (None
    for None): the stride of the rows (of each leading dimension, where rows have several), then of each of ``sizes``.
    ``wide``: row numbers, column numbers or offsets within a row exceed 32 bits.
    """

    rows: int
    columns: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...] | None, ...]
    wide: bool = False


def as_rows(*tensors: Tensor | None, keep_order: bool, leading: int = 1) -> Rows:
    """Merge dimensions that are merged in memory for every tensor.

    Args:
        tensors: of one shape, at least the first not None.
        keep_order: columns must run in row-major order (the noise counts them); otherwise in that of the first's memory.
        leading: how many dimensions number the rows.
    """
    return _rows(tensors[0].shape, tuple(None if t is None else t.stride() for t in tensors), keep_order, leading)


@functools.lru_cache(REMEMBERED)
def _rows(shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...], keep_order: bool, leading: int) -> Rows:
    given = [s for s in strides if s is not None]
    dims = [d for d in range(leading, len(shape)) if shape[d] != 1]
    if not keep_order:
        dims.sort(key=strides[0].__getitem__, reverse=True)
    merged: list[list[int]] = []
    for d in dims:
        if merged and all(s[merged[-1][-1]] == s[d] * shape[d] for s in given):
            merged[-1].append(d)
        else:
            merged.append([d])
    sizes = tuple(math.prod(shape[d] for d in group) for group in merged) or (1,)
    steps = tuple(None if s is None else tuple(s[group[-1]] for group in merged) or (1,) for s in strides)
    rows, columns = math.prod(shape[:leading]), math.prod(sizes)
    extents = (sum((n - 1) * step for n, step in zip(sizes, s, strict=True)) for s in steps if s is not None)
    wide = max((rows, columns, *extents)) >= WIDE_FROM - 2 * max(TILE.values())
    merged_strides = tuple(None if s is None else (*s[:leading], *step) for s, step in zip(strides, steps, strict=True))
    return Rows(rows, columns, sizes, merged_strides, wide)


class Plan(NamedTuple):
    """How rows are shared out: ``row_block`` rows or ``steps`` tiles of ``block`` columns a program, ``chunks`` programs a row.

    ``even``: every tile is full.
    """

    row_block: int
    block: int
    steps: int
    chunks: int
    programs: int
    even: bool = False

    @property
    def split(self) -> bool:
        """Whether a row is shared by several programs."""
        return self.chunks > 1

    @property
    def width(self) -> int:
        """Tile width for adding up the ``chunks`` partial sums of a row."""
        return min(_power_of_two(self.chunks), COMBINE_WIDTH)


@functools.lru_cache(REMEMBERED)
def plan(kind: str, rows: int, columns: int, steps: int | None = None) -> Plan:
    """The one launch rule, a function of shape alone: results must not depend on the device. ``steps`` overrides its own."""
    block = max(min(_power_of_two(columns), TILE[kind]), SMALLEST_BLOCK)
    row_block = min(TILE[kind] // block, _power_of_two(rows))
    tiles = -(-columns // block)
    steps = min(steps or next(steps for limit, steps in STEPS if rows * columns <= limit), tiles)
    chunks = -(-tiles // steps)
    even = rows % row_block == 0 and columns % (block * steps) == 0
    return Plan(row_block, block, steps, chunks, -(-rows // row_block) * chunks, even)


@functools.cache
def options(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """Compiler options of a kernel that computes in ``dtype``; float64 takes what registers it needs."""
    return {"num_warps": WARPS} | ({} if dtype == torch.float64 else {"maxnreg": REGISTERS[kernel]})


class Tickets:
    """Zeroed counters, one for each launch that can be in flight; a kernel leaves its counter at zero.

    Launches on one stream follow one another and share one. So do those of one capture on one stream; another capture gets
    another, since its graph may be replayed beside anything else.
    """

    SLAB = 1024
    # Triton compiles a kernel anew for a pointer that is aligned to this many bytes and for one that is not, and what is
    # compiled during a capture cannot be loaded: counters are all aligned.
    ALIGNMENT = 16

    def __init__(self) -> None:
        self._taken: dict[tuple[torch.device, int, int], Tensor] = {}
        self._fresh: dict[torch.device, list[Tensor]] = {}

    def take(self, device: torch.device) -> Tensor:
        """The counter for a launch on ``device``, which is the current one."""
        if device.type != "cuda":
            # Interpreted, a launch that raised would leave its counter where it stopped.
            return torch.zeros((), dtype=torch.int32, device=device)
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        capture = _capture(stream) if torch.cuda.is_current_stream_capturing() else 0
        key = (device, stream, capture)
        if key not in self._taken:
            if not self._fresh.get(device):
                if capture:
                    # Even zeroing is captured: a slab that ran out costs the graph a memset.
                    return torch.zeros((), dtype=torch.int32, device=device)
                # By another thread, since what this one allocates torch may be told to take from the memory of its graphs.
                with ThreadPoolExecutor(1) as pool:
                    self._fresh[device] = pool.submit(self._slab, device).result()
            self._taken[key] = self._fresh[device].pop()
        return self._taken[key]

    @classmethod
    def _slab(cls, device: torch.device) -> list[Tensor]:
        dtype = torch.int32
        slab = torch.zeros((cls.SLAB, cls.ALIGNMENT // dtype.itemsize), dtype=dtype, device=device)
        if device.type == "cuda":
            # Once in so many tickets: other streams may be handed these before this one has come to zero them.
            torch.cuda.current_stream(device).synchronize()
        return list(slab[:, 0].unbind())


def _capture(stream: int) -> int:
    """The number of the capture that a stream is part of, unique in the process."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    # CUDA Driver API, "Stream Management"; this version is in all drivers from 11.3 on.
    error = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo_v2: CUDA error {error}")
    return number.value


tickets = Tickets()


class Stream:
    """The noise arguments of the latent kernels, for ``samples`` samples of the rows.

    ``single``: samples start at different places of a noise block, so that no tile suits all of them.
    """

    def __init__(self, noise: Noise | None, rows: Rows, mu: Tensor, samples: int = 1) -> None:
        self.seed = None if noise is None else noise.seed
        first_index, offset = (0, 0) if noise is None else (noise.first_index, noise.offset)
        per_sample = self.seed is not None and self.seed.dim() == 1
        sample = rows.columns if per_sample else rows.rows * rows.columns
        self.single = self.seed is not None and samples > 1 and sample % reference.LANES != 0
        aligned = (
            self.seed is None
            or self.single
            or (first_index % reference.LANES == 0 and (per_sample or rows.rows == 1 or rows.columns % reference.LANES == 0))
        )
        self.numbers = (self.seed.stride(0) if per_sample else 0, *_words(first_index), *_words(offset))
        self.shift = 0 if aligned else reference.LANES - 1
        self.constants: dict[str, Any] = {
            "PACK": 8 if mu.element_size() == 2 else reference.LANES,
            "WIDE_NOISE": (first_index + samples * sample) // reference.LANES >= 2**32,
            "SEED_PER_SAMPLE": per_sample,
            "ALIGNED": aligned,
        }


def as_argument(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A number for a kernel: Triton passes a float as float32, so float64 goes by way of memory."""
    if isinstance(value, Tensor) or dtype == torch.float32:
        return value
    return torch.full((), value, dtype=dtype, device=device)


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


def _words(value: int) -> tuple[int, int]:
    """The halves of 64 bits as signed ints: the interpreter misreads an int that needs the 32nd bit for its value."""
    low, high = value % 2**32, value >> 32
    return low - 2**32 * (low >= 2**31), high - 2**32 * (high >= 2**31)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
