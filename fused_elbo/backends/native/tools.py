"""Which compilers this machine has. Standard library only, and nothing of ours: ``csrc/build.py`` reads this file too."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
CUDA_HOME = "/usr/local/cuda"


class MissingTool(Exception):
    """One line: which tool is not here and how to bring or name it."""


def cxx() -> list[str]:
    """The C++ compiler as the start of a command: $CXX, or the first one on the path."""
    return _find("CXX", "C++ compiler", COMPILERS)


def host_compiler() -> str:
    """The program alone of ``cxx``, without what starts it and its options, as nvcc takes it."""
    words = cxx()
    first_option = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[max(0, first_option - 1)]


def nvcc() -> list[str]:
    """The CUDA compiler as the start of a command: $NVCC, or the one on the path, or that of the CUDA toolkit."""
    homes = (os.environ.get("CUDA_HOME"), CUDA_HOME)
    return _find("NVCC", "CUDA compiler", ("nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)))


def _find(variable: str, kind: str, names: Sequence[str]) -> list[str]:
    asked = shlex.split(os.environ.get(variable, ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise MissingTool(f"{variable}={asked[0]} is not a program here: install it, or set {variable} to a {kind}")
        return asked
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise MissingTool(f"no {kind} here (looked for {', '.join(names)}): install one, or set {variable}")
