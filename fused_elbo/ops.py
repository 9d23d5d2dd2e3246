"""Which backend runs an operation.

A backend is a module with ``unavailable(device_type) -> reason | None`` and the operations that docs/backends.md lists, with
the arguments that they have in ``reference``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

BACKENDS = {
    "native": "fused_elbo.backends.native",
    "triton": "fused_elbo.backends.triton",
    "reference": "fused_elbo.reference",
}

# In order of preference. A backend that is not listed for a device runs there only where it is asked for by name.
# The order on CUDA is a prediction: the kernels of both move the same bytes, and a launch from C++ costs the host a fraction of
# Triton's, which goes through Python.
DEFAULTS = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
OTHER_DEVICES = ("reference",)

ENVIRONMENT_VARIABLE = "FUSED_ELBO_BACKEND"

# The variable may change at any time, so every call looks for it; os.environ.get, which encodes the name and raises inside
# where there is none, takes three times as long as all else that chooses a backend.
_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("fused_elbo_backend", default=None)
# On a GPU a backward, and what a checkpoint computes again in it, runs in a thread of autograd's. It has none of the caller's
# context variables, but what the caller has stashed under a name.
_STASH = "fused_elbo_backend"


def unavailable(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot run on ``device_type`` ("cpu", "cuda"); None if it can."""
    module, reason = _load(_known(name))
    return reason if module is None else module.unavailable(device_type)


def select(device: torch.device) -> ModuleType:
    """The backend for ``device``: the one asked for by ``backend()`` or the environment, else the best available.

    Raises:
        RuntimeError: the backend that was asked for cannot run there.
    """
    name = _asked() or (_KEY in os.environ._data and os.environ[ENVIRONMENT_VARIABLE])
    if name:
        reason = unavailable(name, device.type)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for and cannot run on {device.type!r}: {reason}")
        return _load(name)[0]
    return _default(device)


def requested() -> str | None:
    """The name of the backend that was asked for; None where the choice is free."""
    return _asked() or os.environ.get(ENVIRONMENT_VARIABLE) or None


# A compiler that traces a call does not see into context variables.
requested._dynamo_marked_constant = True


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operations of a ``with`` block, and their backward passes, on one backend.

    What was compiled has no such memory: its backward runs on the backend that is asked for where it runs.

    Args:
        name: "native", "triton" or "reference".

    Raises:
        ValueError: no backend has that name. That it cannot run is said by the first operation, as a RuntimeError.
    """
    before, token = _requested.get(), _requested.set(_known(name))
    torch._C._stash_obj_in_tls(_STASH, name)
    try:
        yield
    finally:
        _requested.reset(token)
        torch._C._stash_obj_in_tls(_STASH, before)


def _asked() -> str | None:
    name = _requested.get()
    # Within a backward alone: another task of the same thread must not see it.
    if name is None and torch._C._current_graph_task_id() >= 0 and torch._C._is_key_in_tls(_STASH):
        return torch._C._get_obj_in_tls(_STASH)
    return name


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, takes one of {sorted(BACKENDS)}")
    return name


@functools.cache
def _default(device: torch.device) -> ModuleType:
    candidates = DEFAULTS.get(device.type, OTHER_DEVICES)
    failed = []
    for name in candidates:
        reason = unavailable(name, device.type)
        if reason is None:
            break
        failed.append(f"{name} cannot run on {device.type!r}: {reason}")
    if failed:
        _warn(
            f"fused_elbo: {'; '.join(failed)} (so {name} runs; {ENVIRONMENT_VARIABLE}={name} asks for that without a warning)"
        )
    return _load(name)[0]


@functools.cache
def _warn(message: str) -> None:
    """Once in a process, also where there are several devices of a kind."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(BACKENDS[name]), None
    except (ImportError, AttributeError) as error:
        # AttributeError: a version of a package that lacks what the backend uses.
        return None, f"import failed: {error}"
