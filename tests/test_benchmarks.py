"""The benchmark of the CPU backends: what it says of right numbers, and that it does not time wrong ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_elbo import ops, reference
from fused_elbo.reference import plain
from fused_elbo.spec import Gradients


@pytest.fixture
def cpu(monkeypatch, one_thread) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("benchmarks.cpu")


def run(cpu: ModuleType, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    path = folder / "times.json"
    code = cpu.main(["--quick", "--no-compile", "--threads", "1", "--json", str(path), *options])
    return code, json.loads(path.read_text())


def test_table_json_and_picture(cpu, tmp_path, capsys):
    picture = tmp_path / "ratios.png"
    code, content = run(cpu, tmp_path, "--filter", "8x8", "--plot", str(picture))
    assert code == 0
    able = [name for name in ops.BACKENDS if name != "triton" and ops.unavailable(name, "cpu") is None]
    direct = [f"{name}, {cpu.work.DIRECT}" for name in able if name != cpu.work.SPECIFICATION]
    environment = content["environment"]
    assert [name for name, state in environment["backends"].items() if state == "timed"] == able
    assert environment["threads"] == 1
    assert environment["torch"] == str(torch.__version__)
    assert "--no-compile" in environment["command"]
    for item, eager in zip(content["items"], (["classic lines"], ["mse_loss", "written out"]), strict=True):
        assert list(item["peers"]) == [*able, *direct, *eager]
        for peer in item["peers"].values():
            low, high = peer["quartiles_ms"]
            assert 0 < low <= peer["median_ms"] <= high
            assert peer["rounds"] >= 3
        for row, backend in zip(item["rows"], [*able, *direct], strict=True):
            medians = {name: peer["median_ms"] for name, peer in item["peers"].items()}
            assert row["backend"] == backend
            assert row["ratios"] == [min(medians[name] for name in eager) / medians[backend], None]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    named = [line.split("|")[1].replace(cpu.report.NOISY, "").strip() for line in lines[2:]]
    assert named == [item["name"] for item in content["items"] for _ in [*able, *direct]]
    assert len({len(line) for line in lines}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_plain_pytorch_is_right_in_every_dtype(cpu, tmp_path, dtype):
    code, content = run(cpu, tmp_path, "--dtype", dtype, "--filter", "classic")
    assert code == 0
    assert (content["dtype"], len(content["items"])) == (dtype, 1)


def test_bandwidth(cpu, tmp_path, capsys, monkeypatch):
    item = cpu.work.Item("bandwidth 16x32", "bandwidth", (16, 32), (85.0,))
    monkeypatch.setattr(cpu.work, "items", lambda sweep: iter((item,)))
    code, content = run(cpu, tmp_path)
    assert code == 0
    for row in content["items"][0]["rows"]:
        ours, copy = row["gb_per_s"]
        assert row["ratios"] == [pytest.approx(100 * ours / copy)]
        assert ours == pytest.approx(3 * 16 * 32 * 4 / (1e6 * row["ms"]["ours"]))
    assert "% of the copy" in capsys.readouterr().out


def test_sweep_names_the_worst(cpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu.work, "SWEEP", (64, 2048))
    code, content = run(cpu, tmp_path, "--sizes", "--filter", "sweep")
    assert code == 0
    assert [item["shape"] for item in content["items"]] == [[1, 64], [2, 1024]] * 2
    ratio, name = min(
        (row["ratios"][0], row["item"]) for item in content["items"] for row in item["rows"] if row["backend"] == "reference"
    )
    assert f"Worst of the sweep, reference: {ratio:.2f} x eager at {name}." in capsys.readouterr().out


def test_targets_are_for_float32_and_what_is_built_for_speed(cpu):
    item = cpu.work.Item("nll 8x8", "nll", (8, 8), (2.0, 3.0))
    results = {
        name: cpu.Result(kind, name, ms=[ms])
        for name, kind, ms in (("native", "ours", 1.0), ("reference", "ours", 9.0), ("mse", "eager", 2.5), ("c", "compiled", 2))
    }
    native, plain = cpu.report.rows(item, torch.float32, results)
    assert native["ratios"] == [2.5, 2.0]
    assert native["met"] == [True, False]
    assert not plain["targets"]
    assert not cpu.report.rows(item, torch.float16, results)[0]["targets"]


def test_a_noisy_machine_is_said(cpu):
    item = cpu.work.Item("nll 8x8", "nll", (8, 8))
    quiet, noisy = (
        cpu.report.tables([(item, {"reference": cpu.Result("ours", "reference", ms=[1.0], others=share)})], torch.float32)
        for share in (0.01, 0.2)
    )
    assert cpu.report.NOISY not in quiet
    assert "nll 8x8 (20%)" in noisy


def five_percent_off(monkeypatch):
    right = plain.gaussian_nll_backward

    def wrong(g_nll, x_hat, x, likelihood, out: Gradients, **options):
        right(g_nll, x_hat, x, likelihood, out, **options)
        out.x_hat.mul_(1.05)

    monkeypatch.setattr(plain, "gaussian_nll_backward", wrong)


def other_noise_in_the_backward(monkeypatch):
    monkeypatch.setattr(plain, "draw", lambda mu, noise: torch.randn_like(mu))


def too_much_noise(monkeypatch):
    right = plain.draw
    monkeypatch.setattr(plain, "draw", lambda mu, noise: 2 * right(mu, noise))


def an_error(monkeypatch):
    monkeypatch.delattr(reference, "rsample_kl")


@pytest.mark.parametrize(
    ("mistake", "item", "reason"),
    [
        (five_percent_off, "nll 8x8", "result 1 is off by 5.0e-02"),
        (other_noise_in_the_backward, "latent 8x8", "result 3 is off"),
        (too_much_noise, "latent 8x8", "the noise is not standard normal"),
        (an_error, "latent 8x8", "AttributeError"),
    ],
)
def test_a_wrong_peer_is_not_timed(cpu, tmp_path, capsys, monkeypatch, mistake, item, reason):
    monkeypatch.setattr(ops, "BACKENDS", {"reference": ops.BACKENDS["reference"]})
    mistake(monkeypatch)
    code, content = run(cpu, tmp_path, "--filter", item)
    assert code == 1
    wrong, *others = content["items"][0]["peers"].values()
    assert reason in wrong["refused"]
    assert "median_ms" not in wrong
    assert all("median_ms" in peer for peer in others)
    assert content["items"][0]["rows"] == []
    assert f"Refused, not timed: {item}, reference: {reason}" in capsys.readouterr().out


def test_no_such_item(cpu, capsys):
    with pytest.raises(SystemExit, match="2"):
        cpu.main(["--filter", "no such item"])
    assert "latent 128x20" in capsys.readouterr().err


def test_steps(tmp_path, capsys):
    from benchmarks import steps

    path = tmp_path / "steps.json"
    assert steps.main(["--quick", "--seconds", "0.01", "--filter", "eager", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert list(content["steps"]) == ["mlp 32x784, eager", "conv 32x784, eager"]
    printed = capsys.readouterr().out
    for name, row in content["steps"].items():
        assert name in printed
        assert row["rounds"] >= 4
        assert row["ratio"] == row["ms"]["classic"][1] / row["ms"]["fused"][1]
