"""The reference VAE: that it learns, that fused and eager agree, and that a run which is stopped loses nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
from training_runs import (
    RUN_FILES,
    STEPS_PER_EPOCH,
    assert_same_bits,
    checkpoint,
    stopped_after,
)

import fused_elbo as fe
from fused_elbo.vae import Interrupted, RunError, TrainConfig, build, load_digits, train
from fused_elbo.vae.run_folder import read_checkpoint
from fused_elbo.vae.training import Trainer, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_last_layer_in_the_loss_is_the_same_training(config):
    runs = [replace(config, sigma=0.5, head=head, out=f"{config.out}-{head}") for head in ("linear", "fused-linear")]
    apart, within = (train(run) for run in runs)
    for name in ("loss", "nll", "kl"):
        assert within["steps"][name] == pytest.approx(apart["steps"][name], rel=1e-5)
    states = [checkpoint(run)["model"] for run in runs]
    assert states[0].keys() == states[1].keys()
    assert within["epochs"][-1]["heldout"] == pytest.approx(apart["epochs"][-1]["heldout"], rel=1e-5)


def test_a_checkpoint_from_before_there_were_heads_can_be_resumed(config):
    train(replace(config, epochs=1))
    state = checkpoint(config)
    del state["config"]["head"]
    torch.save(state, config.folder / "checkpoint.pt")
    with pytest.raises(RunError, match="--head got 'fused-linear', the checkpoint has 'linear'"):
        train(replace(config, resume=True, head="fused-linear"))
    assert train(replace(config, resume=True))["finished"]


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

    # A bound of 32 samples is above that of one, on average over the digits by some nats.
    likelihood = metrics["heldout_log_likelihood"]
    assert likelihood["samples"] == config.log_likelihood_samples == 32
    assert likelihood["nats"] > metrics["epochs"][-1]["heldout"]["elbo"]

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
    ("options", "step", "number"),
    [
        ({}, STEPS_PER_EPOCH + 5, signal.SIGINT),
        ({"loss": "eager"}, 3, signal.SIGTERM),
        ({"model": "conv"}, STEPS_PER_EPOCH + 1, signal.SIGINT),
        ({"head": "fused-linear"}, 5, signal.SIGINT),
        ({}, STEPS_PER_EPOCH, signal.SIGTERM),
        ({"batch_size": 100}, 8, signal.SIGINT),
    ],
    ids=["mlp", "eager", "conv", "fused-linear", "last step of an epoch", "ragged batches"],
)
def test_a_resumed_run_ends_with_the_same_bits(config, options, step, number):
    config = replace(config, **options)
    whole = replace(config, out=f"{config.out}-whole")
    train(whole)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    hook = stopped_after(step, number)
    try:
        with pytest.raises(Interrupted, match=f"after step {step} of .*--out {config.folder} --resume"):
            train(config)
    finally:
        hook.remove()
    state = checkpoint(config)
    assert len(state["metrics"]["steps"]["loss"]) == step
    assert not state["metrics"]["finished"]
    assert not list(config.folder.glob("*.tmp"))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before

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


def test_whatever_is_wrong_with_a_checkpoint_is_said(config, data, monkeypatch):
    config = replace(config, device="cpu")
    config.folder.mkdir()
    trainer = Trainer(config, load_digits(data))
    trainer.save(config.folder)
    path, state = config.folder / "checkpoint.pt", checkpoint(config)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"hello world\n", whole[:1000], flipped, state["model"], [state], {**state, "config": None}):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(RunError, match=r"checkpoint.pt is damaged"):
            read_checkpoint(config.folder)
    torch.save({**state, "config": {**state["config"], "new_option": 1}}, path)
    with pytest.raises(RunError, match="was made with --new-option, which this version does not have"):
        read_checkpoint(config.folder)
    without = {name: value for name, value in state.items() if name != "metrics"}
    smaller = {**state, "model": {name: t[:1] for name, t in state["model"].items()}}
    for content in (without, smaller, {**state, "noise": torch.zeros(3, dtype=torch.uint8)}, {**state, "optimizer": {}}):
        with pytest.raises(RunError, match=r"checkpoint.pt is damaged"):
            trainer.load(content)

    def fails(*_):
        raise RuntimeError("unexpected pos 64")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RunError, match=r"--out: cannot write .*checkpoint.pt, is there room for it\? unexpected pos 64"):
        trainer.save(config.folder)


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
        ({"head": "cubic"}, "--head: got 'cubic', takes one of linear, fused-linear"),
        ({"head": "fused-linear", "model": "conv"}, "--head: got 'fused-linear', takes the model mlp"),
        ({"head": "fused-linear", "loss": "eager"}, "--head: got 'fused-linear', takes the loss fused"),
        ({"epochs": 0}, "--epochs: got 0, takes an integer of at least 1"),
        ({"epochs": 10**30}, f"--epochs: got {10**30}, takes an integer of at least 1, and at most 2147483647"),
        ({"batch_size": 0}, "--batch-size: got 0"),
        ({"batch_size": 10**11}, "--batch-size: got 100000000000, takes .* at most 2147483647"),
        ({"latent_dim": 0}, "--latent-dim: got 0"),
        ({"latent_dim": 10**11}, "--latent-dim: got 100000000000, takes .* at most 2147483647"),
        ({"log_likelihood_samples": 2**31}, "--log-likelihood-samples: got 2147483648, takes .* at most 2147483647"),
        ({"lr": float("inf")}, "--lr: got inf, takes a positive number"),
        ({"lr": 1e308}, r"--lr: got 1e\+308, takes a positive number, at most 2147483647"),
        ({"sigma": -1.0}, "--sigma: got -1.0"),
        ({"sigma": 1e-160}, "--sigma: got 1e-160, takes a finite number of at least 1e-154"),
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
    with pytest.raises(RunError, match="--out: cannot "):
        train(replace(config, out=str(tmp_path / ("long" * 99))))
    monkeypatch.setenv("FUSED_ELBO_BACKEND", "abacus")
    with pytest.raises(RunError, match="abacus"):
        train(config)


def test_missing_packages_are_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(RunError, match=r"pip install 'fused-elbo\[demo\]'"):
        train(config)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system does not say a process's own peak")
def test_peak_memory_is_that_of_the_process_itself():
    """Not that of a larger one which started it."""
    torch.ones(100 * 2**20).sum()
    child = """
import torch
from fused_elbo.vae.measure import PeakMemory
memory = PeakMemory(torch.device("cpu"))
torch.ones(16 * 2**20).sum()
print(memory.read())
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert 60 < float(done.stdout) < 100
