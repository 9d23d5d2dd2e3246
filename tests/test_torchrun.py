"""The command ``train`` by several processes that ``torchrun`` starts. Gloo, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from training_runs import RUN_FILES, checkpoint

from fused_elbo.vae import TrainConfig, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"),
]

SECONDS = 300


def torchrun(*args: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fused_elbo"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([*command, *map(str, args)], env=environment, **pipes)


def test_train_under_torchrun(data, tmp_path):
    options = ("--data", data, "--device", "cpu", "--batch-size", 90, "--log-likelihood-samples", 2)
    out = tmp_path / "two"
    process = torchrun("train", *options, "--epochs", 1, "--out", out)
    text, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert text.count("epoch 1/1: ELBO") == text.count(f"wrote {out}") == 1
    assert {path.name for path in out.iterdir()} == RUN_FILES

    config = TrainConfig(epochs=2, batch_size=90, data=data, device="cpu", out=str(tmp_path / "one"), quiet=True)
    whole = train(config)
    process = torchrun("train", "--resume", "--epochs", 10000, "--out", out)
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if len(json.loads((out / "metrics.json").read_text())["epochs"]) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert err.count(f"python -m fused_elbo train --out {out} --resume") == 1, err

    state = checkpoint(TrainConfig(out=str(out)))
    steps = state["metrics"]["steps"]
    per_epoch = len(whole["steps"]["loss"]) // 2
    assert state["epochs_done"] * per_epoch + state["position"] == len(steps["loss"]) >= 2 * per_epoch
    for name in ("loss", "nll", "kl"):
        assert steps[name][: 2 * per_epoch] == pytest.approx(whole["steps"][name], rel=1e-5)
    for mine, theirs in zip(state["metrics"]["epochs"], whole["epochs"], strict=False):
        for part in ("train", "heldout"):
            assert mine[part] == pytest.approx(theirs[part], rel=1e-5)


def test_errors_under_torchrun_are_said_once(tmp_path):
    process = torchrun("train", "--loss", "both", "--out", tmp_path / "both")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert err.count("error: --loss: got both under torchrun, takes fused or eager") == 1
