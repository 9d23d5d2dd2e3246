"""``docs/linear_head.md`` and its benchmark: the code learns, the figures are the record's, and wrong routes are not timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from documents import blocks

from fused_elbo.autograd.linear import CHUNK_BYTES

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/linear_head.md").read_text()
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture
def bench(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.linear_head")


def test_the_example_learns(one_thread):
    (block,) = blocks(DOCUMENT)
    torch.manual_seed(0)
    found: dict[str, object] = {}
    exec(compile(block, "linear_head.md", "exec"), found)
    assert 0.93 < 1 - found["data"].values().numel() / (found["CELLS"] * found["GENES"]) < 0.97
    assert found["losses"][-1] < found["losses"][0] - 200
    assert found["reconstruction"].shape == (128, found["GENES"])


def test_figures_are_those_of_the_record(bench):
    record = json.loads((RESULTS / "linear_head.json").read_text())
    assert f"{bench.BEGIN}\n\n{bench.tables(record)}\n\n{bench.END}" in DOCUMENT
    ours, unfused = (record["memory"][name] for name in (bench.OURS, bench.OTHERS[0]))
    assert record["memory_shape"] == list(bench.ISSUE)
    assert ours < 0.05 * unfused


def test_the_rule_is_the_record_s(bench):
    """Of the sizes that were measured, the rule's takes no more than a quarter longer than the best one."""
    record = json.loads((RESULTS / "linear_chunks.json").read_text())
    for shape in bench.SHAPES:
        rows = record["chunks"][bench.name(shape)]
        chosen = bench.chunk_of(*shape[:2], 4, "cpu")
        (ours,) = [row for row in rows if (row["rows"], row["features"]) == chosen]
        assert ours["mib"] <= CHUNK_BYTES["cpu"] / 2**20
        assert ours["least"] <= 1.25 * min(row["least"] for row in rows), shape


def test_the_benchmark_runs(bench, tmp_path, capsys, monkeypatch):
    for name in bench.OTHERS[1:]:
        monkeypatch.delitem(bench.ROUTES, name)
    path, page = tmp_path / "head.json", tmp_path / "page.md"
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    options = ["--quick", "--seconds", "0", "--threads", "1", "--no-compile", "--json", str(path)]
    assert bench.main([*options, "--document", str(page)]) == 0
    record = json.loads(path.read_text())
    assert page.read_text() == f"before\n{bench.BEGIN}\n\n{bench.tables(record)}\n\n{bench.END}\nafter\n"
    (times,) = record["times"].values()
    assert list(times) == list(record["memory"]) == [bench.OURS, bench.OTHERS[0]]
    assert all(row["least"] <= row["ms"][1] and row["rounds"] >= bench.LEAST_ROUNDS for row in times.values())
    assert bench.tables(record) in capsys.readouterr().out
    assert bench.main([*options, "--chunks"]) == 0
    (rows,) = json.loads(path.read_text())["chunks"].values()
    assert [(row["rows"], row["features"], row["kind"]) for row in rows] == [(64, 96, "square")]


def test_wrong_numbers_are_not_timed(bench, monkeypatch):
    monkeypatch.setitem(bench.ROUTES, bench.OTHERS[0], lambda *tensors: 1.001 * bench.unfused(*tensors))
    with pytest.raises(RuntimeError, match=r"^Linear \+ gaussian_nll does not have the numbers of linear_gaussian_nll"):
        bench.times((8, 6, 3), list(bench.ROUTES)[:2], torch.device("cpu"), 0.0)
