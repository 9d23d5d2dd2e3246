"""The machine code of the CUDA library, where one was built (no GPU is needed to read it)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sass

from fused_elbo.backends.native import library

LIBRARY = library.FOLDER / library.LIBRARIES["cuda"]
README = (Path(__file__).parents[1] / "README.md").read_text()
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}
LATENT_FORWARD = "forward_kernelIffLNS0_6SourceE1E"
# Kernels of the general operations by how rows are read: in vectors of a dtype, or by the element, computed with in float32 or
# float64. Those of the likelihood are four families, in vectors with and without what an element may have beside its target.
BY_ELEMENT = ["NS_3AnyEf", "NS_3AnyEd"]
GENERAL = {
    "likelihood_kernel": {"f": 8, "d": 8, "NS_8bfloat16E": 8, "NS_7float16E": 8} | dict.fromkeys(BY_ELEMENT, 4),
    "posterior_kernel": dict.fromkeys(["f", "NS_8bfloat16E", "NS_7float16E", *BY_ELEMENT], 1),
    "posterior_backward_kernel": dict.fromkeys(["f", "NS_8bfloat16E", "NS_7float16E", *BY_ELEMENT], 1),
}


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    program = sass.cuobjdump()
    if not LIBRARY.exists() or program is None:
        pytest.skip(f"there is no {LIBRARY.name} (make build), or no cuobjdump to read it with")
    return sass.kernels(LIBRARY, program)


def test_every_kernel_is_there_for_every_target(kernels):
    names = {k.name for k in kernels}
    assert f"{len(names)} of them for each GPU" in README
    assert {(k.architecture, k.name) for k in kernels} == {(a, n) for a in ARCHITECTURES for n in names}


@pytest.mark.parametrize("name", GENERAL)
def test_the_general_operations_have_the_kernels_that_they_are_to_have(kernels, name):
    found = {k.name for k in kernels if re.search(rf"\d{name}I", k.name)}
    assert {read_as: sum(f"{name}I{read_as}" in n for n in found) for read_as in GENERAL[name]} == GENERAL[name]
    assert len(found) == sum(GENERAL[name].values())


def test_no_kernel_keeps_anything_in_local_memory(kernels):
    assert {(k.architecture, k.name): k.local_bytes for k in kernels if k.local_bytes} == {}


def test_dense_rows_are_read_and_written_16_bytes_at_a_time(kernels):
    for k in kernels:
        # Kernels for any strides and dtypes go by the element; some read a given KL or sum beside their tensors.
        if not re.search(r"kernelINS_3Any", k.name):
            assert 128 in k.loads, k
            # Without noise the forward pass writes sums alone.
            assert 128 in k.stores or "forward_kernel" in k.name, k


def test_the_latent_forward_costs_what_the_readme_says(kernels):
    said = re.search(r"^\| latent forward[^|]*, CUDA C\+\+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
    measured = {k.architecture: k.per_element for k in kernels if LATENT_FORWARD in k.name}
    assert measured.keys() == ARCHITECTURES
    for architecture, figure in zip(("sm_80", "sm_90", "sm_100"), said.groups(), strict=True):
        assert measured[architecture] == pytest.approx(float(figure), abs=0.06), architecture
