"""In place of a GPU: Triton compiles a launch for one, and the machine runs it on tensors on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import triton
from triton.runtime.jit import JITFunction

from fused_elbo.backends import triton as backend
from fused_elbo.codegen.hardware import LANES_PER_WARP
from fused_elbo.codegen.triton_kernels import Driver

from .machine import Machine
from .memory import Global, tensors_in
from .program import Program, parse
from .units import Error, Values

ARCHITECTURE = 90


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


def install() -> None:
    """From here on every launch of a Triton kernel is run by the machine."""
    triton.runtime.driver.set_active(Driver(ARCHITECTURE))
    compile_ = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_(self, *args, grid=grid, warmup=True, **options)
        if not warmup:
            names = [p.name for p in self.params]
            given = dict(zip(names, args, strict=False)) | {n: v for n, v in options.items() if n in names}
            execute(kernel, given, grid)
        return kernel

    JITFunction.run = run
    backend.unavailable = lambda device_type: None if device_type == "cpu" else f"the machine is not for {device_type!r}"


def execute(kernel: Any, given: dict[str, Any], grid: tuple[int, ...]) -> None:
    program = _program(settings.edit(kernel.asm["ptx"]))
    signature = kernel.src.signature
    arguments = [word for name, kind in signature.items() for word in _words(kind, given.get(name))]
    # Behind them the compiler has pointers to scratch memory, which none of these kernels asks for.
    arguments += [0] * (len(program.parameters) - len(arguments))
    memory = Global([t for value in given.values() for t in tensors_in(value)])
    grid = (*grid, 1, 1)[:3]
    threads = kernel.metadata.num_warps * LANES_PER_WARP
    blocks = settings.order(np.arange(int(np.prod(grid))))
    together = max(1, settings.together // threads)
    for first in range(0, len(blocks), together):
        Machine(
            program, blocks[first : first + together], grid, threads, arguments, memory, kernel.metadata.shared, settings.error
        ).run()
    settings.launches.append(Launch(kernel.metadata.name, memory.read, memory.written, memory.moved))


@functools.cache
def _program(text: str) -> Program:
    return parse(text)


def _words(kind: Any, value: Any) -> Iterator[int]:
    """An argument as the words of its parameters; what was compiled in has none."""
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            yield from _words(k, v)
    elif kind == "constexpr":
        return
    elif kind.startswith("*"):
        yield value.data_ptr()
    elif kind == "fp32":
        yield struct.unpack("I", struct.pack("f", value))[0]
    else:
        yield int(value)
