"""In place of a GPU: Triton compiles a launch for one, and the machine runs it on tensors on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
from triton.runtime.jit import JITFunction

from fused_elbo.backends import triton as backend
from fused_elbo.codegen.hardware import LANES_PER_WARP
from fused_elbo.codegen.triton_kernels import Driver

from .launch import ARCHITECTURE_VARIABLE, run, settings
from .memory import regions_of
from .program import Program, kernels

ARCHITECTURE = int(os.environ.get(ARCHITECTURE_VARIABLE, "90"))
NUMBERS = {"fp32": "f4", "i1": "i1", "i32": "i4", "i64": "i8", "u64": "u8"}


def install() -> None:
    """From here on every launch of a Triton kernel is run by the machine."""
    triton.runtime.driver.set_active(Driver(ARCHITECTURE))
    compile_ = JITFunction.run

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_(self, *args, grid=grid, warmup=True, **options)
        if not warmup:
            names = [p.name for p in self.params]
            given = dict(zip(names, args, strict=False)) | {n: v for n, v in options.items() if n in names}
            execute(kernel, given, grid)
        return kernel

    JITFunction.run = launch
    backend.unavailable = lambda device_type: None if device_type == "cpu" else f"the machine is not for {device_type!r}"


def execute(kernel: Any, given: dict[str, Any], grid: tuple[int, ...]) -> None:
    """One launch of a compiled Triton kernel."""
    name = kernel.metadata.name
    program = _kernels(settings.edit(kernel.asm["ptx"]))[name]()
    # Behind these the compiler has pointers to scratch memory, which none of these kernels asks for.
    arguments = bytearray(program.parameter_bytes)
    words = (word for n, kind in kernel.src.signature.items() for word in _words(kind, given.get(n)))
    for word, begin in zip(words, program.parameters.values(), strict=False):
        arguments[begin : begin + len(word)] = word
    threads = kernel.metadata.num_warps * LANES_PER_WARP
    regions = regions_of(tuple(given.values()))
    run(name, program, (*grid, 1, 1)[:3], threads, bytes(arguments), regions, {}, kernel.metadata.shared)


@functools.cache
def _kernels(text: str) -> dict[str, Callable[[], Program]]:
    return kernels(text)


def _words(kind: Any, value: Any) -> Iterator[bytes]:
    """An argument as its parameters; what was compiled in has none."""
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            yield from _words(k, v)
    elif kind.startswith("*"):
        yield np.uint64(value.data_ptr()).tobytes()
    elif kind != "constexpr":
        yield np.dtype(NUMBERS[kind]).type(value).tobytes()
