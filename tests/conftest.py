"""Fixtures: the backends as one parametrisation, the device, uninitialised memory that shows, and property tests."""

from __future__ import annotations

import contextlib
import importlib
import math
import os

import hypothesis
import pytest
import torch

# Both are read when a library is first used, so they stand before the import of ours.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available() and "triton" not in os.environ.get("FUSED_ELBO_PTX", ""):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fused_elbo as fe
from fused_elbo import ops

REQUIRED = os.environ.get("FUSED_ELBO_REQUIRE_BACKENDS", "").replace(",", " ").split()

# Backends whose kernels, without a GPU, are compiled for one and run by the machine in tests/ptx.
PTX = [] if torch.cuda.is_available() else os.environ.get("FUSED_ELBO_PTX", "").replace(",", " ").split()
for name in PTX:
    importlib.import_module(f"ptx.{name}").install()

hypothesis.settings.register_profile(
    "fused_elbo",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("fused_elbo")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """A buffer that a kernel forgets to write must not pass by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_device(device):
    """Tensors are made on the device where nothing else is said."""
    with contextlib.nullcontext() if device.type == "cpu" else device:
        yield


@pytest.fixture(params=("reference", "native", "triton"))
def backend(request, device):
    """The name of the backend that runs the test's operations."""
    reason = ops.unavailable(request.param, device.type)
    if reason is not None:
        message = f"backend {request.param!r} cannot run on {device.type!r}: {reason}"
        pytest.fail(message) if request.param in REQUIRED else pytest.skip(message)
    with fe.backend(request.param):
        yield request.param


@pytest.fixture
def interpreted(backend, device) -> bool:
    """Whether kernels are run in Python, where sizes and counts must stay small."""
    return backend in ("triton", *PTX) and device.type == "cpu"


@pytest.fixture(params=("narrow", "wide"))
def small_launches(request, backend, monkeypatch):
    """Loops over tiles, over programs and over their partial sums, at sizes that the interpreter has time for."""
    if backend != "triton":
        if request.param == "wide":
            pytest.skip("the width of an index is the Triton kernels' own")
        return
    from fused_elbo.backends import triton
    from fused_elbo.backends.triton import launch

    monkeypatch.setattr(launch, "TILE", dict.fromkeys(launch.TILE, 32))
    monkeypatch.setattr(launch, "STEPS", ((math.inf, 3),))
    monkeypatch.setattr(launch, "COMBINE_WIDTH", 1)
    monkeypatch.setattr(triton, "RESCALE_BLOCK", 16)
    monkeypatch.setattr(triton, "RESCALE_PROGRAMS", 2)
    if request.param == "wide":
        monkeypatch.setattr(launch, "WIDE_FROM", 0)


@pytest.fixture
def every(backend):
    """``every(strategy)(check)`` calls ``check`` with examples of the strategy, as many as the backend has time for."""

    def decorate(strategy):
        def run(check):
            # Triton takes its time for each, to interpret a kernel or to compile one.
            settings = hypothesis.settings(max_examples=12 if backend in ("triton", *PTX) else 60)
            settings(hypothesis.given(strategy)(check))()

        return run

    return decorate


@pytest.fixture
def one_thread(monkeypatch):
    """For trainings so small that threads cost more than they bring, here and in subprocesses."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """A folder with a few of the real digits as IDX files."""
    import training_runs

    folder = tmp_path_factory.mktemp("digits")
    training_runs.write_digits(folder)
    return str(folder)


@pytest.fixture
def config(data, tmp_path):
    """A short training on those digits."""
    from fused_elbo.vae import TrainConfig

    return TrainConfig(epochs=2, data=data, device="cpu", out=str(tmp_path / "run"), quiet=True)


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def original(diffusers) -> type:
    """The distribution of diffusers itself."""
    from diffusers.models.autoencoders import vae

    return vae.DiagonalGaussianDistribution


@pytest.fixture
def calls(monkeypatch, device) -> list[str]:
    """The names of the latent operations that the device's backend is asked for."""
    import spies

    return spies.counted(monkeypatch, device)
