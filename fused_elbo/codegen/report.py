"""One row a kernel, dtype and GPU: what the machine code says, the floor beside it, and the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from . import budgets, sass
from .hardware import GPUS

# Elements of a thread's turn, from what it costs.
Count = Callable[[sass.Turn], float]

COLUMNS = ("registers", "spills", "local", "widths", "bytes", "instructions", "budget", "floor")


class Row(NamedTuple):
    """What the machine code of a loop over tensors says, with its kernel's registers and memory.

    Attributes:
        compiler: "triton" or "nvcc".
        kernel, dtype, architecture: which, for which GPU (90 is sm_90).
        registers: of a thread.
        spilled: instructions that access local memory.
        local: bytes of local memory of a thread.
        widths: of the loop's global accesses, in bits; empty where the kernel goes by the element and has no such loop.
        bytes: that an element moves in 16-byte accesses.
        instructions: an element, of the loop (``sass`` says how they are counted). None where there is no such loop.
    """

    compiler: str
    kernel: str
    dtype: str
    architecture: int
    registers: int
    spilled: int
    local: int
    widths: tuple[int, ...] = ()
    bytes: float = 0.0
    instructions: float | None = None

    @property
    def floor(self) -> float:
        """Instructions an element that fit beside its bytes."""
        return GPUS[self.architecture].floor(self.bytes)

    @property
    def bound(self) -> str:
        """Which of the two takes longer. Float64 has no verdict: its instructions are not issued one a clock."""
        if self.instructions is None or "float64" in self.dtype:
            return "-"
        return "memory" if self.instructions <= self.floor else "issue"

    @property
    def clean(self) -> bool:
        """No spills, no local memory, and no accesses of less than 16 bytes but those that the kernel may have."""
        whole = set(self.widths) <= {sass.WIDEST} or budgets.may_access_narrower(self.compiler, self.kernel)
        return self.spilled == 0 and self.local == 0 and whole

    def record(self, version: str) -> dict[str, Any]:
        """All of it for JSON, with the budget and what is over it when compiled by ``version``."""
        limit = budgets.limit(self.compiler, version, self.kernel, self.dtype, self.architecture)
        return {
            **self._asdict(),
            "floor": self.floor if self.instructions is not None else None,
            "bound": self.bound,
            "clean": self.clean,
            "budget": None if limit is None else limit._asdict(),
            "over": list(over(self, limit)),
        }


def rows_of(
    compiler: str,
    kernel: str,
    dtype: str,
    architecture: int,
    function: sass.Function,
    loops: Sequence[tuple[str, Count]],
    found: Sequence[sass.Loop],
) -> Iterator[Row]:
    """The rows of a kernel.

    Args:
        compiler, kernel, dtype, architecture: as ``Row``'s.
        function: its machine code.
        loops: for each loop over tensors, from the one with the fewest instructions on, what is added to the kernel's name, and
            how many elements a thread takes in a turn. Empty for a kernel that goes by the element.
        found: those loops in the code.

    Raises:
        ValueError: the code has another number of loops.
    """
    common = (function.registers, function.spilled, function.local_bytes)
    if len(found) != len(loops):
        raise ValueError(f"{kernel} {dtype} sm_{architecture}: got {len(found)} loops over tensors, takes {len(loops)}")
    if not found:
        yield Row(compiler, kernel, dtype, architecture, *common)
    for loop, (part, count) in zip(sorted(found, key=lambda loop: loop.turn.instructions), loops, strict=True):
        elements = count(loop.turn)
        yield Row(
            compiler, kernel + part, dtype, architecture, *common,
            tuple(sorted(set(loop.widths))), loop.turn.wide / elements, loop.turn.instructions / elements,
        )  # fmt: skip


def takes(elements: float) -> Count:
    """A thread takes so many elements in a turn."""
    return lambda turn: elements


def moves(bytes_per_element: int) -> Count:
    """An element moves so many bytes; a thread takes a power of two of them in a turn."""

    def count(turn: sass.Turn) -> float:
        elements = turn.wide / bytes_per_element
        if elements < 1 or not math.log2(elements).is_integer():
            raise ValueError(f"a turn moves {turn.wide} bytes in 16-byte accesses, takes a power of two of {bytes_per_element}")
        return elements

    return count


def over(row: Row, limit: budgets.Limit | None) -> Iterator[str]:
    """What a row exceeds, in words."""
    if not row.clean:
        yield f"{row.spilled} spills, {row.local} bytes of local memory, accesses of {'/'.join(map(str, row.widths))} bits"
    if limit is None:
        yield "no budget: python -m fused_elbo.codegen --propose prints one"
        return
    if row.bytes != limit.bytes:
        yield f"{row.bytes:g} bytes an element in 16-byte accesses, not {limit.bytes:g}"
    if row.registers > limit.registers:
        yield f"{row.registers} registers, over {limit.registers}"
    if (row.instructions or 0.0) > limit.instructions:
        yield f"{row.instructions:.1f} instructions an element, over {limit.instructions:.1f}"


def header() -> str:
    return f"{'compiler':<9}{'kernel':<44}{'dtype':<30}{'target':<7}" + "".join(f"{c:>13}" for c in COLUMNS) + "  bound by"


def line(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    loop, budget = record["instructions"] is not None, record["budget"]
    widths = "/".join(map(str, record["widths"]))
    cells = (
        record["registers"], record["spilled"], record["local"], widths or "-", f"{record['bytes']:g}" if loop else "-",
        f"{record['instructions']:.1f}" if loop else "-", f"{budget['instructions']:.1f}" if loop and budget else "-",
        f"{record['floor']:.1f}" if loop else "-",
    )  # fmt: skip
    verdict = "ok" if not record["over"] else "OVER: " + "; ".join(record["over"])
    name = f"{record['compiler']:<9}{record['kernel']:<44}{record['dtype']:<30}sm_{record['architecture']:<4}"
    return name + "".join(f"{cell:>13}" for cell in cells) + f"  {record['bound']:<8}{verdict}"
