"""The folder of a training run: who may write there, and files that are whole or not there at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig, conflicts

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.json"
LOSS_CURVE = "loss_curve.png"
RECONSTRUCTIONS = "reconstructions.png"
SAMPLES = "samples.png"


class RunError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


def require_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ``RunError`` where ``folder`` holds a run that nobody asked to touch, or holds none to resume."""
    exists = (folder / CHECKPOINT).exists()
    if resume and not exists:
        raise RunError(f"--resume: there is no {CHECKPOINT} in {folder}")
    if exists and not resume and not overwrite:
        raise RunError(
            f"{folder} already holds a run: continue it with --resume, replace it with --overwrite, or use another --out"
        )


def open_folder(config: TrainConfig) -> Path:
    """Make the run folder, empty of a run that is to be overwritten.

    Raises:
        RunError: it cannot be written.
    """
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            for name in (CHECKPOINT, METRICS, LOSS_CURVE, RECONSTRUCTIONS, SAMPLES):
                (folder / name).unlink(missing_ok=True)
        replace(folder / ".writable", lambda path: path.touch())
        (folder / ".writable").unlink()
    except OSError as error:
        raise RunError(f"--out: cannot write to {folder}: {error.strerror}") from error
    return folder


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and rename it: whoever reads ``path`` finds the old file or the new one, whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    replace(path, lambda unfinished: unfinished.write_text(text))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint of a run, whole or not at all."""
    replace(folder / CHECKPOINT, lambda unfinished: torch.save(state, unfinished))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run, with its tensors on the CPU.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    require_free(folder, resume=True, overwrite=False)
    try:
        return torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{folder / CHECKPOINT} cannot be read: {error.strerror}") from error
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise RunError(f"{folder / CHECKPOINT} is damaged, or no checkpoint: start anew with --overwrite") from error


def require_same(config: TrainConfig, stored: dict[str, Any], epochs_done: int) -> None:
    """Raise ``RunError`` where ``config`` is not the continuation of the run that ``stored`` describes."""
    found = conflicts(config, stored)
    if config.epochs < epochs_done:
        found.append(f"--epochs got {config.epochs}, the checkpoint has {epochs_done} behind it")
    if found:
        raise RunError(f"--resume: {'; '.join(found)}: leave that option out, or start anew with --overwrite")
