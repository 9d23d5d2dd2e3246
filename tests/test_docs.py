"""The documentation: its code runs, its tables are what the library computes, its guides to extensions work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import blocks

import fused_elbo as fe
from fused_elbo import accuracy, ops
from fused_elbo.backends.native import tools
from fused_elbo.spec import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
# Run by tests of their own, which look at more than that they run.
ELSEWHERE = {
    "classic_script.md": "test_training_loops.py",
    "diffusers.md": "test_diffusers_models.py",
    "distributions.md": "test_distributions.py",
    "linear_head.md": "test_linear_docs.py",
    "messages.md": "test_diagnostics.py",
    "objective.md": "test_objective_docs.py",
    "training_loops.md": "test_training_loops.py",
}


def ran(name: str) -> dict[str, object]:
    """What the Python blocks of a document leave behind."""
    namespace: dict[str, object] = {"__name__": name}
    for block in blocks(DOCS[name]):
        exec(compile(block, name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", [name for name in DOCS if blocks(DOCS[name])])
def test_python_blocks_run(name, monkeypatch):
    if name in ELSEWHERE:
        assert f"{name}" in (ROOT / "tests" / ELSEWHERE[name]).read_text()
        return
    monkeypatch.setattr(ops, "BACKENDS", dict(ops.BACKENDS))
    ran(name)


@pytest.mark.parametrize("name", DOCS)
def test_tests_that_are_named_exist(name):
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)`", DOCS[name]):
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_values_of_the_kl():
    def kl(mu, variance):
        return fe.kl_divergence(torch.tensor([mu]).double(), torch.tensor([variance]).double().log()).item()

    rows = re.findall(r"\| `(kl\(.*?\))` = ([\d.]+) \|", DOCS["mathematics.md"])
    assert len(rows) == 3
    for expression, value in rows:
        assert eval(expression, {"kl": kl}) == pytest.approx(float(value), abs=1e-15), expression


def logistic_density(v):
    return torch.sigmoid(v) * torch.sigmoid(-v)


def test_derivatives_of_likelihoods():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|", DOCS["mathematics.md"], re.MULTILINE)
    assert [name for name, *_ in rows] == list(FAMILIES)
    defined = dict(re.findall(r"`([rab]) = ([^`]+)`", DOCS["mathematics.md"]))
    assert defined.keys() == set("rab")
    levels = torch.tensor([3, 100, 252], dtype=torch.uint8)
    y, log_scale = torch.tensor([0.1, -0.2, 0.9]).double().requires_grad_(), torch.tensor(-0.7).double().requires_grad_()
    for name, element, by_y, by_log_scale in rows:
        target, width = 2 / 255 * levels.double() - 1, 2 / 255
        s = log_scale.exp()
        scope = {"x": target, "y": y, "s": s, "w": width, "F": torch.sigmoid, "f": logistic_density}
        scope |= {name: eval(value, scope) for name, value in defined.items()} | {"ln": torch.log, "sign": torch.sign}
        value = eval(element, scope | {"softplus": torch.nn.functional.softplus})
        options = {"sigma": s.item()} if name != "bernoulli" else {}
        ours = fe.nll(y, levels, likelihood=name, scale=width, shift=-1.0, reduction="none", **options)
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(value.sum(), (y, log_scale), allow_unused=True)
        torch.testing.assert_close(found[0], eval(by_y, scope), rtol=1e-12, atol=1e-12)
        slope = torch.as_tensor(eval(by_log_scale, scope)).sum().double()
        torch.testing.assert_close(torch.zeros_like(slope) if found[1] is None else found[1], slope, rtol=1e-12, atol=1e-12)


def test_the_noise_is_specified_to_the_last_digit():
    normal = ran("noise.md")["normal"]
    rows = re.findall(r"^\| (-?\d+) \| (\d+) \| (\d+) \| (-?[\d.]+) \|$", DOCS["noise.md"], re.MULTILINE)
    assert len(rows) == 6
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for seed, element, offset, value in rows:
        numbers = int(seed), int(element), int(offset)
        library = fe.reparameterize(zero, zero, seed=numbers[0], first_index=numbers[1], offset=numbers[2]).item()
        assert normal(*numbers) == pytest.approx(float(value), abs=1e-12)
        assert library == pytest.approx(float(value), abs=accuracy.NOISE[torch.float64])


def test_the_envelope_is_that_of_the_table():
    said = re.search(
        r"A few is (\d+) for an element in float64 and float32, (\d+) in bfloat16 and float16, and (\d+) for a sum",
        DOCS["numerics.md"],
    )
    ulps = accuracy.ELEMENT_ULPS
    assert [int(n) for n in said.groups()] == [ulps[torch.float32], ulps[torch.bfloat16], accuracy.SUM_ULPS]
    assert ulps[torch.float64] == ulps[torch.float32]
    assert ulps[torch.float16] == ulps[torch.bfloat16]


def test_training_steps_are_those_of_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    rows = re.findall(
        r"^\| (\w+ \d+x\d+), (eager|compiled) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", DOCS["performance.md"], re.MULTILINE
    )
    found = {}
    for item in record["items"]:
        for how, names in (("eager", ("native", "classic lines")), ("compiled", ("ours, compiled", "classic lines, compiled"))):
            if item["stage"] == "step" and set(names) <= item["peers"].keys():
                fused, classic = (item["peers"][name]["median_ms"] for name in names)
                found[item["name"].removeprefix("step "), how] = f"{fused:.3g}", f"{classic:.3g}", f"{classic / fused:.2f}"
    assert {(name, how): tuple(figures) for name, how, *figures in rows} == found


def test_calls_in_a_row_are_those_of_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu-one-by-one.json").read_text())
    assert record["environment"]["one_by_one"]
    table = DOCS["performance.md"].partition("| called in a row |")[2].partition("\n\n")[0]
    lines = re.findall(r"^\| (\w+ \d+x\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    found = {row["item"]: row for item in record["items"] for row in item["rows"] if row["backend"] == "native"}
    assert len(lines) == 3
    for name, *figures in lines:
        row = found[name]
        assert figures == [f"{row['ms']['ours']:.3g}", *(f"{ratio:.2f}" for ratio in row["ratios"])], name


@pytest.fixture(scope="module")
def with_cauchy(tmp_path_factory) -> Path:
    """A copy of what the guide to a likelihood changes, with its patch."""
    folder = tmp_path_factory.mktemp("likelihood")
    for name in ("fused_elbo", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for block in blocks(DOCS["likelihoods.md"], "diff"):
        subprocess.run(["git", "apply", "-"], input=block, text=True, cwd=folder, check=True)
    return folder


def test_a_likelihood_is_added_as_the_guide_says(with_cauchy):
    environment = os.environ | {"PYTHONPATH": str(with_cauchy), "FUSED_ELBO_REQUIRE_BACKENDS": "reference triton"}
    chosen = "(reference or triton) and (cauchy or test_likelihood)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_operations.py", "-k", chosen]
    done = subprocess.run(command, cwd=with_cauchy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "cauchy" in (with_cauchy / "fused_elbo/cases.py").read_text()


def test_its_kernels_compile(with_cauchy):
    """For one instruction set, without code: that no table of kernels forgets it is an error of the compiler."""
    source = "csrc/cpu/kernels_likelihood.cpp"
    command = [*tools.cxx(), "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DFE_ISA=portable", source]
    done = subprocess.run(command, cwd=with_cauchy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_document_is_in_the_site():
    listed = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == set(DOCS)


def test_public_names_are_in_the_reference():
    named = set(re.findall(r"^::: fused_elbo\.(?:\w+\.)?(\w+)$", DOCS["api.md"], re.MULTILINE))
    assert {name for name in fe.__all__ if callable(getattr(fe, name))} <= named


def test_host_times_are_those_of_the_record():
    record = json.loads((ROOT / "benchmarks/results/host-time.json").read_text())
    found = {(r["stage"], r["part"], r["boundary"]): r["us"] for r in record["rows"] if r["backend"] == "native"}
    table = DOCS["pytorch.md"].partition("| host time of one forward call")[2]
    names = [name.strip() for name in table.partition("\n")[0].split("|")[1:-1]]
    for row, stage in (("sample and KL", "sample and KL"), ("likelihood with its gradient", "likelihood")):
        figures = re.search(rf"^\| {row} \| (.*) \|$", table, re.MULTILINE)[1].split(" | ")
        assert figures == [f"{found[stage, 'forward', name]:.1f}" for name in names], row
    for name, words in (
        ("`F.mse_loss`", "for `F.mse_loss`"),
        ("smallest Function", "for the\n  smallest `Function` there is"),
        ("smallest Function with the operation", "for the smallest that holds the operation"),
        ("public function", "for `gaussian_nll`"),
    ):
        assert f"{found['likelihood', 'forward and backward', name]:.0f} {words}" in DOCS["performance.md"], name
