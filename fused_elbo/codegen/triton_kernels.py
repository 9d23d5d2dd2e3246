"""The Triton kernels, compiled as the host code launches them, for a GPU that need not be there."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .. import spec
from ..backends import triton as backend
from ..backends.triton.launch import WARPS
from . import sass
from .hardware import LANES_PER_WARP
from .report import Row, rows_of, takes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the variants only whether they compile is of interest, and what is computed with decides that. Elements of 2 bytes are
# tried with the kernels of the noise, which take 8 of them at a time; float16 is loaded as bfloat16 is.
VARIANT_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
VARIANT_ARCHITECTURE = 90
NARROW = 2
# Arguments that give the tile of a kernel's loops over tensors, from the one with the fewest instructions on.
TILE = ("BLOCK", "ROWS")
TILES = {
    "elbo": {", data": TILE, ", latents": ("LATENT_BLOCK", "LATENT_ROWS")},
    # A program has one tile there, so that its only loop is over samples.
    "posterior with log ratios": {", a sample": TILE},
}

# Large enough for the launch rule's full tile and loop; the tensors have no memory.
SHAPE = (64, 2**18)
PAIRS = (16, 4, 2**18)


def launches(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A launch of each kernel, with every output wanted, by name; the tensors live on no device."""

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    terms = torch.empty(SHAPE[0], dtype=torch.float32, device="meta")
    scalar = torch.empty((), dtype=torch.float32, device="meta")
    noise = spec.Noise(seed=torch.empty((), dtype=torch.int64, device="meta"))
    likelihood = spec.Gaussian()
    a, b = tensor(*SHAPE), tensor(*SHAPE)
    data = spec.Gradients(x_hat=tensor(*SHAPE))
    latent = spec.Gradients(mu=tensor(*SHAPE), logvar=tensor(*SHAPE))
    return {
        "rsample_kl": lambda: backend.rsample_kl(a, b, noise, want_kl=True),
        "rsample_kl_backward": lambda: backend.rsample_kl_backward(tensor(*SHAPE), terms, a, b, noise, latent),
        "gaussian_nll": lambda: backend.elbo(
            a, b, None, None, terms, 1.0, likelihood, data._replace(kl=scalar), weight=1.0
        ),
        "gaussian_nll without gradient": lambda: backend.elbo(
            a, b, None, None, None, 1.0, likelihood, spec.Gradients(), weight=1.0
        ),
        "elbo": lambda: backend.elbo(
            a, b, tensor(*SHAPE), tensor(*SHAPE), None, 1.0, likelihood, latent._replace(x_hat=data.x_hat), weight=1.0,
        ),
        "gaussian_nll_backward": lambda: backend.gaussian_nll_backward(terms, a, b, likelihood, data),
        "rescale": lambda: backend.rescale_([data.x_hat], scalar, 1.0),
        "likelihood": lambda: backend.likelihood(
            *_decoded(tensor), None, None, None, torch.empty(PAIRS[:2], device="meta"), spec.Likelihood("bernoulli"),
            spec.DataGradients(tensor(*PAIRS)),
        ),
        "likelihood of levels": lambda: backend.likelihood(
            tensor(*PAIRS), torch.empty(PAIRS, dtype=torch.uint8, device="meta"), None, None, None,
            torch.empty(PAIRS[:2], device="meta"), spec.Likelihood("discretized_logistic", scale=1 / spec.LAST_LEVEL),
            spec.DataGradients(tensor(*PAIRS)),
        ),
        "posterior": lambda: backend.posterior(
            *(tensor(*SHAPE) for _ in range(4)), noise, spec.Posterior("softplus", 0.1), samples=4
        ),
        "posterior with log ratios": lambda: backend.posterior(
            *(tensor(*SHAPE) for _ in range(4)), noise, spec.Posterior(), samples=4, want_log_ratio=True
        ),
        "posterior_backward": lambda: backend.posterior_backward(
            tensor(4, *SHAPE), terms[:, None].expand(SHAPE), None, None, *(tensor(*SHAPE) for _ in range(4)), noise,
            spec.Posterior("softplus", 0.1), spec.PosteriorGradients(*(tensor(*SHAPE) for _ in range(4))), samples=4,
        ),
    }  # fmt: skip


def _decoded(tensor: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Several decoded samples of each of a batch, and their one target."""
    return tensor(*PAIRS), tensor(PAIRS[0], 1, PAIRS[2]).expand(PAIRS)


def variants(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Launches of what ``launches`` leaves out: other shapes, layouts and noise, a part of the gradients."""

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    single = spec.Noise(seed=torch.empty((), dtype=torch.int64, device="meta"))
    found = {}
    for name, t, noise in (
        ("one element", tensor(1, 1), single),
        ("few columns", tensor(300, 6), single),
        ("a shard", tensor(64, 2**14), single._replace(first_index=3)),
        ("far into the stream", tensor(64, 2**14), single._replace(first_index=2**40, offset=2**40)),
        ("seeds by sample", tensor(64, 2**14), spec.Noise(seed=torch.empty(64, dtype=torch.int64, device="meta"))),
        ("explicit noise", tensor(64, 2**14), spec.Noise(eps=tensor(64, 2**14))),
        ("channels_last", tensor(8, 4, 64, 64).to(memory_format=torch.channels_last), single),
        ("half of packed moments", tensor(8, 8, 64, 64).chunk(2, 1)[0], single),
        ("four dimensions apart", tensor(8, 6, 10, 12, 14)[:, ::2, ::2, ::2, ::2], single),
        ("many rows", tensor(2**31 + 8, 1), single),
        ("long rows", tensor(2, 2**31 + 8), single),
    ):
        terms = torch.empty(t.shape[0], dtype=spec.compute_dtype(t), device="meta")
        grad = torch.empty_like(t)
        found |= {
            f"rsample_kl, {name}": lambda t=t, noise=noise: backend.rsample_kl(t, t, noise, want_kl=True),
            f"rsample_kl_backward, {name}": lambda t=t, noise=noise, terms=terms, grad=grad: backend.rsample_kl_backward(
                t, terms, t, t, noise, spec.Gradients(mu=grad, logvar=grad)
            ),
        }
        if dtype.itemsize == NARROW:
            continue
        found |= {
            f"elbo, {name}": lambda t=t, grad=grad: backend.elbo(
                t, t, t, t, None, 1.0, spec.Gaussian(), spec.Gradients(x_hat=grad, logvar=grad), weight=1.0
            ),
            f"gaussian_nll_backward, {name}": lambda t=t, terms=terms, grad=grad: backend.gaussian_nll_backward(
                terms, t, t, spec.Gaussian(), spec.Gradients(x=grad), expected=2.0
            ),
            f"rescale, {name}": lambda grad=grad, terms=terms: backend.rescale_([grad, terms], terms[0], 2.0),
        }
    return found | general_variants(dtype)


def general_variants(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Launches of the general operations: each family and activation, each parameter, clamp and kind of noise."""
    single = spec.Noise(seed=torch.empty((), dtype=torch.int64, device="meta"))
    terms = spec.compute_dtype(torch.empty((), dtype=dtype))

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def likelihood(likelihood: spec.Likelihood, *given: str, x: torch.dtype = dtype, shape: tuple[int, ...] = PAIRS) -> None:
        options = {"log_scale": tensor(*shape), "weight": tensor(*shape), "mask": tensor(*shape, dtype=torch.bool)}
        wanted = ("x_hat",) + ("x",) * (x == dtype) + ("log_scale",) * ("log_scale" in given)
        backend.likelihood(
            tensor(*shape), tensor(*shape, dtype=x), *(t if name in given else None for name, t in options.items()),
            tensor(*shape[:2], dtype=terms), likelihood, spec.DataGradients(**{name: tensor(*shape) for name in wanted}),
            want_slope="log_scale" in given,
        )  # fmt: skip

    def latent(
        posterior: spec.Posterior, *given: str, samples: int = 1, noise: spec.Noise = single, shape: tuple[int, ...] = SHAPE
    ) -> None:
        backend.posterior(*inputs(given, shape), noise, posterior, samples=samples, want_log_ratio="ratio" in given)

    def latent_backward(
        posterior: spec.Posterior, *given: str, samples: int = 1, noise: spec.Noise = single, shape: tuple[int, ...] = SHAPE
    ) -> None:
        ratio = tensor(samples, shape[0], dtype=terms) if "ratio" in given else None
        out = (None if t is None else torch.empty_like(t) for t in inputs(given, shape))
        backend.posterior_backward(
            tensor(samples, *shape), tensor(*shape, dtype=terms), ratio, ratio if "paths" in given else None,
            *inputs(given, shape), noise, posterior, spec.PosteriorGradients(*out), samples=samples,
        )  # fmt: skip

    def inputs(given: tuple[str, ...], shape: tuple[int, ...]) -> tuple[Tensor | None, ...]:
        return tensor(*shape), tensor(*shape), *(tensor(*shape) if "prior" in given else None for _ in range(2))

    discretized = spec.Likelihood("discretized_logistic", scale=1 / spec.LAST_LEVEL)
    found = {
        "gaussian with all": lambda: likelihood(spec.Likelihood("gaussian", "tanh"), "log_scale", "weight", "mask"),
        "laplace of levels": lambda: likelihood(spec.Likelihood("laplace", "sigmoid"), x=torch.uint8),
        "bernoulli of few": lambda: likelihood(spec.Likelihood("bernoulli"), "mask", shape=(3, 5, 7)),
        "discretized_logistic": lambda: likelihood(discretized, x=torch.uint8),
        "discretized_logistic with log_scale": lambda: likelihood(discretized, "log_scale", x=torch.uint8),
    }
    for name, call in (
        ("var, clamped, free bits", {"posterior": spec.Posterior("var", clamp=(0.1, 2.0), free_bits=0.1)}),
        ("logvar, softly clamped, seeds by sample", {
            "posterior": spec.Posterior(clamp=(-4.0, 4.0), soft=True), "samples": 2,
            "noise": spec.Noise(seed=tensor(SHAPE[0], dtype=torch.int64)),
        }),
        ("std, ratios", {"posterior": spec.Posterior("std"), "given": ("prior", "ratio"), "samples": 8}),
        ("log_std, ratios by paths, odd", {
            "posterior": spec.Posterior("log_std"), "given": ("prior", "ratio", "paths"), "samples": 3, "shape": (63, 37),
        }),
    ):  # fmt: skip
        given = call.pop("given", ())
        posterior = call.pop("posterior")
        found[f"posterior, {name}"] = functools.partial(latent, posterior, *given, **call)
        found[f"posterior_backward, {name}"] = functools.partial(latent_backward, posterior, *given, **call)
    return found


def inspect(dtype: torch.dtype, architecture: int, tools: sass.Tools) -> Iterator[Row]:
    """Compile every launch for sm_``architecture`` and yield the rows of its kernel."""
    for name, launch in launches(dtype).items():
        with compiled(launch, architecture) as (path, options):
            (function,) = tools.functions(path, switches=False)
        loops = [
            (part, takes(options[block] * options.get(rows, 1) / (WARPS * LANES_PER_WARP)))
            for part, (block, rows) in TILES.get(name, {"": TILE}).items()
        ]
        # What adds up the rows' terms comes behind the loops over tensors, and reads 16 bytes at a time too.
        found = function.loops[: len(loops)]
        yield from rows_of("triton", name, str(dtype).removeprefix("torch."), architecture, function, loops, found)


@contextlib.contextmanager
def compiled(launch: Callable[[], Any], architecture: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A file with the machine code of a launch's one kernel, and the keyword arguments that it was launched with."""
    with _compile_only(architecture) as found:
        launch()
    ((kernel, options),) = found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        yield path, options


class Driver:
    """Stands in for a GPU's driver as far as compiling asks one."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, LANES_PER_WARP)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Compiled kernels are cached by device: each architecture is one.
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _compile_only(architecture: int) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Launches compile and are collected, with their keyword arguments, instead of running."""
    found: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((kernel, options))
        return kernel

    JITFunction.run = warm_up
    try:
        with no_gpu_needed(architecture):
            yield found
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def no_gpu_needed(architecture: int) -> Iterator[None]:
    """Triton takes the current device for one of sm_``architecture``, which it can compile for and not run on."""
    # Resetting to the default driver would fail where there is no GPU: put back what was there, which may be none yet.
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(architecture))
    try:
        yield
    finally:
        triton.runtime.driver._active = previous
