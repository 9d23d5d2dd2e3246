"""The fused loss and the eager one, side by side: the same training twice, each in a process of its own."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import run_folder, signals
from .config import LOSSES, TrainConfig, option

COMPARISON = "comparison.json"
PICTURE = "comparison.png"

# Of each loss, timed in turns: a second or two.
TIMED_STEPS = 60


class TrainingFailed(RuntimeError):
    """One of the two trainings did not finish and has said why; ``code`` is the exit code to hand on."""

    def __init__(self, code: int) -> None:
        super().__init__(f"training ended with code {code}")
        self.code = code


def compare(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train with each loss into ``folder/fused`` and ``folder/eager``; write comparison.json and comparison.png.

    Each runs in a fresh process, so that its peak memory is its own.

    Args:
        config: of both; its ``loss`` and ``out`` are not used, and its ``head`` only with the fused loss.
        folder: where the two run folders go.

    Returns:
        The content of comparison.json: ``summary``, and by loss ``median_step_ms_in_turns``, of steps timed afterwards.

    Raises:
        RunError: ``folder`` holds a run and neither resume nor overwrite was asked for, or the other way round.
        TrainingFailed: one of the trainings ended early.
    """
    for loss in LOSSES:
        # With --resume the second one may not have been begun.
        if not (config.resume and loss != LOSSES[0]):
            run_folder.require_free(folder / loss, resume=config.resume, overwrite=config.overwrite)
    for outdated in (folder / COMPARISON, folder / PICTURE):
        if outdated.exists():
            outdated.unlink()
    heads = {loss: config.head if loss == "fused" else TrainConfig.head for loss in LOSSES}
    configs = {loss: replace(config, loss=loss, head=head, out=str(folder / loss)) for loss, head in heads.items()}
    metrics = {}
    for loss, one in configs.items():
        if not config.quiet:
            print(f"{loss} loss:", flush=True)
        _train_in_subprocess(replace(one, resume=config.resume and (one.folder / run_folder.CHECKPOINT).exists()))
        metrics[loss] = json.loads((one.folder / run_folder.METRICS).read_text())

    from . import plots
    from .training import steps_in_turns

    content = summary(metrics) | {"median_step_ms_in_turns": steps_in_turns(configs, TIMED_STEPS)}
    run_folder.write_json(folder / COMPARISON, content)
    plots.draw_losses(folder / PICTURE, metrics, f"{config.model} VAE: the same training with the fused and the eager loss")
    return content


def summary(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the metrics of two trainings, by loss, have to say about each other.

    Returns:
        ``environment``; ``heldout_elbo`` by loss and epoch (nats per digit), their ``heldout_elbo_difference``; ``steps``, and
        ``largest_step_difference``, in nats, of the two losses of a step; by loss ``heldout_log_likelihood``,
        ``training_seconds``, ``median_step_ms`` and ``peak_memory_mib``, and what that last one means.
    """
    fused, eager = metrics.values()
    elbo = {loss: [epoch["heldout"]["elbo"] for epoch in m["epochs"]] for loss, m in metrics.items()}
    steps = list(zip(fused["steps"]["loss"], eager["steps"]["loss"], strict=True))
    return {
        "environment": fused["environment"],
        "heldout_elbo": elbo,
        "heldout_elbo_difference": [f - e for f, e in zip(*elbo.values(), strict=True)],
        "heldout_log_likelihood": {loss: m["heldout_log_likelihood"] for loss, m in metrics.items()},
        "steps": len(steps),
        "largest_step_difference": max(abs(f - e) for f, e in steps),
        "training_seconds": {loss: sum(epoch["seconds"] for epoch in m["epochs"]) for loss, m in metrics.items()},
        "median_step_ms": {loss: statistics.median(m["steps"]["ms"]) for loss, m in metrics.items()},
        "peak_memory_mib": {loss: m["peak_memory_mib"] for loss, m in metrics.items()},
        "peak_memory_meaning": fused["peak_memory_meaning"],
    }


def table(content: dict[str, Any]) -> str:
    """What ``compare`` returns as a table to print."""
    environment = content["environment"]
    elbo = content["heldout_elbo"]
    header = f"{'':<32}{'fused':>12}{'eager':>12}{'difference':>14}"
    lines = [
        f"device {environment['device']} ({environment['device_name']}), fused backend {environment['backend']}",
        "",
        header,
    ]
    rows = zip(elbo["fused"], elbo["eager"], content["heldout_elbo_difference"], strict=True)
    for epoch, (fused, eager, difference) in enumerate(rows, 1):
        lines.append(f"{f'held-out ELBO, nats, epoch {epoch}':<32}{fused:>12.3f}{eager:>12.3f}{difference:>+14.6f}")
    likelihoods = content["heldout_log_likelihood"]
    if None not in likelihoods.values():
        fused, eager = (likelihoods[loss]["nats"] for loss in LOSSES)
        name = f"held-out ln p(x), nats, K = {likelihoods[LOSSES[0]]['samples']}"
        lines.append(f"{name:<32}{fused:>12.3f}{eager:>12.3f}{fused - eager:>+14.6f}")
    for name, key, digits in (
        ("training seconds", "training_seconds", 2),
        ("median step in turns, ms", "median_step_ms_in_turns", 2),
        ("peak memory, MiB", "peak_memory_mib", 1),
    ):
        values = content[key]
        cells = ["n/a" if values[loss] is None else f"{values[loss]:.{digits}f}" for loss in LOSSES]
        lines.append(f"{name:<32}{cells[0]:>12}{cells[1]:>12}")
    lines += [
        "",
        f"In {content['steps']} steps the two training losses differ by {content['largest_step_difference']:.1e} nats at most.",
        f"Peak memory is {content['peak_memory_meaning']}. The eager times leave out the drawing of the noise.",
    ]
    if environment["backend"].endswith(".reference"):
        lines += [
            "The backend here is the reference: the fused loss ran as its plain-PyTorch fallback. That shows that the numbers",
            "agree, and claims nothing about speed or memory: for those it takes a device that has a fused backend.",
        ]
    return "\n".join(lines)


def _train_in_subprocess(config: TrainConfig) -> None:
    command = [sys.executable, "-m", "fused_elbo", "train"]
    for name, value in asdict(config).items():
        if value is True:
            command.append(option(name))
        elif value is not False and value is not None:
            command += [option(name), str(value)]
    process = subprocess.Popen(command)
    try:
        # Without it the training would go on alone.
        with signals.answered((signal.SIGTERM,), process.terminate):
            code = process.wait()
    except KeyboardInterrupt:
        # A terminal has sent Ctrl-C to both processes, `kill` only to this one. A second signal may end what has saved already.
        process.send_signal(signal.SIGINT)
        code = process.wait()
    if code:
        # As a shell says it of a process that a signal has ended.
        raise TrainingFailed(code if code > 0 else 128 - code)
