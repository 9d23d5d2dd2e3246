"""What the tests of the training and of its command line share."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_elbo.vae import TrainConfig, load_digits
from fused_elbo.vae.data import HELDOUT_FILE, IDX_HEADER, IDX_MAGIC, TRAIN_FILE

ROOT = Path(__file__).parents[1]
TRAIN_COUNT, HELDOUT_COUNT = 512, 100
STEPS_PER_EPOCH = TRAIN_COUNT // 32
RUN_FILES = {"checkpoint.pt", "metrics.json", "loss_curve.png", "reconstructions.png", "samples.png"}


def write_digits(folder: Path) -> None:
    """A few of the real digits as IDX files."""
    digits = load_digits()
    for name, images, count in ((TRAIN_FILE, digits.train, TRAIN_COUNT), (HELDOUT_FILE, digits.heldout, HELDOUT_COUNT)):
        pixels = (images[:count] * 255).round().to(torch.uint8).numpy()
        (folder / name).write_bytes(IDX_HEADER.pack(IDX_MAGIC, count, 28, 28) + pixels.tobytes())


def command(*args: object, **options: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    # Where tests run in the background of a shell Ctrl-C is ignored, by every process that they start.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen([sys.executable, "-m", "fused_elbo", *map(str, args)], **{**pipes, **options})
    finally:
        signal.signal(signal.SIGINT, before)


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


def stopped_after(step: int, number: int = signal.SIGINT):
    """A hook that sends this process a signal in the middle of a training step."""
    count = 0

    def hook(*_) -> None:
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(number)

    return register_optimizer_step_post_hook(hook)
