"""The code in the documents."""

from __future__ import annotations

import re


def blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def bound_by_instructions(text: str, compiler: str) -> set[tuple[str, str, int]]:
    """(kernel, dtype, sm) of a compiler's rows in docs/performance.md's table."""
    rows = re.findall(rf"^\| `([^`]+)` \| {compiler} \| ([\w, ]+) \| ([\w, ]+) \|$", text, re.MULTILINE)
    found = set()
    for kernel, dtypes, gpus in rows:
        found |= {(kernel, dtype, int(gpu.removeprefix("sm_"))) for dtype in dtypes.split(", ") for gpu in gpus.split(", ")}
    return found
