"""The README: its code runs, its table of conventions gives the numbers it promises, its figures are what the tools say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from documents import blocks
from torch.distributions import Normal

import fused_elbo as fe
from fused_elbo import cli
from fused_elbo.codegen import cost

README = (Path(__file__).parents[1] / "README.md").read_text()
CLASSIC = (Path(__file__).parents[1] / "docs/classic_script.md").read_text()
RECORD = json.loads((Path(__file__).parents[1] / "benchmarks/results/cpu.json").read_text())
N, SHAPE = 6, (3, 8, 8)
D = math.prod(SHAPE)


def test_python_blocks_run():
    namespace: dict[str, object] = {}
    found = blocks(README)
    assert len(found) == 3
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert all(p.grad is not None for name in ("encoder", "decoder") for p in namespace[name].parameters())


def test_the_two_lines_are_those_that_are_tested():
    """``docs/classic_script.md`` applies its patches to the script and compares the losses (tests/test_training_loops.py)."""
    (shown,) = blocks(README, "diff")
    assert shown == blocks(CLASSIC, "diff")[0]


def conventions() -> list[tuple[str, str, str]]:
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| `([^`]+)` \|$", README, re.MULTILINE)
    assert len(rows) == 5
    return rows


@pytest.mark.parametrize(("name", "theirs", "ours"), conventions(), ids=lambda text: text[:30])
def test_conventions_give_the_same_number_and_gradients(name, theirs, ours):
    KLD = re.search(r"`KLD` is `(.*?)`", README)[1]
    values = []
    for expression in (theirs.replace("KLD", f"({KLD})"), ours):
        tensors = {
            key: oracle.leaf(oracle.randn(N, *shape, seed=seed, dtype=torch.float64))
            for seed, (key, shape) in enumerate({"x_hat": SHAPE, "x": SHAPE, "mu": (4,), "logvar": (4,)}.items())
        }
        scope = {"torch": torch, "F": F, "Normal": Normal, "fe": fe, "N": N, "D": D, "w": 0.00025, "beta": 4.0, "s": 0.3}
        value = eval(expression, scope, tensors)
        values.append((value.detach(), *oracle.grads(value, list(tensors.values()))))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_passes_over_memory_of_the_classic_lines():
    mu, logvar, x_hat = (torch.randn(shape, requires_grad=True) for shape in ((50, 20), (50, 20), (50, 60)))
    x, g_z = torch.randn(50, 60), torch.randn(50, 20)
    with cost.Recorder() as traffic:
        std = torch.exp(0.5 * logvar)
        z = mu + torch.randn_like(std) * std
        reconstruction = F.mse_loss(x_hat, x, reduction="sum")
        KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        torch.autograd.backward([(reconstruction + KLD) / 50, z], [None, g_z])
    said = re.search(r"stream the latents (\d+)\s+times and the images (\d+) times", README)
    assert (traffic.passes[mu.numel()], traffic.passes[x.numel()]) == tuple(map(int, said.groups()))


def test_commands_exist(capsys):
    for command in sorted(set(re.findall(r"python -m fused_elbo (\w+)", README))):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
    assert "usage" in capsys.readouterr().out


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    said = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE))
    assert len(said) > 5
    for target in said:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_layers_are_named_as_they_are():
    root = Path(fe.__file__).parents[1]
    for name in re.findall(r"`([\w/]+\.(?:py|h|cpp))`", README):
        assert (root / name).exists() or [*root.glob(f"fused_elbo/**/{name}"), *root.glob(f"csrc/**/{name}")], name


def test_cpu_figures_are_those_of_the_record():
    rows = {(row["item"], row["backend"]): row for item in RECORD["items"] for row in item["rows"]}
    shapes = {"64": "8x8", "2,560": "128x20", "262,144": "128x2048", "16.8 million": "4096x4096", "12.6 million": "4096x3072"}
    lines = re.findall(r"^\| (latent stage|likelihood with gradient|classic)([^|]*)\|([^\n]*)\|$", README, re.MULTILINE)
    assert len(lines) == 7
    for stage, size, cells in lines:
        if stage == "classic":
            item = "classic 128x784x20"
        else:
            (shape,) = [s for n, s in {**shapes, "100,352": "128x784"}.items() if size.removeprefix(", ").startswith(n)]
            item = f"{'latent' if stage == 'latent stage' else 'nll'} {shape}"
        ours, alone = rows[item, "native"], rows[item, "native, operations alone"]
        figures = [f for row in (ours, alone) for f in (f"{row['ms']['ours']:.3g}", *(f"{r:.2f}" for r in row["ratios"]))]
        assert [cell.strip() for cell in cells.split("|")] == figures, item


def test_cpu_figures_in_words_are_those_of_the_record():
    rows = {(row["item"], row["backend"]): row for item in RECORD["items"] for row in item["rows"]}
    small = ("latent 8x8", "latent 128x20", "nll 8x8", "nll 128x784", "classic 128x784x20")
    autograd = [1e3 * (rows[i, "native"]["ms"]["ours"] - rows[i, "native, operations alone"]["ms"]["ours"]) for i in small]
    assert f"torch's autograd, {min(autograd):.0f} to {max(autograd):.0f} us a call" in README
    assert rows["nll 8x8", "native"]["ratios"][0] < 1, "the likelihood of 64 elements takes longer"
    worst = rows["nll 4096x30000", "native"]
    ms = worst["ms"]
    calls = [row for (item, backend), row in rows.items() if backend == "native" and not item.startswith("step")]
    ratio = min(ratio for row in calls for ratio in row["ratios"] if ratio)
    assert ratio == worst["ratios"][1], "the worst"
    said = f"{ms['ours']:.0f} ms, eager {ms['eager']:.0f}, `torch.compile` {ms['compiled']:.0f}, which is {ratio:.2f} of"
    assert said in README
