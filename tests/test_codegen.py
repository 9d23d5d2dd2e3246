"""The Triton kernels' machine code, compiled for GPUs that need not be here, against the table of budgets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import torch

from fused_elbo import check, codegen, ops
from fused_elbo.codegen import __main__ as command
from fused_elbo.codegen import budgets, hardware, report, sass

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/performance.md").read_text()
DOCUMENT_IS_OF_THIS_TRITON = f"Triton {triton.__version__} " in DOCUMENT
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

# How often the main loop may touch an element: the passes of docs/cost.md.
PASSES = {
    "rsample_kl": 3,
    "rsample_kl_backward": 5,
    "gaussian_nll": 3,
    "gaussian_nll without gradient": 2,
    "elbo, data": 3,
    "elbo, latents": 4,
    "gaussian_nll_backward": 3,
    "rescale": 2,
    "likelihood": 3,
    "likelihood of levels": 2,
    "posterior": 5,
    "posterior with log ratios, a sample": 1,
    "posterior_backward": 9,
}


# What another Triton makes that its budget does not allow: the budgets are those of ``budgets.VERSIONS``.
KNOWN = {
    "3.6.0": {(f"elbo, {part}", "float32", 100) for part in ("data", "latents")},
    # One register, the number of the thread, is written and read outside of the loops.
    "3.8.0": {(f"elbo, {part}", dtype, 100) for part in ("data", "latents") for dtype in DTYPES},
}.get(triton.__version__, set())


def read(*options: str, codes: tuple[int, ...] = (0,)) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_elbo.codegen", *options]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode in codes, process.stderr + process.stdout
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    # What is over its budget is one test's to say, and no reason to have no rows.
    return read("--only", "triton", "--lines", codes=(0, codegen.OVER_BUDGET))


def test_every_variant_compiles():
    # The interpreter runs what a compiler would refuse, float64 beside float32 code above all.
    found = read("--variants")
    assert {r["dtype"] for r in found} == {"float64", "float32", "bfloat16"}
    assert len(found) == len({(r["variant"], r["dtype"]) for r in found}) > 150
    if DOCUMENT_IS_OF_THIS_TRITON:
        said = re.search(r"up to (\d+) bytes a thread", DOCUMENT)
        assert max(r["local"] for r in found if r["dtype"] != "float64") == int(said[1])


def test_every_kernel_is_compiled_for_every_target(rows):
    found = {(r["kernel"], r["dtype"], r["architecture"]) for r in rows}
    folder = ROOT / "fused_elbo/backends/triton"
    hosts = "".join((folder / name).read_text() for name in ("__init__.py", "general.py"))
    launched = set(re.findall(r"_kernels\.(\w+)_kernel\[", hosts))
    assert launched <= {re.split("[ ,]", kernel)[0] for kernel, _, _ in found}
    assert found == {(k, d, t) for k in PASSES for d in DTYPES for t in hardware.GPUS}


def test_the_table_holds_what_is_compiled_and_nothing_else(rows):
    assert {(r["kernel"], r["dtype"]) for r in rows} == budgets.BUDGETS["triton"].keys()


def test_every_kernel_is_within_its_budget(rows):
    over = {(r["kernel"], r["dtype"], r["architecture"]): r["over"] for r in rows if r["over"]}
    assert over.keys() == KNOWN, over
    spills = {(r["kernel"], r["dtype"], r["architecture"]) for r in rows if not r["clean"] or r["spilled"] or r["local"]}
    assert spills == KNOWN


def test_every_element_is_touched_as_often_as_it_must(rows):
    assert {(r["kernel"], r["bytes"] / DTYPES[r["dtype"]]) for r in rows} == set(PASSES.items())


def test_documented_figures(rows):
    if not DOCUMENT_IS_OF_THIS_TRITON:
        pytest.skip("the document's figures are those of another version of Triton")
    for kernel, label in (
        ("rsample_kl", "latent forward"),
        ("rsample_kl_backward", "latent backward"),
        ("gaussian_nll", "likelihood with its gradient"),
    ):
        row = re.search(rf"^\| {label}[^|]*\| ([\d.]+) \| ([\d.]+) \|", DOCUMENT, re.MULTILINE)
        for dtype, shown in zip(("float32", "bfloat16"), row.groups(), strict=True):
            (r,) = (r for r in rows if (r["kernel"], r["dtype"], r["architecture"]) == (kernel, dtype, 90))
            assert abs(r["instructions"] - float(shown)) < 0.06, (kernel, dtype)


def test_what_waits_for_instructions_is_documented(rows):
    if not DOCUMENT_IS_OF_THIS_TRITON:
        pytest.skip("the document's figures are those of another version of Triton")
    found = {(r["kernel"], r["dtype"], r["architecture"]) for r in rows if r["bound"] == "issue"}
    assert documents.bound_by_instructions(DOCUMENT, "triton") == found


ROW = report.Row("triton", "rsample_kl", "float32", 90, 96, 0, 0, (128,), 12.0, 44.6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spilled": 2, "local": 16}, "2 spills, 16 bytes of local memory"),
        ({"widths": (32, 128)}, "accesses of 32/128 bits"),
        ({"bytes": 9.0}, "9 bytes an element in 16-byte accesses, not 12"),
        ({"registers": 97}, "97 registers, over 96"),
        ({"instructions": 46.0}, "46.0 instructions an element, over 45.9"),
        ({"kernel": "new"}, "no budget"),
    ],
)
def test_what_is_over_its_budget_is_said(change, said):
    version = budgets.VERSIONS["triton"]
    assert ROW.record(version)["over"] == []
    assert "ok" in report.line(ROW.record(version))
    record = ROW._replace(**change).record(version)
    assert said in record["over"][0]
    assert f"OVER: {record['over'][0]}" in report.line(record)


def test_another_compiler_keeps_what_does_not_depend_on_it():
    assert ROW._replace(registers=128, instructions=55.0).record("9.9.9")["over"] == []
    assert ROW._replace(instructions=58.0).record("9.9.9")["over"]
    assert ROW._replace(spilled=1).record("9.9.9")["over"]
    assert ROW._replace(bytes=15.0).record("9.9.9")["over"]


def test_a_proposal_is_kept_by_what_it_was_made_of():
    lines = list(budgets.proposal(ROW._replace(architecture=a) for a in hardware.GPUS))
    assert lines == ['    "triton": {', f'        ("rsample_kl", "float32"): ({", ".join(["(12, 96, 46)"] * 3)}),', "    },"]


@pytest.mark.parametrize(("row", "code"), [(ROW, 0), (ROW._replace(registers=97), codegen.OVER_BUDGET)])
def test_the_command_fails_where_a_kernel_is_over_its_budget(monkeypatch, tmp_path, capsys, row, code):
    monkeypatch.setattr(command, "COMPILERS", {"triton": lambda gpus: (budgets.VERSIONS["triton"], iter([row]))})
    assert command.main(["--json", str(tmp_path / "rows.json")]) == code
    assert f"1 read, {code} over budget" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (record["kernel"], bool(record["over"])) == ("rsample_kl", bool(code))


def test_the_command_says_what_it_could_not_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FUSED_ELBO_LIB", str(tmp_path))
    assert command.main(["--only", "nvcc"]) == codegen.UNREADABLE
    assert re.search(r"nvcc: not run: there is no \S+cuda\.so", capsys.readouterr().out)


def test_one_gpu_alone(monkeypatch, tmp_path):
    rows = [ROW._replace(architecture=a) for a in hardware.GPUS]
    monkeypatch.setattr(command.native_kernels, "inspect", lambda path, tools: iter(rows))
    monkeypatch.setattr(command.native_kernels, "compiler", lambda path: "some")
    monkeypatch.setattr(command.library, "problem", lambda path: None)
    monkeypatch.setattr(command.library, "location", lambda device: tmp_path)
    assert [row.architecture for row in command._nvcc([90])[1]] == [90]


def checked(monkeypatch, code: int) -> tuple[int, list[str], list[str]]:
    """What ``check`` makes of an exit code of the table's command: failures, lines, and the command."""
    script, started = f"print('a row'); raise SystemExit({code})", subprocess.Popen
    lines: list[str] = []
    commands: list[list[str]] = []

    def start(command, **options):
        commands.append(command)
        return started([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return check._codegen(lines.append), lines, commands[0]


@pytest.mark.parametrize(
    ("code", "reason", "failures"),
    [
        (0, None, 0),
        (codegen.OVER_BUDGET, "no GPU", 1),
        (codegen.UNREADABLE, None, 1),
        (codegen.UNREADABLE, "no Triton", 0),
    ],
)
def test_check_prints_the_table_and_counts_its_failure(monkeypatch, code, reason, failures):
    monkeypatch.setattr(ops, "unavailable", lambda name, device: reason)
    found, lines, _ = checked(monkeypatch, code)
    assert found == failures
    assert lines[-1] == "a row"


@pytest.mark.parametrize(("capability", "asked"), [((9, 0), ["--gpu", "90"]), ((8, 9), ["--gpu", "80"]), ((12, 0), [])])
def test_check_reads_what_is_compiled_for_the_gpu_that_is_here(monkeypatch, capability, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    made = checked(monkeypatch, 0)[2]
    assert made[made.index("triton") + 1 :] == asked


def test_which_side_bounds_a_kernel():
    assert (ROW.bound, ROW._replace(bytes=4.0).bound, ROW._replace(dtype="float64").bound) == ("memory", "issue", "-")
    h200 = hardware.GPUS[90]
    said = re.search(r"on an H200 about (\d+)\s+float32", DOCUMENT)
    assert h200.floor(12) == pytest.approx(int(said[1]), abs=0.5)
    assert h200.floor(6) == h200.floor(12) / 2


def function(text: str) -> sass.Function:
    """A kernel of instructions, each a line; a line that ends in a colon is a label."""
    code, labels = [], {}
    for line in map(str.strip, text.strip().splitlines()):
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        else:
            code.append(line)
    return sass.Function("kernel", 0, 0, code, labels)


def test_of_a_loop_the_way_of_the_16_byte_accesses_counts():
    (loop,) = function("""
        MOV R0, RZ
        .L_x_0:
        @P0 BRA `(.L_x_1)
        LDG.E.128 R4, [R2.64]
        @!P1 BRA `(.L_x_2)
        STG.E.128 [R6.64], R4
        FADD R1, R1, R4
        .L_x_2:
        BRA `(.L_x_3)
        .L_x_1:
        LDG.E R4, [R2.64]
        @P3 BRA `(.L_x_1)
        .L_x_3:
        @P2 BRA `(.L_x_0)
        EXIT
    """).loops
    assert loop == sass.Loop(sass.Turn(wide=32, instructions=7), (128, 128))


def test_an_indirect_branch_needs_its_targets():
    with pytest.raises(ValueError, match="an indirect branch without its targets"):
        _ = function("BRX R4 -0x150").loops
    (loop,) = function("""
        .L_x_0:
        LDG.E.128 R4, [R2.64]
        BRX R4 -0x150 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
        .L_x_1:
        FADD R1, R1, R4
        FADD R1, R1, R4
        .L_x_2:
        @P0 BRA `(.L_x_0)
        EXIT
    """).loops
    assert loop == sass.Loop(sass.Turn(wide=16, instructions=3), (128,))


def test_a_loop_within_counts_once_and_far_jumps_are_followed():
    found = function("""
        .L_x_0:
        LDG.E.128 R4, [R2.64]
        BSSY B0, `(.L_x_2)
        .L_x_1:
        STG.E.128 [R6.64], R4
        @P1 CALL.REL.NOINC `(.L_x_4)
        BRA `(.L_x_1)
        .L_x_4:
        BSYNC B0
        .L_x_2:
        CALL.REL.NOINC `($subroutine)
        @P0 BRA `(.L_x_0)
        .L_x_3:
        LDG.E.128.STRONG.GPU R4, [R2.64]
        @P0 BRA `(.L_x_3)
        EXIT
    """).loops
    assert found == [sass.Loop(sass.Turn(wide=32, instructions=8), (128, 128))]
