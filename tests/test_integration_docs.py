"""``docs/pytorch.md``: every test that its matrix names exists, and runs on the backends that it names."""

from __future__ import annotations

import importlib
import inspect
import json
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


def test_figures_are_those_of_the_record():
    record = json.loads((Path(__file__).parents[1] / "benchmarks/results/steps.json").read_text())
    for name, row in record["steps"].items():
        fused, classic = (f"{row['ms'][loss][1]:.3g}" for loss in ("fused", "classic"))
        assert f"| {name} | {fused} | {classic} | {row['ratio']:.2f} |" in DOCUMENT
    compiled = record["steps"]["narrow 128x784, compiled"]["ms"]
    said = f"took {compiled['fused'][1]:.3g} ms with the fused loss and {compiled['classic'][1]:.3g} ms with the classic"
    assert said in (Path(__file__).parents[1] / "README.md").read_text()
