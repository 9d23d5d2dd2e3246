"""A library that cannot be used: one line says why, once, and the reference runs. It never crashes and is never silent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fused_elbo as fe
from fused_elbo import ops, reference
from fused_elbo.backends import native
from fused_elbo.backends.native import library, tools

BUILT = library.location("cpu")

needs_library = pytest.mark.skipif(native.unavailable("cpu") is not None, reason=f"cpu: {native.unavailable('cpu')}")


@pytest.fixture
def forgotten(monkeypatch):
    """What the process remembers of backends and libraries is as if nothing had been asked yet, and restored."""
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(native, "_reasons", {})
    ops._default.cache_clear()
    ops._warn.cache_clear()
    yield
    ops._default.cache_clear()
    ops._warn.cache_clear()


@pytest.fixture
def path(forgotten, monkeypatch, tmp_path) -> Path:
    """Where the CPU library of this test belongs. There is none yet."""
    monkeypatch.setenv(library.FOLDER_VARIABLE, str(tmp_path))
    return library.location("cpu")


@pytest.fixture
def copy(path) -> Path:
    """A copy of the good library."""
    shutil.copy(BUILT, path)
    shutil.copy(library.manifest_of(BUILT), library.manifest_of(path))
    return path


def write_manifest(path: Path, **changes: object) -> None:
    """A manifest that is right in everything that is not changed."""
    manifest = {"interface": library.interface(), "architectures": [], **library.fingerprint(path), **changes}
    library.manifest_of(path).write_text(json.dumps(manifest))


def compile_library(source: str, path: Path) -> None:
    try:
        cxx = tools.cxx()
    except tools.MissingTool as error:
        pytest.skip(str(error))
    subprocess.run([*cxx, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)], input=source, text=True, check=True)
    write_manifest(path)


def check_falls_back(*words: str) -> None:
    """The reference runs on a CPU with one warning of one line, which holds the words; to ask for native is an error."""
    mu = torch.randn(4, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [fe.kl_divergence(mu, mu, reduction="none") for _ in range(3)]
    assert torch.equal(found[-1], reference.kl_divergence(mu, mu))
    assert [w.category for w in caught] == [RuntimeWarning]
    reason = native.unavailable("cpu")
    for text in (reason, str(caught[0].message)):
        assert "\n" not in text
        assert all(word in text for word in words), text
    with fe.backend("native"), pytest.raises(RuntimeError, match="was asked for and cannot run"):
        fe.kl_divergence(mu, mu)
    with fe.backend("reference"):
        fe.kl_divergence(mu, mu)


def test_missing(path):
    check_falls_back("there is no", str(path), "make build")


def test_missing_with_no_compiler(path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    check_falls_back("there is no", "CXX=/nonexistent/g++ is not a program here")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in native.remedy("cpu")


@needs_library
@pytest.mark.parametrize("part", [0.0, 0.0001, 0.1, 0.5, 0.9999])
def test_truncated(copy, part):
    content = copy.read_bytes()
    copy.write_bytes(content[: int(part * len(content))])
    check_falls_back("truncated or altered", "size")


@needs_library
@pytest.mark.parametrize("where", [0.0, 0.3, 0.999])
def test_flipped_bit(copy, where):
    content = bytearray(copy.read_bytes())
    content[int(where * len(content))] ^= 1
    copy.write_bytes(content)
    check_falls_back("truncated or altered", "sha256")


@needs_library
@pytest.mark.parametrize("text", [None, b"", b"{", b"[1]", b"\xff\xfe"])
def test_no_manifest(copy, text):
    manifest = library.manifest_of(copy)
    manifest.unlink() if text is None else manifest.write_bytes(text)
    check_falls_back("no manifest that can be read", "make build")


@needs_library
def test_built_for_another_interface(copy, monkeypatch):
    monkeypatch.setattr(library, "SCHEMAS", (*library.SCHEMAS[:-1], "rescale_(Tensor(a!)[] gradients, Tensor upstream) -> ()"))
    check_falls_back("built for another version of fused_elbo", "make build")


def test_a_manifest_that_says_nothing(path):
    path.write_bytes(b"")
    library.manifest_of(path).write_text("{}")
    check_falls_back("another version of fused_elbo (interface None")


def test_not_a_library(path):
    path.write_text("a text")
    write_manifest(path)
    check_falls_back("does not load", str(path))


def test_a_folder(path):
    path.mkdir()
    library.manifest_of(path).write_text(json.dumps({"interface": library.interface()}))
    check_falls_back("cannot be read")


def test_undefined_symbol(path):
    compile_library('extern "C" int nowhere_defined(); extern "C" int use() { return nowhere_defined(); }', path)
    check_falls_back("does not load", "nowhere_defined")


def test_another_library(path):
    compile_library('extern "C" int something_else() { return 1; }', path)
    check_falls_back("does not load", "fused_elbo_capability")


@needs_library
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizers are there")
def test_sanitized_without_the_sanitizers(copy):
    write_manifest(copy, sanitize=True)
    check_falls_back("sanitizers")


@needs_library
def test_torch_too_old(copy, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    check_falls_back("torch 2.9.1+cpu is older than 2.10")


@needs_library
def test_a_good_library_warns_of_nothing(forgotten):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.select(torch.device("cpu")) is native


def test_other_devices(forgotten, monkeypatch):
    assert "no library for 'mps'" in native.unavailable("mps")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in native._load("cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in native._load("cuda")


@pytest.mark.parametrize(
    ("gpus", "driver", "words"),
    [
        ([(7, 5)], 13000, ("from sm_80 on", "here is sm_75")),
        ([(7, 5), (9, 0)], 12080, ("built with CUDA 13.1", "the driver's is 12.8")),
        ([(9, 0)], 13000, ()),
        ([(12, 0)], 14000, ()),
    ],
)
def test_what_a_cuda_library_needs(path, monkeypatch, gpus, driver, words):
    path.write_bytes(b"")
    write_manifest(path, architectures=["sm_80", "sm_90", "compute_100"], cuda="13.1")

    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version) -> None:
            version._obj.value = driver

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    monkeypatch.setattr(native.ctypes, "CDLL", Driver)
    reason = native._cuda_problem(path)
    assert all(word in reason for word in words) if words else reason is None


def run(program: list[str], **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in (ops.ENVIRONMENT_VARIABLE, native.PROCESSOR_VARIABLE)}
    return subprocess.run(
        [sys.executable, *program], env={**kept, **environment}, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )


PROGRAM = """
import torch, fused_elbo as fe
t = torch.ones(2, 3)
fe.kl_divergence(t, t)
print(fe.kl_divergence(t, t).item())
"""


@needs_library
def test_a_whole_program_with_half_a_library(tmp_path):
    half = tmp_path / BUILT.name
    half.write_bytes(BUILT.read_bytes()[:100_000])
    shutil.copy(library.manifest_of(BUILT), tmp_path)
    done = run(["-c", PROGRAM], **{library.FOLDER_VARIABLE: str(tmp_path)})
    assert done.returncode == 0
    assert float(done.stdout) == pytest.approx(3 * 0.5 * (1 + 2.718281828 - 1 - 1), rel=1e-6)
    assert done.stderr.count("RuntimeWarning") == 1
    assert "truncated or altered" in done.stderr
    report = run(["-m", "fused_elbo", "doctor"], **{library.FOLDER_VARIABLE: str(tmp_path)})
    assert report.returncode == 0
    assert f"not in use: {half} is truncated or altered" in report.stdout
    assert "runs on reference" in report.stdout


@needs_library
def test_doctor_says_what_is_in_use():
    report = run(["-m", "fused_elbo", "doctor"])
    assert report.returncode == 0
    assert f"in use: {native.supported()[0]}" in report.stdout
    assert "runs on native" in report.stdout
    assert library.read_manifest(BUILT)["compiler"] in report.stdout


@needs_library
def test_an_instruction_set_that_is_none():
    report = run(["-m", "fused_elbo", "doctor"], FUSED_ELBO_CPU="nonsense", FUSED_ELBO_BACKEND="native")
    assert report.returncode == 1
    assert f"FUSED_ELBO_CPU=nonsense is none of what this processor has: {' '.join(native.supported())}" in report.stdout


@needs_library
def test_imported_twice():
    done = run(["-W", "error", "-c", """
import sys, torch
import fused_elbo as fe
from fused_elbo.backends import native
t = torch.ones(2, 3)
expected = native.rsample_kl(t, t, None, want_kl=True)[1] if native.unavailable("cpu") is None else None
del sys.modules["fused_elbo.backends.native"], native
import gc; gc.collect()
import fused_elbo.backends.native as again
assert again.unavailable("cpu") is None
assert torch.equal(again.rsample_kl(t, t, None, want_kl=True)[1], expected)
"""])  # fmt: skip
    assert done.returncode == 0, done.stderr
