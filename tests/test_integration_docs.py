"""``docs/pytorch.md``: every test that its matrix names exists, and runs on the backends that it names."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[1] / "docs/pytorch.md").read_text()


def cells() -> list[tuple[str, str, str, str, str, str]]:
    rows = re.findall(r"^\| (.+?) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| `(test_\w+)\.py::(\w+)` \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) >= 25
    return rows


@pytest.mark.parametrize(("feature", "reference", "native", "triton", "file", "name"), cells(), ids=lambda text: text[:30])
def test_a_cell_is_backed(feature, reference, native, triton, file, name):
    function = getattr(importlib.import_module(file), name)
    by_backend = "backend" in inspect.signature(function).parameters
    # The doubly reparameterised gradient is refused before any backend is chosen.
    assert by_backend == ("-" not in (reference, triton)) or feature.startswith("`estimator"), feature
