"""``docs/cost.md``: its tables are what the code counts, and the counting notices what it should."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_elbo.codegen import cost
from fused_elbo.codegen.cost import Cost

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/cost.md").read_text()
README = (ROOT / "README.md").read_text()
OF_TORCH = re.search(r"Inductor of torch ([\d.]+) ", DOCUMENT)[1]


def test_the_document_has_the_tables_that_the_code_prints():
    pytest.importorskip("triton")
    if torch.__version__.partition("+")[0] != OF_TORCH:
        pytest.skip(f"the document's counts are those of torch {OF_TORCH}")
    # In a process of its own: Inductor lowers for a GPU there, and Triton must not interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_elbo.codegen.cost"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    printed = process.stdout.strip().split("\n\n")
    assert len(printed) == 2
    for table in printed:
        assert table in DOCUMENT


def test_the_readme_says_the_same_passes():
    rows = dict(re.findall(r"^\| step \| (\w+)[^|]*\|[^|]*\|[^|]*\| ([^|]+) \|", DOCUMENT, re.MULTILINE))
    eager, ours = (tuple(map(int, re.findall(r"\d+", rows[kind]))) for kind in ("eager", "fused"))
    assert re.search(r"stream the latents (\d+)\s+times and the images (\d+) times", README).groups() == tuple(map(str, eager))
    assert f"this library needs {ours[0]} and {ours[1]}" in README


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (lambda a, b: (a + b).view(-1), Cost(1, 3, 0), Cost(0, 0, 0)),
        (lambda a, b: torch.exp(a).mul_(b), Cost(2, 4, 0), None),
        (lambda a, b: a.expand(3, *a.shape).sum(0), Cost(1, 1, 0), None),
        (lambda a, b: F.mse_loss(a, b, reduction="sum"), Cost(2, 4, 0), Cost(1, 3, 0)),
    ],
    ids=["views", "in place", "expanded", "hidden"],
)
def test_what_counts(function, forward, backward):
    a, b = (torch.rand(cost.LATENTS, requires_grad=wanted) for wanted in (True, False))
    with cost.Recorder() as recorder:
        value = function(a, b)
    assert recorder.cost == forward
    if backward is not None:
        upstream = torch.ones_like(value)
        with cost.Recorder() as recorder:
            torch.autograd.grad(value, a, upstream)
        assert recorder.cost == backward


def test_a_prediction_is_bytes_and_launches():
    item = cost.Item("", 1000, 10)
    assert Cost(0, 2, 3).seconds(item, 1e9) == pytest.approx(4 * 2030 / 1e9)
    assert Cost(7, 0, 0).seconds(item, 1e9) == pytest.approx(7 * cost.OVERHEAD)


def test_times_come_from_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    for name in cost.ITEMS:
        times = cost.measured(record, name)
        assert times.keys() == {"eager", "compiled", "fused"}
        assert all(f"{time:.3g}" in DOCUMENT for time in times.values())
    assert cost.copy_bandwidth({"copy": {"gb_per_s": 30.0}}) == 30e9
