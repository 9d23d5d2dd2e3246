"""The code in the documents."""

from __future__ import annotations

import re


def blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
