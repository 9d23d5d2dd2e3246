"""The Triton kernels' machine code, compiled for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

README = (Path(__file__).parents[1] / "README.md").read_text()
README_IS_OF_THIS_TRITON = f"Triton {triton.__version__} " in README

LATENT_FORWARD_BUDGET = 45
TARGETS = (80, 90, 100)


# DESIGN's byte budget: how often the main loop may touch an element.
PASSES = {
    "rsample_kl": 3,
    "rsample_kl_backward": 5,
    "gaussian_nll": 3,
    "gaussian_nll without gradient": 2,
    "elbo": 3,
    "gaussian_nll_backward": 3,
    "rescale": 2,
    "likelihood": 3,
    "posterior": 5,
    "posterior_backward": 9,
}


def compiled(*options: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_elbo.backends.triton.codegen", *options]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    return compiled()


def test_every_variant_compiles():
    # The interpreter runs what a compiler would refuse, float64 beside float32 code above all.
    found = compiled("--variants")
    assert {r["dtype"] for r in found} == {"float64", "float32", "bfloat16"}
    assert len(found) == 3 * len({r["variant"] for r in found}) > 150
    if README_IS_OF_THIS_TRITON:
        said = re.search(r"up to (\d+) bytes a thread", README)
        assert max(r["stack"] for r in found if r["dtype"] != "float64") == int(said[1])


def test_every_kernel_is_compiled_for_every_target(reports):
    found = {(r["kernel"], r["dtype"], r["architecture"]) for r in reports}
    kernels = {kernel for kernel, _, _ in found}
    folder = Path(__file__).parents[1] / "fused_elbo/backends/triton"
    hosts = "".join((folder / name).read_text() for name in ("__init__.py", "general.py"))
    launched = set(re.findall(r"_kernels\.(\w+)_kernel\[", hosts))
    assert launched <= {kernel.split()[0] for kernel in kernels}
    assert found == {(k, d, t) for k in kernels for d in ("float32", "bfloat16") for t in TARGETS}


def test_nothing_spills_and_accesses_are_whole(reports):
    for r in reports:
        name = f"{r['kernel']} {r['dtype']} sm_{r['architecture']}"
        assert r["spilled"] == 0, name
        assert r["local"] == 0, name
        assert r["accesses"], name
        assert set(r["accesses"]) == {128}, name


def test_every_element_is_touched_as_often_as_it_must(reports):
    assert {r["kernel"]: r["passes"] for r in reports} == PASSES
    assert all(r["passes"] == PASSES[r["kernel"]] for r in reports)


def test_latent_forward_is_within_its_budget(reports):
    (r,) = (r for r in reports if (r["kernel"], r["dtype"], r["architecture"]) == ("rsample_kl", "float32", 90))
    assert 10 < r["instructions"] <= LATENT_FORWARD_BUDGET


def test_readme_figures(reports):
    if not README_IS_OF_THIS_TRITON:
        pytest.skip("the README's figures are those of another version of Triton")
    for kernel, label in (
        ("rsample_kl", "latent forward"),
        ("rsample_kl_backward", "latent backward"),
        ("gaussian_nll", "likelihood with its gradient"),
    ):
        row = re.search(rf"^\| {label}[^|]*\| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
        for dtype, shown in zip(("float32", "bfloat16"), row.groups(), strict=True):
            (r,) = (r for r in reports if (r["kernel"], r["dtype"], r["architecture"]) == (kernel, dtype, 90))
            assert abs(r["instructions"] - float(shown)) < 0.06, (kernel, dtype)
