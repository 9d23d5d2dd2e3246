"""What the libraries are called, which interface they implement, and whether a file is one that may be loaded.

Standard library only, and nothing of ours: ``csrc/build.py`` reads this file where torch cannot be imported.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# A library runs with this version of torch and every later one.
TORCH_TARGET = (2, 10)

SCHEMAS = (
    "rsample_kl(Tensor mu, Tensor logvar, Tensor? seed, Tensor? eps, int first_index, int offset, Tensor(a!)? z, bool want_kl)"
    " -> Tensor?",
    "rsample_kl_backward(Tensor? g_z, Tensor? g_kl, Tensor mu, Tensor logvar, Tensor? seed, Tensor? eps, int first_index,"
    " int offset, Tensor(a!)? g_mu, Tensor(b!)? g_logvar) -> ()",
    "elbo(Tensor x_hat, Tensor x, Tensor? mu, Tensor? logvar, Tensor? kl, float beta, Tensor? beta_tensor, float grad_scale,"
    " Tensor? grad_scale_tensor, float? weight, float precision, float constant, Tensor(a!)? g_x_hat, Tensor(b!)? g_x,"
    " Tensor(c!)? g_mu, Tensor(d!)? g_logvar, Tensor(e!)? g_kl) -> (Tensor?, Tensor, Tensor?)",
    "gaussian_nll_backward(Tensor g_nll, Tensor x_hat, Tensor x, float scale, float? expected, Tensor? expected_tensor,"
    " Tensor(a!)? g_x_hat, Tensor(b!)? g_x) -> ()",
    "rescale_(Tensor(a!)[] gradients, Tensor upstream, float expected, Tensor? expected_tensor) -> ()",
    "likelihood(Tensor x_hat, Tensor x, Tensor? log_scale_tensor, Tensor? weight, Tensor? mask, Tensor? upstream, int family,"
    " int activation, float log_scale, float constant, float scale, float shift, Tensor(a!)? nll, Tensor(b!)? slope,"
    " Tensor(c!)? g_x_hat, Tensor(d!)? g_x, Tensor(e!)? g_log_scale) -> ()",
    "posterior(Tensor mu, Tensor raw, Tensor? prior_mean, Tensor? prior_raw, Tensor? seed, Tensor? eps, int first_index,"
    " int offset, int param, float min_std, int clamp, float low, float high, float? free_bits, Tensor(a!)? z,"
    " Tensor(b!)? kl_rows, Tensor(c!)? kl_elements, Tensor(d!)? log_ratio) -> ()",
    "posterior_backward(Tensor? g_z, Tensor? g_kl, Tensor? g_log_ratio, Tensor? path_weight, Tensor mu, Tensor raw,"
    " Tensor? prior_mean, Tensor? prior_raw, Tensor? seed, Tensor? eps, int first_index, int offset, int samples, int param,"
    " float min_std, int clamp, float low, float high, float? free_bits, float posterior_share, float prior_share,"
    " Tensor(a!)? g_mu, Tensor(b!)? g_raw, Tensor(c!)? g_prior_mean, Tensor(d!)? g_prior_raw) -> ()",
)

# Of two operators that ``fused_elbo.operators`` defines for every device, for which the CPU's library has kernels.
DRAW_SEED = "(Tensor like) -> Tensor"
NORMALS = "(Tensor seed, SymInt[] shape, SymInt first_index, SymInt offset, bool wide) -> Tensor"

LIBRARIES = {"cpu": "libfused_elbo_cpu.so", "cuda": "libfused_elbo_cuda.so"}
FOLDER = Path(__file__).parents[2] / "lib"
FOLDER_VARIABLE = "FUSED_ELBO_LIB"


def location(device_type: str) -> Path:
    """Where the library for ``device_type`` is looked for."""
    return Path(os.environ.get(FOLDER_VARIABLE) or FOLDER, LIBRARIES[device_type]).absolute()


def interface() -> str:
    """Names what a library and its caller must agree on."""
    text = "\n".join((*SCHEMAS, DRAW_SEED, NORMALS, version(TORCH_TARGET)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def fingerprint(library: Path) -> dict[str, Any]:
    """The part of a manifest that tells one file from another."""
    content = library.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest_of(library: Path) -> Path:
    """The file beside a library that says what it is."""
    return library.with_suffix(".json")


def read_manifest(library: Path) -> dict[str, Any]:
    """What ``csrc/build.py`` wrote about a library; raises OSError or ValueError where that cannot be read."""
    manifest = json.loads(manifest_of(library).read_text())
    if not isinstance(manifest, dict):
        raise ValueError(f"holds a {type(manifest).__name__}")
    return manifest


def problem(library: Path) -> str | None:
    """Why a library that lies there may not be loaded, in one line; None if it may.

    The loader of shared libraries trusts what it maps: a truncated file kills the process. So every byte is compared first.
    """
    try:
        manifest = read_manifest(library)
    except (OSError, ValueError) as error:
        return f"{library} has no manifest that can be read ({' '.join(str(error).split())})"
    built_for = manifest.get("interface")
    if built_for != interface():
        return f"{library} was built for another version of fused_elbo (interface {built_for}, this is {interface()})"
    try:
        found = fingerprint(library)
    except OSError as error:
        return f"{library} cannot be read ({error.strerror})"
    for name, value in found.items():
        if manifest.get(name) != value:
            return f"{library} is truncated or altered ({name} {value}, its manifest says {manifest.get(name)})"
    return None
