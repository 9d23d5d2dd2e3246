"""Launches: what all have in common, wherever they come from, and how they are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from .machine import Machine
from .memory import Global, Region
from .program import Program
from .units import Error, Values

# 80, 90 or 100, which kernels are compiled to other instructions for.
ARCHITECTURE_VARIABLE = "FUSED_ELBO_PTX_SM"


class Launch(NamedTuple):
    """What a launch did: its kernel's name, and the bytes that its threads read, wrote and, by sectors, moved."""

    kernel: str
    read: int
    written: int
    moved: int


@dataclasses.dataclass
class Settings:
    """How launches are run, and what they did.

    Attributes:
        error: of the special-function unit.
        edit: what is done to a kernel's text before it is run.
        order: of the blocks of a grid.
        together: threads that run at a time; more take less time and more memory.
        launches: in their order.
    """

    error: Error = Error.NONE
    edit: Callable[[str], str] = str
    order: Callable[[Values], Values] = np.asarray
    together: int = 2**14
    launches: list[Launch] = dataclasses.field(default_factory=list)


settings = Settings()


def run(
    name: str, program: Program, grid: tuple[int, ...], threads: int, arguments: bytes, regions: Iterable[Region],
    variables: dict[str, Region], shared: int = 0,
) -> None:  # fmt: skip
    """One launch; ``shared`` bytes of shared memory are brought along."""
    memory = Global(regions)
    blocks = settings.order(np.arange(int(np.prod(grid))))
    together = max(1, settings.together // threads)
    for first in range(0, len(blocks), together):
        some = blocks[first : first + together]
        Machine(program, some, grid, threads, arguments, memory, variables, shared, settings.error).run()
    settings.launches.append(Launch(name, memory.read, memory.written, memory.moved))
