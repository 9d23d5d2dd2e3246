"""The reference VAE: that it learns, that fused and eager agree, and that a run which is stopped loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import fused_elbo as fe
from fused_elbo import cli
from fused_elbo.vae import Interrupted, RunError, TrainConfig, build, load_digits, train
from fused_elbo.vae.comparison import compare, summary, table
from fused_elbo.vae.data import HELDOUT_FILE, IDX_HEADER, IDX_MAGIC, TRAIN_FILE
from fused_elbo.vae.training import Trainer, evaluate

ROOT = Path(__file__).parents[1]
TRAIN_COUNT, HELDOUT_COUNT = 512, 100
STEPS_PER_EPOCH = TRAIN_COUNT // 32
RUN_FILES = {"checkpoint.pt", "metrics.json", "loss_curve.png", "reconstructions.png", "samples.png"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A folder with a few of the real digits as IDX files."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for name, images, count in ((TRAIN_FILE, digits.train, TRAIN_COUNT), (HELDOUT_FILE, digits.heldout, HELDOUT_COUNT)):
        pixels = (images[:count] * 255).round().to(torch.uint8).numpy()
        (folder / name).write_bytes(IDX_HEADER.pack(IDX_MAGIC, count, 28, 28) + pixels.tobytes())
    return str(folder)


@pytest.fixture
def config(data, tmp_path) -> TrainConfig:
    return TrainConfig(epochs=2, data=data, device="cpu", out=str(tmp_path / "run"), quiet=True)


def command(*args: object, **options: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, "-m", "fused_elbo", *map(str, args)], **{**pipes, **options})


def checkpoint(config: TrainConfig) -> dict:
    return torch.load(config.folder / "checkpoint.pt", weights_only=True)


def assert_same_bits(a: dict, b: dict) -> None:
    """Weights, optimizer, generators, losses and terms of two checkpoints; what they measured of time and memory may differ."""
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    moments = [[state[k] for state in s["optimizer"]["state"].values() for k in state] for s in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert all(torch.equal(a[k], b[k]) for k in ("noise", "order_generator", "order"))
    for name in ("loss", "nll", "kl"):
        assert a["metrics"]["steps"][name] == b["metrics"]["steps"][name]
    terms = [[(e["epoch"], e["last_step"], e["train"], e["heldout"]) for e in s["metrics"]["epochs"]] for s in (a, b)]
    assert terms[0] == terms[1]
    assert a["metrics"]["untrained"] == b["metrics"]["untrained"]


def ctrl_c_after(step: int):
    """A hook that sends this process SIGINT in the middle of a training step."""
    count = 0

    def hook(*_) -> None:
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGINT)

    return register_optimizer_step_post_hook(hook)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_model(name):
    model = build(name, latent_dim=3, seed=1)
    x = torch.rand(4, 1, 28, 28)
    moments = model.encode(x)
    assert moments.shape == (4, 6)
    x_hat, z, kl = model(x)
    assert x_hat.shape == x.shape
    assert z.shape == (4, 3)
    assert kl.shape == (4,)
    assert x_hat.min() >= 0
    assert x_hat.max() <= 1
    fe.elbo_loss(x_hat, x, kl=kl).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    model.eval()
    mu, _ = moments.chunk(2, 1)
    torch.testing.assert_close(model(x).z, mu)
    assert model.sample(5).shape == (5, 1, 28, 28)
    assert torch.equal(model.sample(5, seed=1), model.sample(5, seed=1))
    assert not torch.equal(model.sample(5, seed=1), model.sample(5, seed=2))


def test_weights_are_those_of_the_seed_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (torch.nn.utils.parameters_to_vector(build("mlp", seed=seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"model: got 'gan', takes one of \['conv', 'mlp'\]"):
        build("gan")


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_fused_and_eager_agree_step_by_step(config, data, model):
    # At sigma 0.5 the loss stays far from zero, so that a relative difference means something.
    config = replace(config, model=model, sigma=0.5, batch_size=16)
    losses = []
    for loss in ("fused", "eager"):
        trainer = Trainer(replace(config, loss=loss), load_digits(data))
        while trainer.steps_done < 200:
            for _ in trainer.epoch():
                pass
        losses.append(np.array(trainer.metrics["steps"]["loss"]))
    fused, eager = losses
    assert len(fused) >= 200
    assert np.max(np.abs(fused - eager) / np.abs(eager)) <= 1e-5
    assert fused[-STEPS_PER_EPOCH:].mean() < 0.6 * fused[0]


def test_the_elbo_does_not_depend_on_the_batch_size(data):
    model, heldout = build("mlp"), load_digits(data).heldout
    whole, parts = (evaluate(model, heldout, 0.25, size) for size in (1000, 7))
    assert whole == pytest.approx(parts, rel=1e-6)
    assert whole["elbo"] == -whole["nll"] - whole["kl"]


def test_run_folder_and_metrics(config):
    metrics = train(replace(config, epochs=4))
    assert {path.name for path in config.folder.iterdir()} == RUN_FILES
    assert json.loads((config.folder / "metrics.json").read_text()) == metrics
    for path in config.folder.glob("*.png"):
        height, width, _ = matplotlib.image.imread(path).shape
        assert min(height, width) > 100
        assert matplotlib.image.imread(path)[..., :3].std() > 0.05

    assert metrics["finished"]
    assert metrics["config"]["latent_dim"] == config.latent_dim
    assert metrics["environment"].keys() >= {"python", "torch", "device", "backend"}
    assert metrics["environment"]["backend"].startswith("fused_elbo.")
    assert metrics["peak_memory_mib"] >= 0
    assert [len(values) for values in metrics["steps"].values()] == [4 * STEPS_PER_EPOCH] * 4
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2, 3, 4]
    for epoch in metrics["epochs"]:
        assert epoch["seconds"] > 0
        for part in ("train", "heldout"):
            assert epoch[part]["elbo"] == pytest.approx(-epoch[part]["nll"] - epoch[part]["kl"])
    first = metrics["steps"]["nll"][:STEPS_PER_EPOCH]
    assert metrics["epochs"][0]["train"]["nll"] == pytest.approx(sum(first) / STEPS_PER_EPOCH)

    # An untrained decoder is 0.5 everywhere, about -1080 nats.
    assert metrics["epochs"][-1]["heldout"]["elbo"] > metrics["untrained"]["elbo"] + 800


def test_the_seed_decides_every_bit(config):
    runs = [replace(config, seed=seed, out=f"{config.out}{i}") for i, seed in enumerate((3, 3, 4))]
    for run in runs:
        train(run)
    first, second, other = map(checkpoint, runs)
    assert_same_bits(first, second)
    assert first["metrics"]["steps"]["loss"] != other["metrics"]["steps"]["loss"]
    assert not torch.equal(first["order"], other["order"])


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, STEPS_PER_EPOCH + 5),
        ({"loss": "eager"}, 3),
        ({"model": "conv"}, STEPS_PER_EPOCH + 1),
        ({}, STEPS_PER_EPOCH),
        ({"batch_size": 100}, 8),
    ],
    ids=["mlp", "eager", "conv", "last step of an epoch", "ragged batches"],
)
def test_a_resumed_run_ends_with_the_same_bits(config, options, step):
    config = replace(config, **options)
    whole = replace(config, out=f"{config.out}-whole")
    train(whole)

    hook = ctrl_c_after(step)
    try:
        with pytest.raises(Interrupted, match=f"after step {step} of .*--out {config.folder} --resume"):
            train(config)
    finally:
        hook.remove()
    state = checkpoint(config)
    assert len(state["metrics"]["steps"]["loss"]) == step
    assert not state["metrics"]["finished"]
    assert not list(config.folder.glob("*.tmp"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    torch.manual_seed(123)
    train(replace(config, resume=True))
    assert_same_bits(checkpoint(config), checkpoint(whole))


def test_a_finished_run_can_be_made_longer(config):
    train(replace(config, epochs=1))
    train(replace(config, epochs=2, resume=True))
    whole = replace(config, out=f"{config.out}-whole")
    train(whole)
    assert_same_bits(checkpoint(config), checkpoint(whole))
    with pytest.raises(RunError, match="--epochs got 1, the checkpoint has 2 behind it"):
        train(replace(config, epochs=1, resume=True))


def test_a_run_is_not_overwritten_by_accident(config):
    config = replace(config, epochs=1)
    with pytest.raises(RunError, match=r"--resume: there is no checkpoint.pt"):
        train(replace(config, resume=True))
    train(config)
    before = (config.folder / "checkpoint.pt").read_bytes()
    (config.folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="already holds a run: continue it with --resume, replace it with --overwrite"):
        train(config)
    with pytest.raises(ValueError, match="looked for"):
        train(replace(config, overwrite=True, data=str(config.folder / "nowhere")))
    assert (config.folder / "checkpoint.pt").read_bytes() == before
    train(replace(config, overwrite=True, seed=1))
    assert (config.folder / "checkpoint.pt").read_bytes() != before
    assert (config.folder / "notes.txt").read_text() == "mine"


def test_a_resumed_run_keeps_its_options(config):
    train(replace(config, epochs=1))
    different = {"model": "conv", "loss": "eager", "lr": 0.5, "latent_dim": 3, "sigma": 1.0, "beta": 2.0, "seed": 9}
    for name, value in {**different, "batch_size": 7}.items():
        with pytest.raises(RunError, match=f"--{name.replace('_', '-')} got {value!r}, the checkpoint has"):
            train(replace(config, resume=True, **{name: value}))
    (config.folder / "checkpoint.pt").write_bytes((config.folder / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged"):
        train(replace(config, resume=True))


def test_a_training_that_diverges_says_so_and_keeps_the_last_checkpoint(config):
    train(replace(config, epochs=1))
    path = config.folder / "checkpoint.pt"
    state = checkpoint(config)
    state["model"]["decoder.0.weight"].fill_(torch.nan)
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"no longer finite.*--lr"):
        train(replace(config, resume=True))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gan"}, "--model: got 'gan', takes one of mlp, conv"),
        ({"loss": "both"}, "--loss: got 'both', takes one of fused, eager"),
        ({"epochs": 0}, "--epochs: got 0, takes an integer of at least 1"),
        ({"batch_size": 0}, "--batch-size: got 0"),
        ({"latent_dim": 0}, "--latent-dim: got 0"),
        ({"lr": float("inf")}, "--lr: got inf, takes a positive number"),
        ({"sigma": -1.0}, "--sigma: got -1.0"),
        ({"sigma": float("nan")}, "--sigma: got nan"),
        ({"beta": -0.1}, "--beta: got -0.1"),
        ({"seed": -1}, "--seed: got -1"),
        ({"resume": True, "overwrite": True}, "--resume: got True"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_an_unusable_device_backend_or_folder_is_an_error(config, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="--device: got 'abacus'"):
        train(replace(config, device="abacus"))
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--out: cannot write to"):
        train(replace(config, out=str(tmp_path / "file" / "run")))
    monkeypatch.setenv("FUSED_ELBO_BACKEND", "abacus")
    with pytest.raises(RunError, match="abacus"):
        train(config)


def test_missing_packages_are_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(RunError, match=r"pip install 'fused-elbo\[demo\]'"):
        train(config)


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
    out = tmp_path / "run"
    process = command("train", "--data", data, "--out", out, "--epochs", 10000, "--device", "cpu")
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"python -m fused_elbo train --out {out} --resume" in err
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
    args = ("train", "--loss", "both", "--data", data, "--epochs", 2, "--device", "cpu", "--out", out)
    process = command(*args, env={**os.environ, "FUSED_ELBO_BACKEND": "reference"})
    text, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert {path.name for path in out.iterdir()} == {"fused", "eager", "comparison.json", "comparison.png"}
    for loss in ("fused", "eager"):
        assert {path.name for path in (out / loss).iterdir()} == RUN_FILES
        assert json.loads((out / loss / "metrics.json").read_text())["config"]["loss"] == loss
    for part in (
        "fused backend fused_elbo.reference",
        "plain-PyTorch fallback",
        "held-out ELBO, nats, epoch 2",
        "median step, ms",
        "peak memory, MiB",
        "training seconds",
    ):
        assert part in text
    content = json.loads((out / "comparison.json").read_text())
    assert max(map(abs, content["heldout_elbo_difference"])) < 1e-2
    assert content["largest_step_difference"] < 1e-2
    assert matplotlib.image.imread(out / "comparison.png").std() > 0.05

    with pytest.raises(RunError, match="already holds a run"):
        compare(TrainConfig(data=data, quiet=True), out)


def test_ctrl_c_of_a_comparison_reaches_the_training(data, tmp_path):
    out = tmp_path / "both"
    process = command("train", "--loss", "both", "--data", data, "--epochs", 10000, "--device", "cpu", "--out", out)
    deadline = time.monotonic() + 60
    while not (out / "fused" / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"--loss both --out {out} --resume" in err
    assert "Traceback" not in err
    assert torch.load(out / "fused" / "checkpoint.pt", weights_only=True)["metrics"]["steps"]["loss"]
    assert not (out / "eager").exists()


def test_the_table_claims_a_speed_only_for_a_fused_backend():
    run = {
        "environment": {"device": "cuda", "device_name": "GPU", "backend": "fused_elbo.backends.triton"},
        "epochs": [{"heldout": {"elbo": 1.0}, "seconds": 2.0}],
        "steps": {"loss": [1.0], "ms": [3.0]},
        "peak_memory_mib": None,
        "peak_memory_meaning": "unknown",
    }
    text = table(summary({"fused": run, "eager": run}))
    assert "fallback" not in text
    assert "n/a" in text
