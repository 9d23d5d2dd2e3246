"""Where, when and with what a measurement was made."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..backends import native

PREFIXES = (
    "FUSED_ELBO_",
    "OMP_",
    "KMP_",
    "GOMP_",
    "MKL_",
    "MALLOC_",
    "GLIBC_",
    "LD_PRELOAD",
    "TORCH",
    "TRITON_",
    "ATEN_",
    "CUDA_",
)

# A folder decides nothing.
FOLDERS = ("_DIR", "_HOME", "_PATH", "_ROOT")

# Times of two runs that differ in one of these are not to be put side by side in one file.
DECISIVE = ("device", "gpu", "cpu", "threads", "torch", "triton", "python", "native_capability", "commit", "one_by_one")


def facts(
    argv: Sequence[str], device: torch.device, backends: Mapping[str, str | None], *, one_by_one: bool = False
) -> dict[str, Any]:
    """What is known before anything is timed; ``backends`` has the reason of each that is left out."""
    changes = _git("--no-optional-locks", "status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "fused_elbo", "bench", *argv]),
        "fused_elbo": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "native_capability": native.capability(),
        "backends": {name: reason or "timed" for name, reason in backends.items()},
        "one_by_one": one_by_one,
        # Large tensors are new pages at each call, so what a page is decides how long the largest items take.
        "transparent_hugepages": read("/sys/kernel/mm/transparent_hugepage/enabled").strip() or None,
        "variables": {
            name: value for name, value in os.environ.items() if name.startswith(PREFIXES) and not name.endswith(FOLDERS)
        },
    }


def differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, what forbids to go on with a record that was ``stored`` elsewhere."""
    return [f"{key} {stored.get(key)}, here {here[key]}" for key in DECISIVE if stored.get(key) != here[key]]


def read(path: str) -> str:
    """A file of the system's; nothing where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu() -> str:
    # platform.processor() is empty or the architecture's name on Linux.
    names = [line.partition(":")[2].strip() for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that the package lies in; None where it is installed without one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
