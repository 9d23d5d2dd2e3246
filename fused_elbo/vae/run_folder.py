"""The folder of a training run: who may write there, and files that are whole or not there at all."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig, conflicts, option

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.json"
LOSS_CURVE = "loss_curve.png"
RECONSTRUCTIONS = "reconstructions.png"
SAMPLES = "samples.png"


class RunError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


def require_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ``RunError`` where ``folder`` holds a run that nobody asked to touch, or holds none to resume."""
    try:
        exists = (folder / CHECKPOINT).exists()
    except OSError as error:
        raise RunError(f"--out: cannot look into {folder}: {error.strerror}") from error
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
    """Write the checkpoint of a run, whole or not at all.

    Raises:
        RunError: there is no room for it, or it must not be written.
    """
    try:
        replace(folder / CHECKPOINT, lambda unfinished: torch.save(state, unfinished))
    except (OSError, RuntimeError) as error:
        # Of a full disk torch says that a position was unexpected.
        reason = str(error).partition("\n")[0]
        raise RunError(f"--out: cannot write {folder / CHECKPOINT}, is there room for it? {reason}") from error


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run, with its tensors on the CPU.

    Raises:
        RunError: there is none, it cannot be read, or it is not of a run of this version.
    """
    require_free(folder, resume=True, overwrite=False)
    try:
        # torch.load leaves the check sums alone.
        with zipfile.ZipFile(folder / CHECKPOINT) as archive:
            whole = archive.testzip() is None
        state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{folder / CHECKPOINT} cannot be read: {error.strerror}") from error
    except Exception as error:
        # What a reader stumbles over in a damaged file may be anything: a name that is no text, a number that is no index.
        raise RunError(damaged(folder)) from error
    if not whole or not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise RunError(damaged(folder))
    unknown = sorted(state["config"].keys() - {field.name for field in fields(TrainConfig)})
    if unknown:
        raise RunError(
            f"{folder / CHECKPOINT} was made with {', '.join(map(option, unknown))}, which this version does not have"
        )
    return state


def damaged(folder: Path) -> str:
    """What to say of a checkpoint that nothing can be made of."""
    return f"{folder / CHECKPOINT} is damaged, or no checkpoint: start anew with --overwrite"


def require_same(config: TrainConfig, stored: dict[str, Any], epochs_done: int) -> None:
    """Raise ``RunError`` where ``config`` is not the continuation of the run that ``stored`` describes."""
    found = conflicts(config, stored)
    if config.epochs < epochs_done:
        found.append(f"--epochs got {config.epochs}, the checkpoint has {epochs_done} behind it")
    if found:
        raise RunError(f"--resume: {'; '.join(found)}: leave that option out, or start anew with --overwrite")
