"""``python -m fused_elbo doctor``: what is installed, what runs where, and why something does not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Iterator

import torch

from . import ops
from ._version import __version__
from .backends import native
from .backends.native import library

PACKAGES = ("torch", "triton", "numpy")


def run(echo: Callable[[str], None] = print) -> int:
    """Print the report.

    Args:
        echo: gets each line. Default: print.

    Returns:
        0, or 1 if the backend that the environment asks for cannot run.
    """
    echo(f"fused_elbo {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        echo(f"  {package:<8} {_version(package)}")
    echo(f"  CUDA     {torch.version.cuda or 'not in this build of torch'}")
    echo("devices")
    echo(f"  cpu      {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if not torch.cuda.is_available():
        echo("  cuda     torch sees none")
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        echo(f"  cuda:{index}   {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, "
             f"{p.total_memory / 2**30:.0f} GiB")  # fmt: skip
    echo("libraries of the native backend")
    for device in library.LIBRARIES:
        first, *rest = _library(device)
        echo(f"  {device:<9}{first}")
        for line in rest:
            echo(f"           {line}")
    asked = os.environ.get(ops.ENVIRONMENT_VARIABLE)
    echo(f"backends ({ops.ENVIRONMENT_VARIABLE}={asked or 'not set'})")
    code = 0
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for name in ops.BACKENDS:
            reason = ops.unavailable(name, device)
            echo(f"  {device:<5}{name:<10} {'can run' if reason is None else 'cannot run: ' + reason}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen = ops.select(torch.device(device)).__name__.rpartition(".")[2]
            echo(f"  {device:<5}runs on {chosen}")
        except (RuntimeError, ValueError) as error:
            echo(f"  {device:<5}fails: {error}")
            code = 1
    return code


def _library(device_type: str) -> Iterator[str]:
    """What lies there and whether it is used, or how to get it."""
    path = library.location(device_type)
    if not path.exists():
        yield f"there is no {path}: {native.remedy(device_type)}"
        return
    yield str(path)
    with contextlib.suppress(OSError, ValueError):
        made = library.read_manifest(path)
        yield (f"for torch {made['torch_target']} and newer, made with {made['compiler']} and the headers of "
               f"{made['torch_headers']}, for {', '.join(made['architectures'])}")  # fmt: skip
    reason = native.unavailable(device_type)
    if reason is not None:
        yield f"not in use: {reason}"
    elif device_type == "cpu":
        yield f"in use: {native.capability()} ({native.PROCESSOR_VARIABLE} chooses another)"
    else:
        yield "in use"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
