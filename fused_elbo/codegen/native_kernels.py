"""The CUDA library's kernels by name: what a thread takes in a turn of each one's loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..backends.native import library
from ..spec import FAMILIES
from . import sass
from .report import Row, moves, rows_of, takes

DTYPES = {"f": "float32", "d": "float64", "8bfloat16": "bfloat16", "7float16": "float16", "3Any": "any"}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
VECTOR = sass.WIDEST // 8
# enum class Source (csrc/cuda/latent.cu), in order.
SOURCES = ("none", "seed", "eps")
# Tensors that an element of the latent kernels is read from and written to, as those take them (INPUTS and OUTPUTS there).
LATENT_PASSES = {("forward", "none"): 2, ("forward", "seed"): 3, ("forward", "eps"): 4} | {
    ("backward", source): 6 if source == "eps" else 5 for source in SOURCES
}
# x_hat, x and their gradients; mu, logvar and theirs.
SIDES = 2
# Elements of a thread's turn where that is one tensor times a factor (RUN in csrc/cuda/launch.cuh).
RUN = 16


def compiler(path: Path) -> str:
    """The version of nvcc that made a library, as its manifest says."""
    return re.search(r"nvcc ([\d.]+)", library.read_manifest(path)["compiler"])[1]


def inspect(path: Path, tools: sass.Tools) -> Iterator[Row]:
    """The rows of every kernel for every GPU in a library."""
    for architecture, function in tools.functions_of(path):
        yield from read(architecture, function)


def read(architecture: int, function: sass.Function) -> Iterator[Row]:
    """The rows of one kernel."""
    name, arguments = parse(function.name)
    types = [a for a in arguments if a in DTYPES.values()]
    numbers = [int(a) for a in arguments if a.isdigit()]
    dtype, loops = types[0], []
    if name in ("forward", "backward"):
        source = SOURCES[numbers[0]]
        if dtype != "any":
            loops = [("", moves(LATENT_PASSES[name, source] * BYTES[dtype]))]
        name += f", noise: {source}"
    elif name == "elbo":
        *data, latents, _ = types
        dtype = f"{'/'.join(dict.fromkeys(data))}, latents {latents}"
        loops = [] if "any" in data else [(", data", moves(SIDES * sum(BYTES[t] for t in data)))]
        loops += [] if latents == "any" else [(", latents", moves(2 * SIDES * BYTES[latents]))]
    elif name == "nll_backward":
        data = types[:2]
        dtype = "/".join(dict.fromkeys(data))
        loops = [] if "any" in data else [("", moves(SIDES * sum(BYTES[t] for t in data)))]
    elif name == "rescale":
        # Which of the two loops over 16 bits has fewer instructions is not told.
        parts = ("",) if dtype == "float64" else (", float32", ", bfloat16 or float16", ", float16 or bfloat16")
        loops = [(part, takes(RUN)) for part in parts]
    else:
        if name == "likelihood":
            name += f", {FAMILIES[numbers[0]]}" + (", all" if numbers[1] else "")
        loops = [] if dtype == "any" else [("", takes(VECTOR // BYTES[dtype]))]
    # Read by the element, a kernel computes with float32 or float64.
    dtype += f" in {types[-1]}" if dtype == "any" else ""
    yield from rows_of("nvcc", name, dtype, architecture, function, loops, function.loops)


def parse(mangled: str) -> tuple[str, list[str]]:
    """A kernel's name, and its template arguments as words and numbers (Itanium C++ ABI, 5.1)."""
    name, encoded = re.search(r"\d([a-z][a-z_]*)_kernelI(.*?)EEv", mangled).groups()
    arguments, named = [], []
    for known, again, literal, builtin in re.findall(r"NS_(\w+?)E|S(\d)_|L(?:NS\d?_\w+?E|b)(\d)E|([fd])", encoded):
        if again:
            # The first two of what is written once are the namespace and the kernel.
            arguments.append(named[int(again) - 2])
        elif literal:
            arguments.append(literal)
        else:
            arguments.append(DTYPES[known or builtin])
            named += [arguments[-1]] if known else []
    return name, arguments
