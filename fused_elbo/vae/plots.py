"""Pictures of a training run. They are drawn without pyplot, so that no window system is needed or touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .model import VAE
from .run_folder import LOSS_CURVE, RECONSTRUCTIONS, SAMPLES, replace

RECONSTRUCTION_COUNT = 12
SAMPLE_ROWS = 8
SAMPLE_COLUMNS = 12


def draw_run(folder: Path, metrics: dict[str, Any], model: VAE, heldout: Tensor) -> None:
    """Write the three pictures of a run: loss curve, reconstructions of ``heldout`` (N, 1, 28, 28), samples of the prior."""
    config = metrics["config"]
    title = f"{config['model']} VAE, {config['loss']} loss, {config['latent_dim']} latents"
    draw_losses(folder / LOSS_CURVE, {config["loss"]: metrics}, title)

    x = heldout[:RECONSTRUCTION_COUNT]
    model.eval()
    with torch.no_grad():
        x_hat = model(x).x_hat
    draw_images(folder / RECONSTRUCTIONS, torch.stack((x, x_hat)).cpu(), "held-out digits above their reconstructions")

    samples = model.sample(SAMPLE_ROWS * SAMPLE_COLUMNS).reshape(SAMPLE_ROWS, SAMPLE_COLUMNS, *x.shape[1:])
    draw_images(folder / SAMPLES, samples.cpu(), "decoded samples of the prior")


def draw_losses(path: Path, runs: Mapping[str, dict[str, Any]], title: str) -> None:
    """Training loss by step and held-out negative ELBO by epoch; several runs in one picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = ({"color": "tab:blue", "linestyle": "-", "marker": "o"}, {"color": "tab:orange", "linestyle": ":", "marker": "x"})
    settled, lowest = [], []
    for (name, metrics), style in zip(runs.items(), styles, strict=False):
        losses = metrics["steps"]["loss"]
        line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.5, "alpha": 0.6}
        axes.plot(range(1, len(losses) + 1), losses, label=f"{name}: training loss", **line)
        settled.append(max(losses[len(losses) // 20 :]))
        lowest.append(min(losses))
        steps = [epoch["last_step"] for epoch in metrics["epochs"]]
        negative_elbo = [-epoch["heldout"]["elbo"] for epoch in metrics["epochs"]]
        point = {"color": style["color"], "marker": style["marker"], "linestyle": "none", "zorder": 3}
        axes.plot(steps, negative_elbo, label=f"{name}: held-out negative ELBO", **point)
    # The first steps fall by a thousand nats, and would flatten the rest of the curve.
    axes.set_ylim(min(lowest) - 20, max(settled) + 20)
    axes.set(xlabel="step (the first ones lie above the picture)", ylabel="nats per digit", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_images(path: Path, rows: Tensor | Sequence[Tensor], title: str) -> None:
    """A grid of images, (rows, columns, 1, height, width) in [0, 1]."""
    grid = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows], dim=0)
    height, width = grid.shape
    figure = Figure(figsize=(width / 40, height / 40 + 0.35), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    replace(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=120))
