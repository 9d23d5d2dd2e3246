"""In place of a GPU for the CUDA library: its objects, linked without CUDA's runtime, whose launches the machine runs."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fused_elbo.backends import native
from fused_elbo.backends.native import library, tools
from fused_elbo.codegen import sass

from .launch import ARCHITECTURE_VARIABLE, run
from .memory import Region, regions_of
from .program import kernels

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build/objects/cuda"
WORK = ROOT / "build/ptx"
LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)
ALLOCATE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
# By name the operators, and what the backend's module calls them behind an underscore.
OPERATIONS = {schema.partition("(")[0]: schema.partition("(")[0].rstrip("_") for schema in library.SCHEMAS}


class Host:
    """What the library asks for, and what came of it. An error cannot pass through its C++, and waits here."""

    def __init__(self, path: Path) -> None:
        self.regions: list[Region] = []
        self.error: Exception | None = None
        self.kernels = kernels(_text(path))
        # Device variables keep what kernels leave in them.
        self.variables: dict[str, np.ndarray] = {}
        self.callbacks = LAUNCH(self.launch), ALLOCATE(self.allocated)
        ctypes.CDLL(str(path)).machine_is(*self.callbacks)

    def allocated(self, data: int, size: int) -> None:
        self.regions.append(Region(data, size))

    def launch(self, kernel: bytes, x: int, y: int, threads: int, arguments: int) -> None:
        try:
            program = self.kernels[kernel.decode()]()
            for name, size in program.variables.items():
                self.variables.setdefault(name, np.zeros(size, dtype="u1"))
            variables = {name: Region(self.variables[name].ctypes.data, size) for name, size in program.variables.items()}
            given = ctypes.string_at(arguments, program.parameter_bytes)
            run(kernel.decode(), program, (x, y, 1), threads, given, [*self.regions, *variables.values()], variables)
        except Exception as error:
            self.error = self.error or error

    def through(self, name: str) -> Any:
        """An operation, by its CUDA implementation."""
        operator = getattr(torch.ops.fused_elbo, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

        def call(*args: Any) -> Any:
            self.regions = list(regions_of(args))
            self.error = None
            found = operator.redispatch(keys, *args)
            if self.error is not None:
                raise self.error
            return found

        return call


def install() -> None:
    """From here on the native backend's operations on the CPU are those of the CUDA library, run by the machine."""
    host = Host(_link())
    for operator, name in OPERATIONS.items():
        setattr(native, f"_{name}", host.through(operator))


def _text(linked: Path) -> str:
    """The kernels' PTX: what the objects carry, or, for the GPU that is asked for, what nvcc makes of the sources."""
    asked = os.environ.get(ARCHITECTURE_VARIABLE)
    if asked is None:
        return sass.Tools().ptx(linked)
    spec = importlib.util.spec_from_file_location("builder_for_ptx", ROOT / "csrc/build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    units = builder.cuda_recipe(builder.find_torch(), OBJECTS, builder.Options()).units

    def compiled(unit: Any) -> str:
        made = WORK / f"{unit.object.stem}.sm_{asked}.ptx"
        if not made.exists() or made.stat().st_mtime < unit.object.stat().st_mtime:
            command = [word for word in unit.command if word != "-c" and not word.startswith(("-gencode", "-Xfatbin"))]
            fresh = made.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-ptx", f"-arch=compute_{asked}", "-o", str(fresh)], check=True)
            fresh.replace(made)
        return made.read_text()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "".join(pool.map(compiled, units))


def _link() -> Path:
    objects = sorted(OBJECTS.glob("*.o"))
    if not objects:
        raise FileNotFoundError(f"{OBJECTS} holds no objects: run `make build`, which takes nvcc")
    WORK.mkdir(parents=True, exist_ok=True)
    linked = WORK / "libfused_elbo_machine.so"
    source = Path(__file__).with_name("cuda.cpp")
    if not linked.exists() or linked.stat().st_mtime < max(p.stat().st_mtime for p in (source, *objects)):
        torchs = Path(torch.__file__).parent
        # Its own symbols come before torch's.
        command = [*tools.nvcc(), "-ccbin", tools.host_compiler(), "-std=c++17", "-shared", "-cudart", "none",
                   "-Xcompiler", "-fPIC", "-Xlinker", "-Bsymbolic", f"-I{torchs}/include", str(source), *map(str, objects),
                   f"-L{torchs}/lib", "-ltorch_cpu", "-o", f"{linked}.{os.getpid()}"]  # fmt: skip
        subprocess.run(command, check=True)
        # Several processes of a test run may have come here.
        Path(command[-1]).replace(linked)
    return linked
