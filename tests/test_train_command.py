"""The command ``train``: its errors, its help, Ctrl-C, and both losses side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from training_runs import (
    RUN_FILES,
    STEPS_PER_EPOCH,
    assert_same_bits,
    checkpoint,
    command,
)

from fused_elbo import cli
from fused_elbo.vae import RunError, TrainConfig, train, training
from fused_elbo.vae.comparison import TrainingFailed, _train_in_subprocess, compare, summary, table

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train", "--model", "gan"], "invalid choice: 'gan'"),
        (["train", "--epochs", "many"], "invalid int value: 'many'"),
        (["train", "--resume", "--overwrite"], "not allowed with"),
    ],
)
def test_command_line_errors_of_argparse(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere"], "no digits: looked for"),
        (["--epochs", "0"], "--epochs: got 0"),
        (["--sigma", "nan"], "--sigma: got nan"),
        (["--latent-dim", "100000000000"], "--latent-dim: got 100000000000, takes an integer"),
        (["--batch-size", str(10**11)], "--batch-size: got 100000000000, takes an integer"),
        (["--device", "abacus"], "--device: got 'abacus'"),
        (["--resume"], "--resume: there is no checkpoint.pt"),
        (["--loss", "both", "--resume"], "--resume: there is no checkpoint.pt"),
    ],
)
def test_command_line_errors_are_one_line(args, message, tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--quiet", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m fused_elbo train: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_model_without_room_is_one_line(data, tmp_path, capsys, monkeypatch):
    # More than there are addresses for: fewer bytes a system may promise, and end the process that believes it.
    monkeypatch.setattr(training, "build", lambda *_, **__: torch.empty(2**60))
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--data", data, "--latent-dim", "2147483647"]) == 2
    err = capsys.readouterr().err
    assert "error: --latent-dim: got 2147483647, for which this machine has no room: " in err
    assert err.count("\n") == 1
    assert ".cpp" not in err


def test_a_gpu_without_room_is_one_line(tmp_path, capsys, monkeypatch):
    def train(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nIf reserved ...")

    monkeypatch.setattr(training, "train", train)
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--batch-size", "4000000"]) == 2
    said = "take a smaller --batch-size than 4000000: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert capsys.readouterr().err == f"python -m fused_elbo train: error: {said}\n"


MET = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: got 'many', takes an integer of at least 1, as torchrun sets it"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: got '', takes"),
        ({"WORLD_SIZE": "-3"}, "WORLD_SIZE: got '-3', takes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0', takes"),
        ({"WORLD_SIZE": "2"}, "RANK: got nothing, takes an integer from 0 to 1"),
        ({**MET, "RANK": "x"}, "RANK: got 'x', takes an integer from 0 to 1, as torchrun sets it"),
        ({**MET, "RANK": "2"}, "RANK: got '2', takes an integer from 0 to 1"),
        ({**MET, "RANK": "-1"}, "RANK: got '-1', takes"),
        ({**MET, "MASTER_ADDR": ""}, "MASTER_ADDR: got nothing, takes the name of"),
        ({**MET, "MASTER_PORT": "abc"}, "MASTER_PORT: got 'abc', takes an integer from 1 to 65535"),
        ({**MET, "MASTER_PORT": "99999"}, "MASTER_PORT: got '99999', takes an integer from 1 to 65535"),
        ({**MET, "MASTER_PORT": "9" * 9999}, "MASTER_PORT: got '9999"),
    ],
)
@pytest.mark.parametrize("loss", ["fused", "both"])
def test_an_environment_that_names_no_processes_is_one_line(environment, message, loss, tmp_path, capsys, monkeypatch):
    for name in MET:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--quiet", "--loss", loss, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m fused_elbo train: error: ")
    assert err.count("\n") == 1
    if loss == "fused" or "WORLD_SIZE:" in message:
        assert message in err


def test_a_link_that_leads_to_itself_is_no_folder(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "loop")]) == 2
    assert "loop, which is not a folder" in capsys.readouterr().err


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default:") == text.count("\n  --")


def test_the_command_line_takes_the_options_of_the_run_that_it_resumes(data, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--epochs", "1", "--latent-dim", "3", "--lr", "0.002", "--device", "cpu"]
    assert cli.main(["train", "--data", data, "--out", str(out), *options]) == 0
    captured = capsys.readouterr()
    assert "epoch 1/1: ELBO" in captured.out
    assert f"wrote {out}" in captured.out
    assert "step/s" not in captured.err
    assert cli.main(["train", "--out", str(out), "--resume", "--epochs", "2", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    stored = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (stored["epochs_done"], stored["config"]["latent_dim"], stored["config"]["lr"]) == (2, 3, 0.002)
    assert cli.main(["train", "--out", str(out), "--resume", "--lr", "0.1"]) == 2
    assert "--lr got 0.1, the checkpoint has 0.002" in capsys.readouterr().err


def test_ctrl_c_leaves_a_run_that_can_be_resumed(data, tmp_path):
    out = tmp_path / "a run"
    process = command("train", "--data", data, "--out", out, "--epochs", 10000, "--device", "cpu")
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"python -m fused_elbo train --out '{out}' --resume" in err
    assert "Traceback" not in err

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    steps = state["epochs_done"] * STEPS_PER_EPOCH + state["position"]
    assert len(state["metrics"]["steps"]["loss"]) == steps > 0
    assert len(json.loads((out / "metrics.json").read_text())["steps"]["loss"]) == steps
    epochs = state["epochs_done"] + 1
    config = TrainConfig(data=data, device="cpu", out=str(out), epochs=epochs, resume=True, quiet=True)
    assert train(config)["finished"]
    whole = replace(config, resume=False, out=f"{out}-whole")
    train(whole)
    assert_same_bits(checkpoint(config), checkpoint(whole))


def test_both_losses_side_by_side(data, tmp_path):
    out = tmp_path / "both"
    # The eager training of the two has no head but the plain one.
    args = ("train", "--loss", "both", "--head", "fused-linear", "--data", data, "--epochs", 2, "--device", "cpu", "--out", out)
    process = command(*args, env={**os.environ, "FUSED_ELBO_BACKEND": "reference"})
    text, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert {path.name for path in out.iterdir()} == {"fused", "eager", "comparison.json", "comparison.png"}
    for loss in ("fused", "eager"):
        assert {path.name for path in (out / loss).iterdir()} == RUN_FILES
        config = json.loads((out / loss / "metrics.json").read_text())["config"]
        assert (config["loss"], config["head"]) == (loss, "fused-linear" if loss == "fused" else "linear")
    for part in (
        "fused backend fused_elbo.reference",
        "plain-PyTorch fallback",
        "held-out ELBO, nats, epoch 2",
        "median step in turns, ms",
        "peak memory, MiB",
        "training seconds",
    ):
        assert part in text
    content = json.loads((out / "comparison.json").read_text())
    assert max(map(abs, content["heldout_elbo_difference"])) < 1e-2
    assert all(ms > 0 for ms in content["median_step_ms_in_turns"].values())
    assert content["largest_step_difference"] < 1e-2
    assert matplotlib.image.imread(out / "comparison.png").std() > 0.05

    with pytest.raises(RunError, match="already holds a run"):
        compare(TrainConfig(data=data, quiet=True), out)


def test_ctrl_c_of_a_comparison_reaches_the_training(data, tmp_path):
    out = tmp_path / "both of them"
    process = command("train", "--loss", "both", "--data", data, "--epochs", 10000, "--device", "cpu", "--out", out)
    deadline = time.monotonic() + 60
    while not (out / "fused" / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"--loss both --out '{out}' --resume" in err
    assert "Traceback" not in err
    assert torch.load(out / "fused" / "checkpoint.pt", weights_only=True)["metrics"]["steps"]["loss"]
    assert not (out / "eager").exists()


def test_term_of_a_comparison_reaches_the_training(monkeypatch):
    class Training:
        asked = False

        def __init__(self, command):
            assert command[1:4] == ["-m", "fused_elbo", "train"]

        def terminate(self):
            Training.asked = True

        def wait(self):
            signal.raise_signal(signal.SIGTERM)
            return 130

    monkeypatch.setattr(subprocess, "Popen", Training)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingFailed, match="ended with code 130"):
        _train_in_subprocess(TrainConfig())
    assert Training.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_output_that_nobody_reads_ends_the_command(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(["bench", "--list"]) == 141


def test_the_table_claims_a_speed_only_for_a_fused_backend():
    run = {
        "environment": {"device": "cuda", "device_name": "GPU", "backend": "fused_elbo.backends.triton"},
        "epochs": [{"heldout": {"elbo": 1.0}, "seconds": 2.0}],
        "heldout_log_likelihood": {"samples": 8, "nats": 1.5},
        "steps": {"loss": [1.0], "ms": [3.0]},
        "peak_memory_mib": None,
        "peak_memory_meaning": "unknown",
    }
    text = table(summary({"fused": run, "eager": run}) | {"median_step_ms_in_turns": {"fused": 1.0, "eager": 1.0}})
    assert "fallback" not in text
    assert "n/a" in text
    assert "held-out ln p(x), nats, K = 8" in text
