"""The commands ``check`` and ``doctor``: that they pass, and that they would not if something were wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_elbo import check, cli, ops, reference
from fused_elbo.spec import Gradients

OPERATIONS = (*check.operations(), "noise")


def results(backend: str, device: torch.device, operation: str) -> list[check.Result]:
    with ops.backend(backend):
        return list(check.check(backend, device, operation))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_check_passes(backend, device, operation):
    found = results(backend, device, operation)
    assert [r.dtype for r in found] == [d for d in check.DTYPES if operation != "noise" or d in check.accuracy.NOISE]
    assert not [r for r in found if r.failure is not None]


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        ("rsample_kl_backward", "rsample_kl"),
        ("rsample_kl_backward", "elbo_loss"),
        ("gaussian_nll_backward", "gaussian_nll, none"),
        ("gaussian_nll_backward", "elbo_loss, kl="),
    ],
)
def test_check_notices_a_gradient_that_is_off_by_five_percent(monkeypatch, device, function, operation):
    right = getattr(reference, function)

    def wrong(*args, **options):
        right(*args, **options)
        out = next(a for a in args if isinstance(a, Gradients))
        for t in out:
            if t is not None:
                t.mul_(1.05)

    monkeypatch.setattr(reference, function, wrong)
    found = results("reference", device, operation)
    assert [r.dtype for r in found if r.failure is not None] == list(check.DTYPES)


def test_check_notices_wrong_noise(monkeypatch, device):
    right = reference.noise
    monkeypatch.setattr("fused_elbo.reference.plain.draw", lambda mu, noise: right(noise.seed + 1, mu.shape, dtype=mu.dtype))
    assert all(r.failure is not None for r in results("reference", device, "noise"))


def test_check_prints_a_table_and_fails_if_anything_does(monkeypatch, device):
    monkeypatch.setattr(ops, "BACKENDS", {"reference": ops.BACKENDS["reference"]})
    monkeypatch.setattr(check, "_codegen", lambda echo: 0)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    lines: list[str] = []
    assert check.run(lines.append) == 0
    assert lines[-1] == "all passed"
    assert all(any(operation in line for line in lines) for operation in OPERATIONS)
    monkeypatch.setattr(check, "_codegen", lambda echo: 1)
    assert check.run(lines.append) == 1
    assert lines[-1] == "1 failed"


def test_doctor_reports(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("fused_elbo", "torch", "triton", "devices", "reference", "runs on"):
        assert word in printed


def test_doctor_says_why_a_backend_cannot_run():
    environment = {**os.environ, "FUSED_ELBO_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, "-m", "fused_elbo", "doctor"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.returncode == 1
    assert "TRITON_INTERPRET=1" in process.stdout
    assert "was asked for and cannot run" in process.stdout
