"""What is refused, before anything runs, and what the message says."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fused_elbo as fe
from fused_elbo import ops

T = torch.zeros(3, 4)
OTHER = torch.zeros(3, 5)
ROW = torch.zeros(3)
NUMBERS = torch.zeros(3, 4, dtype=torch.int64)
LEARNED = torch.ones((), requires_grad=True)
SCALAR = torch.tensor(1.0)
META = torch.zeros(3, 4, device="meta")
KEYS = torch.zeros(3, dtype=torch.int64)

LATENT_FUNCTIONS = (fe.rsample_kl, fe.reparameterize)
POSTERIOR_FUNCTIONS = (*LATENT_FUNCTIONS, fe.kl_divergence, lambda *a, **k: fe.elbo_loss(T, T, *a, **k))
LOSS_FUNCTIONS = (fe.gaussian_nll, lambda *a, **k: fe.elbo_loss(*a, kl=ROW, **k), lambda *a, **k: fe.elbo_loss(*a, T, T, **k))

# functions, positional, keywords, exception, and what the message holds beside the argument's name, which it begins with.
CASES = [
    *(
        pytest.param(POSTERIOR_FUNCTIONS, args, kwargs, error, name, says, id=f"latent-{name}-{says[0]}")
        for args, kwargs, error, name, says in [
            (([1.0], T), {}, TypeError, "mu", ("a list", "a tensor")),
            ((NUMBERS, NUMBERS), {}, TypeError, "mu", ("torch.int64", "torch.float32")),
            ((SCALAR, SCALAR), {}, ValueError, "mu", ("0-dimensional", "(N, ...)")),
            ((T, OTHER), {}, ValueError, "logvar", ("(3, 5)", "(3, 4)", "mu")),
            ((T, NUMBERS), {}, TypeError, "logvar", ("torch.int64", "torch.float16")),
            ((T, 0.5), {}, TypeError, "logvar", ("0.5", "a tensor")),
            ((T, META), {}, ValueError, "logvar", ("meta", "cpu")),
            ((T,), {}, ValueError, "logvar", ("None", "chunk_dim=")),
            ((T, T), {"chunk_dim": 1}, ValueError, "chunk_dim", ("together with logvar", "packed")),
            ((T,), {"chunk_dim": 0}, ValueError, "chunk_dim", ("0,", "(3, 4)", "batch")),
            ((T,), {"chunk_dim": -2}, ValueError, "chunk_dim", ("-2", "(3, 4)")),
            ((T,), {"chunk_dim": 2}, ValueError, "chunk_dim", ("2", "(3, 4)")),
            ((T,), {"chunk_dim": "channel"}, ValueError, "chunk_dim", ("'channel'", "dimension")),
            ((OTHER,), {"chunk_dim": 1}, ValueError, "mu", ("(3, 5)", "even", "chunk_dim=1")),
        ]
    ),
    *(
        pytest.param(LATENT_FUNCTIONS, (T, T), kwargs, error, name, says, id=f"noise-{name}-{says[0]}")
        for kwargs, error, name, says in [
            ({"seed": 1.5}, TypeError, "seed", ("1.5", "int")),
            ({"seed": True}, TypeError, "seed", ("True", "int")),
            ({"seed": "3"}, TypeError, "seed", ("'3'", "int")),
            ({"seed": 2**64}, ValueError, "seed", (str(2**64), "64 bits")),
            ({"seed": -(2**63) - 1}, ValueError, "seed", (str(-(2**63) - 1), "64 bits")),
            ({"seed": SCALAR}, TypeError, "seed", ("torch.float32", "torch.int64")),
            ({"seed": KEYS[:2]}, ValueError, "seed", ("(2,)", "()", "(3,)")),
            ({"seed": KEYS[:1]}, ValueError, "seed", ("(1,)", "()", "(3,)")),
            ({"seed": KEYS.to("meta")}, ValueError, "seed", ("meta", "cpu")),
            ({"seed": 1, "eps": T}, ValueError, "eps", ("together with seed", "at most one")),
            ({"seed": 1, "generator": torch.Generator()}, ValueError, "generator", ("together with seed", "at most one")),
            ({"eps": T, "generator": torch.Generator()}, ValueError, "eps", ("together with generator", "at most one")),
            ({"eps": OTHER}, ValueError, "eps", ("(3, 5)", "(3, 4)")),
            ({"eps": NUMBERS}, TypeError, "eps", ("torch.int64", "torch.float64")),
            ({"eps": META}, ValueError, "eps", ("meta", "cpu")),
            ({"first_index": -1}, ValueError, "first_index", ("-1", "[0, 2^62)")),
            ({"first_index": 2**62}, ValueError, "first_index", (str(2**62), "[0, 2^62)")),
            ({"first_index": 1.0}, TypeError, "first_index", ("1.0", "int")),
            ({"first_index": False}, TypeError, "first_index", ("False", "int")),
            ({"offset": -1}, ValueError, "offset", ("-1", "[0, 2^64)")),
            ({"offset": 2**64}, ValueError, "offset", (str(2**64), "[0, 2^64)")),
            ({"offset": "0"}, TypeError, "offset", ("'0'", "int")),
        ]
    ),
    *(
        pytest.param(LOSS_FUNCTIONS, args, kwargs, error, name, says, id=f"loss-{name}-{says[0]}")
        for args, kwargs, error, name, says in [
            ((None, T), {}, TypeError, "x_hat", ("None", "a tensor")),
            ((NUMBERS, T), {}, TypeError, "x_hat", ("torch.int64", "torch.bfloat16")),
            ((SCALAR, SCALAR), {}, ValueError, "x_hat", ("0-dimensional", "(N, ...)")),
            ((T, OTHER), {}, ValueError, "x", ("(3, 5)", "x_hat", "(3, 4)")),
            ((T, T[:1]), {}, ValueError, "x", ("(1, 4)", "x_hat", "(3, 4)")),
            ((T, NUMBERS), {}, TypeError, "x", ("torch.int64", "torch.float32")),
            ((T, NUMBERS.to(torch.uint8)), {}, TypeError, "x", ("torch.uint8", "torch.float32")),
            ((T, META), {}, ValueError, "x", ("meta", "x_hat", "cpu")),
            ((T, T), {"sigma": 0.0}, ValueError, "sigma", ("0.0", "positive")),
            ((T, T), {"sigma": -1}, ValueError, "sigma", ("-1", "positive")),
            ((T, T), {"sigma": float("inf")}, ValueError, "sigma", ("inf", "finite")),
            ((T, T), {"sigma": float("nan")}, ValueError, "sigma", ("nan", "finite")),
            ((T, T), {"sigma": 1e-160}, ValueError, "sigma", ("1e-160", "at least 1e-154", "1 / sigma^2")),
            ((T, T), {"sigma": 10**400}, ValueError, "sigma", ("beyond 1.8e+308", "float")),
            ((T, T), {"sigma": SCALAR}, TypeError, "sigma", ("a Tensor", "float")),
            ((T, T), {"reduction": "average"}, ValueError, "reduction", ("'average'", "'mean', 'sum', 'none'")),
            ((T, T), {"reduction": None}, ValueError, "reduction", ("None", "'mean', 'sum', 'none'")),
            ((T, T), {"grad_scale": "1"}, TypeError, "grad_scale", ("'1'", "float")),
            ((T, T), {"grad_scale": -(10**400)}, ValueError, "grad_scale", ("beyond 1.8e+308", "float")),
            ((T, T), {"grad_scale": 1e39}, ValueError, "grad_scale", ("1e+39", "up to 3.4e+38")),
            ((T, T), {"grad_scale": float("nan")}, ValueError, "grad_scale", ("nan", "up to 3.4e+38")),
            ((T, T), {"grad_scale": -1e39, "likelihood": "laplace"}, ValueError, "grad_scale", ("-1e+39", "up to 3.4e+38")),
            ((T, T), {"grad_scale": ROW}, ValueError, "grad_scale", ("(3,)", "one element")),
            ((T, T), {"grad_scale": KEYS[0]}, TypeError, "grad_scale", ("torch.int64", "torch.float32")),
            ((T, T), {"grad_scale": SCALAR.to("meta")}, ValueError, "grad_scale", ("meta", "cpu")),
            (
                (T, T),
                {"grad_scale": LEARNED},
                ValueError,
                "grad_scale",
                ("requires grad", "constant"),
            ),
            ((T, T), {"inplace": True, "reduction": "none"}, ValueError, "inplace", ("True", '"none"')),
        ]
    ),
    *(
        pytest.param((fe.elbo_loss,), args, kwargs, error, name, says, id=f"elbo-{name}-{says[0]}")
        for args, kwargs, error, name, says in [
            ((T, T), {}, ValueError, "kl", ("neither", "kl=")),
            ((T, T, T, T), {"kl": ROW}, ValueError, "kl", ("both", "(mu, logvar)")),
            ((T, T, None, T), {"kl": ROW}, ValueError, "mu", ("None", "logvar")),
            ((T, T), {"kl": ROW, "chunk_dim": 1}, ValueError, "mu", ("None", "chunk_dim")),
            ((T, T), {"kl": ROW[:2]}, ValueError, "kl", ("(2,)", "x_hat", "(3,)")),
            ((T, T), {"kl": SCALAR}, ValueError, "kl", ("()", "x_hat", "(3,)")),
            ((T, T), {"kl": T}, ValueError, "kl", ("(3, 4)", "x_hat", "(3,)")),
            ((T, T), {"kl": 1.0}, TypeError, "kl", ("1.0", "a tensor")),
            ((T, T), {"kl": KEYS}, TypeError, "kl", ("torch.int64", "torch.float32")),
            ((T, T), {"kl": ROW.to("meta")}, ValueError, "kl", ("meta", "cpu")),
            ((T, T, T[:2], T[:2]), {}, ValueError, "mu", ("2", "x_hat", "3")),
            ((T, T, META, META), {}, ValueError, "mu", ("meta", "x_hat", "cpu")),
            ((T, T, T, T), {"beta": "1"}, TypeError, "beta", ("'1'", "float")),
            ((T, T, T, T), {"beta": None}, TypeError, "beta", ("None", "float")),
            ((T, T, T, T), {"beta": 10**400}, ValueError, "beta", ("beyond 1.8e+308", "float")),
            ((T, T, T, T), {"beta": ROW[:2]}, ValueError, "beta", ("(2,)", "one element", "(3,)")),
            ((T, T, T, T), {"beta": KEYS[0]}, TypeError, "beta", ("torch.int64", "torch.float32")),
            ((T, T, T, T), {"beta": SCALAR.to("meta")}, ValueError, "beta", ("meta", "cpu")),
        ]
    ),
    pytest.param((fe.kl_divergence,), (T, T), {"reduction": "batchmean"}, ValueError, "reduction", ("'batchmean'", "'mean'")),
]


@pytest.mark.parametrize(("functions", "args", "kwargs", "error", "name", "says"), CASES)
def test_message(monkeypatch, functions, args, kwargs, error, name, says):
    def launched(*_):
        raise AssertionError("a backend was chosen before the arguments were checked")

    monkeypatch.setattr(ops, "select", launched)
    for function in functions:
        with pytest.raises(error, match=f"^{name}: got .*takes ") as caught:
            function(*args, **kwargs)
        for words in says:
            assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_least_sigma_of_a_gaussian(backend, device, dtype):
    """It may be as small as its precision is a double, whatever becomes of that in float32; other scales are not squared."""
    x_hat = torch.full((3, 4), 1e-154, dtype=dtype, device=device, requires_grad=True)
    x = torch.zeros_like(x_hat)
    calls = (fe.gaussian_nll, fe.nll, lambda *a, **k: fe.elbo_loss(*a, kl=ROW.to(device), **k).loss)
    for call in calls:
        loss = call(x_hat, x, sigma=1e-154)
        loss.backward()
        if dtype == torch.float64:
            assert loss.item() == pytest.approx(4 * (0.5 - 154 * math.log(10)), rel=1e-12)
    fe.nll(x_hat, x, sigma=1e-320, likelihood="laplace").backward()


def test_dtypes_are_listed():
    with pytest.raises(TypeError) as caught:
        fe.kl_divergence(NUMBERS, NUMBERS)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert str(dtype) in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device: CUDA")
def test_generator_of_another_device():
    on_gpu = torch.zeros(3, 4, device="cuda")
    with pytest.raises(ValueError, match=r"^generator: got .*cpu.*takes .*cuda"):
        fe.rsample_kl(on_gpu, on_gpu, generator=torch.Generator())


def test_scalars_of_the_host_serve_any_device(device):
    x = torch.zeros(3, 4, device=device)
    kl = torch.ones(3, device=device)
    assert fe.elbo_loss(x, x, kl=kl, beta=torch.tensor(2.0), grad_scale=torch.tensor([1.0])).loss.item() == 2
    assert fe.elbo_loss(x.double(), x, kl=kl, grad_scale=1e39).loss.item() == 1


@pytest.mark.parametrize("arguments", [{}, {"chunk_dim": None}])
def test_keywords_only(arguments):
    for function in POSTERIOR_FUNCTIONS:
        with pytest.raises(TypeError, match="positional"):
            function(T, T, 1, **arguments)
    with pytest.raises(TypeError, match="positional"):
        fe.gaussian_nll(T, T, 1.0)


def test_unknown_backend():
    expected = re.escape(f"backend: got 'tritn', takes one of {sorted(ops.BACKENDS)}")
    with pytest.raises(ValueError, match=expected), fe.backend("tritn"):
        pass
    with pytest.raises(ValueError, match=expected):
        ops.unavailable("tritn", "cpu")


def test_unknown_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "tritn")
    with pytest.raises(ValueError, match="'tritn'"):
        fe.kl_divergence(T, T)


class _Broken:
    @staticmethod
    def unavailable(device_type: str) -> str:
        return f"no {device_type} today"


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(ops.BACKENDS, "broken", "nowhere")
    load = ops._load
    monkeypatch.setattr(ops, "_load", lambda name: (_Broken, None) if name == "broken" else load(name))


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setitem(ops.BACKENDS, "missing", "fused_elbo.backends.of_another_day")


@pytest.mark.parametrize("way", ["context", "environment"])
@pytest.mark.parametrize(("name", "reason"), [("broken", "no cpu today"), ("missing", "import failed: .*of_another_day")])
def test_a_backend_that_cannot_run_is_an_error(broken, missing, monkeypatch, way, name, reason):
    operations = (
        lambda: fe.kl_divergence(T, T),
        lambda: fe.rsample_kl(T, T, seed=1),
        lambda: fe.reparameterize(T, T, seed=1),
        lambda: fe.gaussian_nll(T, T),
        lambda: fe.elbo_loss(T, T, T, T),
    )
    expected = f"backend '{name}' was asked for and cannot run on 'cpu': {reason}"
    if way == "environment":
        monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, name)
    for operation in operations:
        if way == "environment":
            with pytest.raises(RuntimeError, match=expected):
                operation()
        else:
            with fe.backend(name), pytest.raises(RuntimeError, match=expected):
                operation()


def test_the_context_precedes_the_environment_and_ends(broken, monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "broken")
    with fe.backend("reference"):
        fe.kl_divergence(T, T)
        with fe.backend("broken"), pytest.raises(RuntimeError):
            fe.kl_divergence(T, T)
        fe.kl_divergence(T, T)
    with pytest.raises(RuntimeError):
        fe.kl_divergence(T, T)


def test_the_default_is_the_best_that_runs(broken, missing, monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setitem(ops.DEFAULTS, "cpu", ("broken", "missing", "reference"))
    ops._default.cache_clear()
    ops._warn.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"broken cannot run on 'cpu': no cpu today; missing .*so reference runs"):
            assert ops.select(torch.device("cpu")).__name__ == "fused_elbo.reference"
    finally:
        ops._default.cache_clear()
