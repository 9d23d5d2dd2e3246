"""The machine code of the CUDA library, where one was built (no GPU is needed to read it), against the table of budgets."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import pytest

from fused_elbo.backends.native import library
from fused_elbo.codegen import __main__, budgets, hardware, native_kernels, sass
from fused_elbo.codegen.report import Row

DOCUMENT = (Path(__file__).parents[1] / "docs/performance.md").read_text()
# Kernels of the general operations by how rows are read: in vectors of a dtype, or by the element, computed with in float32 or
# float64. Those of the likelihood are four families, in vectors with and without what an element may have beside its target.
BY_ELEMENT = ["any in float32", "any in float64"]
GENERAL = {
    "likelihood": {"float32": 8, "float64": 8, "bfloat16": 8, "float16": 8} | dict.fromkeys(BY_ELEMENT, 4),
    "posterior": dict.fromkeys(["float32", "bfloat16", "float16", *BY_ELEMENT], 1),
    "posterior_backward": dict.fromkeys(["float32", "bfloat16", "float16", *BY_ELEMENT], 1),
}


@pytest.fixture(scope="module")
def functions() -> list[tuple[int, sass.Function]]:
    try:
        __main__.COMPILERS["nvcc"](hardware.GPUS)
    except sass.Unreadable as error:
        pytest.skip(str(error))
    return list(sass.Tools().functions_of(library.location("cuda")))


@pytest.fixture(scope="module")
def rows(functions) -> list[Row]:
    return [row for architecture, function in functions for row in native_kernels.read(architecture, function)]


def test_every_kernel_is_there_for_every_target(functions):
    names = {function.name for _, function in functions}
    assert f"{len(names)} of them for each GPU" in DOCUMENT
    assert {(a, f.name) for a, f in functions} == {(a, n) for a in hardware.GPUS for n in names}


@pytest.mark.parametrize("name", GENERAL)
def test_the_general_operations_have_the_kernels_that_they_are_to_have(rows, name):
    found = {(r.kernel, r.dtype) for r in rows if re.fullmatch(rf"{name}(, .*)?", r.kernel)}
    assert {read_as: sum(dtype == read_as for _, dtype in found) for read_as in GENERAL[name]} == GENERAL[name]
    assert len(found) == sum(GENERAL[name].values())


def test_the_table_holds_what_is_compiled_and_nothing_else(rows):
    assert {(r.kernel, r.dtype) for r in rows} == budgets.BUDGETS["nvcc"].keys()


def test_every_kernel_is_within_its_budget(rows):
    version = native_kernels.compiler(library.location("cuda"))
    assert {(r.kernel, r.dtype, r.architecture): over for r in rows if (over := r.record(version)["over"])} == {}
    assert all(r.spilled == r.local == 0 for r in rows)


def test_dense_rows_are_read_and_written_16_bytes_at_a_time(rows):
    # Kernels for any strides and dtypes go by the element, and have no loop whose instructions could be told.
    by_element = {r for r in rows if r.dtype.startswith("any")}
    assert all(r.instructions is None for r in by_element)
    assert all(sass.WIDEST in r.widths and r.bytes > 0 for r in rows if r not in by_element)


def test_what_waits_for_instructions_is_documented(rows):
    found = {(r.kernel, r.dtype, r.architecture) for r in rows if r.bound == "issue"}
    assert documents.bound_by_instructions(DOCUMENT, "nvcc") == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_latent_forward_costs_what_is_documented(rows, dtype):
    table = DOCUMENT.partition("| latent forward (Philox, Box-Muller, KL), CUDA C++")[2]
    said = re.search(rf"^\| {dtype} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", table, re.MULTILINE)
    measured = {r.architecture: r.instructions for r in rows if (r.kernel, r.dtype) == ("forward, noise: seed", dtype)}
    assert measured.keys() == hardware.GPUS.keys()
    for architecture, figure in zip(hardware.GPUS, said.groups(), strict=True):
        assert measured[architecture] == pytest.approx(float(figure), abs=0.06), architecture


@pytest.mark.parametrize(
    ("mangled", "name", "arguments"),
    [
        ("_ZN10fused_elbo12_GLOBAL__N_114forward_kernelINS_3AnyEfLNS0_6SourceE1EEEvv", "forward", ["any", "float32", "1"]),
        ("_ZN10fused_elbo5_1_ab11elbo_kernelINS_8bfloat16EfNS_3AnyEfEEvv", "elbo", ["bfloat16", "float32", "any", "float32"]),
        ("_ZN10fused_elbo5_1_ab11elbo_kernelINS_7float16ES2_S2_fEEvv", "elbo", ["float16", "float16", "float16", "float32"]),
        ("_ZN10fused_elbo5_1_ab17likelihood_kernelIddLNS_6FamilyE2ELb1EEEvv", "likelihood", ["float64", "float64", "2", "1"]),
    ],
)
def test_names_are_understood(mangled, name, arguments):
    assert native_kernels.parse(mangled) == (name, arguments)


def test_a_loop_that_does_not_move_whole_elements_is_no_main_loop():
    with pytest.raises(ValueError, match="a turn moves 48 bytes"):
        native_kernels.moves(16)(sass.Turn(wide=48, instructions=1))
