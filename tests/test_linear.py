"""``linear_gaussian_nll``: the numbers of a linear layer and of ``gaussian_nll`` or ``nll`` behind it, for every option."""

from __future__ import annotations

import math
from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from tolerances import LOW, compute

import fused_elbo as fe
from fused_elbo import cases
from fused_elbo.accuracy import SUM_ULPS

H = 4
CHUNK = (2, 20)
LAYER = ("h", "weight", "bias")
ROWS = {name: row for name, row in cases.plain().items() if name.startswith("gaussian_nll")} | cases.likelihoods()
# Its terms are of more than the batch's dimension.
del ROWS["batch_dims"]
FUNCTION = {"plain": {}, "sigma": {"sigma": 0.6, "full": True}, "optimal": {"sigma": "optimal"}, "tanh": {"activation": "tanh"}}
FUNCTION |= {"laplace": {"likelihood": "laplace", "sigma": 0.5}}


class Layer(NamedTuple):
    h: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def leaves(self, dtype=None) -> Layer:
        return Layer(*(None if t is None else oracle.leaf(t if dtype is None else t.to(dtype)) for t in self))

    def output(self) -> torch.Tensor:
        return F.linear(*self)


def layer(count, features, width=H, dtype=torch.float64, device="cpu", seed=0) -> Layer:
    shapes = (count, width), (features, width), (features,)
    return Layer(*(oracle.randn(*shape, seed=seed + k, dtype=dtype, device=device) for k, shape in enumerate(shapes)))


def unfused(layer, x, **options):
    return fe.gaussian_nll(layer.output().reshape(x.shape), x, **options)


def assert_same(found, right, bound=1e-10):
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)


def assert_agree(layer, x, upstream=None, extra=(), **options):
    """Value and all gradients, in float64, of ``options`` for both routes."""
    chunk = options.pop("chunk_size", CHUNK)
    given = layer.leaves()
    leaves = [t for t in (*given, x, *extra) if t is not None and t.requires_grad]
    mine = fe.linear_gaussian_nll(*given, x, chunk_size=chunk, **options)
    right = unfused(given, x, **options)
    assert_same([mine], [right])
    upstream = torch.full_like(right, 1.7) if upstream is None else upstream
    assert_same(oracle.grads(mine, leaves, upstream), oracle.grads(right, leaves, upstream))


@pytest.mark.parametrize("name", ROWS)
def test_every_option_equals_the_lines_that_people_write(backend, device, interpreted, monkeypatch, name):
    row, generator = ROWS[name], torch.Generator().manual_seed(5)
    _, *rest = (cases.draw(kind, generator) for kind in row.inputs)
    rest = [t.detach().to(device, torch.float64 if t.is_floating_point() else t.dtype) for t in rest]
    wanted = [k for k, kind in enumerate(row.inputs[1:]) if rest[k].is_floating_point() and cases.CONSTANT not in kind]
    for k in wanted:
        rest[k].requires_grad_()
    given = layer(cases.SHAPE[0], math.prod(cases.SHAPE[1:]), device=device).leaves()
    leaves = [*given, *(rest[k] for k in wanted)]
    chunk = None if interpreted else CHUNK

    def head(x_hat, x, **options):
        return fe.linear_gaussian_nll(*given, x, chunk_size=chunk, **options)

    right = row.eager(given.output().reshape(cases.SHAPE), *rest)
    for function in ("nll", "gaussian_nll"):
        monkeypatch.setattr(cases.fe, function, head)
    mine = row.fused(None, *rest)
    assert_same([mine], [right])
    upstream = oracle.randn(*right.shape, seed=9, dtype=torch.float64, device=device)
    assert_same(oracle.grads(mine, leaves, upstream), oracle.grads(right, leaves, upstream))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 64, (1, 1), (3, 7), (5, 64)], ids=str)
def test_chunks_and_reductions(device, chunk, reduction):
    x = oracle.leaf(oracle.randn(7, 13, seed=3, dtype=torch.float64, device=device))
    upstream = None if reduction != "none" else oracle.randn(7, seed=4, dtype=torch.float64, device=device)
    given = layer(7, 13, device=device)
    for options in ({}, {"sigma": "optimal", "min_log_sigma": -1.0}):
        assert_agree(given, x, upstream, reduction=reduction, chunk_size=chunk, **options)


SCALES = {"one": (), "features": (13,), "samples": (7, 1), "elements": (7, 13)}


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_learned_scale_of_any_shape(backend, device, interpreted, shape, reduction):
    x = oracle.leaf(oracle.randn(7, 13, seed=3, dtype=torch.float64, device=device))
    scale = oracle.leaf(oracle.randn(*shape, seed=4, dtype=torch.float64, device=device, scale=0.3))
    options = {"log_sigma": scale, "min_log_sigma": -1.0, "reduction": reduction, "chunk_size": 4 if interpreted else (2, 5)}
    assert_agree(layer(7, 13, device=device), x, extra=(scale,), **options)


WEIGHTS = {"samples": ((7,), None), "features": (None, (1, 13)), "both": ((7,), (7, 13)), "elements": ((7, 13), (7, 13))}


@pytest.mark.parametrize(("weight", "mask"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("sigma", [0.6, "optimal"])
def test_weights_and_masks(device, monkeypatch, weight, mask, sigma):
    from fused_elbo import linear

    monkeypatch.setattr(linear, "ROWS", 3)
    options = {} if weight is None else {"weight": oracle.randn(*weight, seed=4, dtype=torch.float64, device=device).abs()}
    if mask is not None:
        options["mask"] = oracle.randn(*mask, seed=5, device=device) > -0.5
    x = oracle.randn(7, 13, seed=3, dtype=torch.float64, device=device)
    assert_agree(layer(7, 13, device=device), x, sigma=sigma, full=True, **options)


def test_dimensions_behind_the_batch(device):
    x = oracle.randn(5, 2, 3, 4, seed=3, dtype=torch.float64, device=device)
    given = layer(5, 24, device=device)
    channels = oracle.leaf(oracle.randn(2, 1, 1, seed=4, dtype=torch.float64, device=device))
    for data in (x, x.to(memory_format=torch.channels_last), x.transpose(1, 3).contiguous().transpose(1, 3)):
        assert_agree(given, oracle.leaf(data), extra=(channels,), log_sigma=channels, mask=x > -1, batch_dims=(0, 2))


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "one row": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("which", ["h", "weight", "x"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, interpreted, which, layout):
    tensors = {**layer(7, 13, device=device)._asdict(), "x": oracle.randn(7, 13, seed=3, dtype=torch.float64, device=device)}
    tensors[which] = LAYOUTS[layout](tensors[which])
    mine = [t.detach().requires_grad_() for t in tensors.values()]
    right = [oracle.leaf(t.contiguous()) for t in tensors.values()]
    loss = fe.linear_gaussian_nll(*mine, chunk_size=4 if interpreted else (3, 5))
    exact = unfused(Layer(*right[:3]), right[3])
    assert_same([loss], [exact])
    assert_same(oracle.grads(loss, mine), oracle.grads(exact, right))


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (1, 1, 1), (0, 0, 0), (3, 1031, 2), (67, 1, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sizes(device, shape, reduction):
    count, features, width = shape
    given = layer(count, features, width, device=device).leaves()
    x = oracle.leaf(oracle.randn(count, features, seed=3, dtype=torch.float64, device=device))
    values = [function() for function in (
        lambda: fe.linear_gaussian_nll(*given, x, full=True, reduction=reduction),
        lambda: unfused(given, x, full=True, reduction=reduction),
    )]  # fmt: skip
    torch.testing.assert_close(*values, equal_nan=True)
    assert_same(*(oracle.grads(value.sum(), (*given, x)) for value in values))


@pytest.mark.parametrize("name", FUNCTION)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(device, name, reduction):
    x = oracle.leaf(oracle.randn(3, 5, seed=3, dtype=torch.float64, device=device))
    inputs = (*layer(3, 5, 2, device=device).leaves(), x)

    def function(*tensors):
        return fe.linear_gaussian_nll(*tensors, reduction=reduction, chunk_size=(2, 3), **FUNCTION[name])

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("options", FUNCTION.values(), ids=FUNCTION)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_envelope(backend, device, interpreted, dtype, options):
    """No worse than eager PyTorch in the dtype; what each gradient sums up is as large as its terms."""
    given, x = layer(37, 67, 8, dtype, device), oracle.randn(37, 67, seed=3, dtype=dtype, device=device)
    chunk = 16 if interpreted else (16, 20)
    mine = given.leaves()
    loss = fe.linear_gaussian_nll(*mine, x, chunk_size=chunk, **options)
    assert loss.dtype == compute(dtype)
    found = oracle.grads(loss, mine)

    def lines(dtype):
        leaves = given.leaves(dtype)
        x_hat = leaves.output()
        x_hat.retain_grad()
        value = objective(x_hat, x.to(dtype), **options)
        return value, oracle.grads(value, (*leaves, x_hat))

    (exact, exact_g), (eager, eager_g) = lines(torch.float64), lines(dtype)
    oracle.assert_envelope(loss, exact, eager, ulps=SUM_ULPS, terms=exact.abs() + 67, what="loss")
    slope, wide = exact_g[3].abs(), given.leaves(torch.float64)
    terms = (slope @ wide.weight.abs(), slope.t() @ wide.h.abs(), slope.sum(0))
    for name, g, right, other, t in zip(LAYER, found, exact_g, eager_g, terms, strict=False):
        assert g.dtype == dtype
        oracle.assert_envelope(g, right, other, ulps=SUM_ULPS if dtype not in LOW else None, terms=t, what=name)


def objective(x_hat, x, sigma=1.0, full=False, activation="identity", likelihood="gaussian"):
    """In plain PyTorch, of ``FUNCTION``."""
    x_hat = x_hat.tanh() if activation == "tanh" else x_hat
    if sigma == "optimal":
        return 0.5 * x.shape[1] * (1 + torch.log(F.mse_loss(x_hat, x)))
    if likelihood == "laplace":
        return (x_hat - x).abs().sum(1).mean() / sigma + x.shape[1] * math.log(sigma)
    return oracle.gaussian_nll(x_hat, x, sigma, full).mean()


def test_float16_gradients_neither_vanish_nor_overflow(backend, device):
    """However small or large upstream gradient and scale, what is kept between the passes is of the order of the error."""
    given, x = layer(5, 11, 3, torch.float16, device), oracle.randn(5, 11, seed=3, dtype=torch.float16, device=device)
    for sigma, factor in ((1e-3, 1e-6), (1e3, 1e6), (1.0, 1e-3)):
        mine, wide = given.leaves(), given.leaves(torch.float64)
        found = oracle.grads(factor * fe.linear_gaussian_nll(*mine, x, sigma=sigma), mine)
        right = oracle.grads(factor * unfused(wide, x.double(), sigma=sigma), wide)
        for g, exact in zip(found, right, strict=True):
            torch.testing.assert_close(g.double(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
@pytest.mark.parametrize("sigma", [1e-15, 1e25, 1e160])
def test_any_sigma(device, sigma, likelihood):
    """Its square may be no number of float32, nor of float64."""
    x = oracle.leaf(oracle.randn(7, 13, seed=3, device=device))
    given = layer(7, 13, device=device, dtype=torch.float32).leaves()
    options = {"sigma": sigma, "likelihood": likelihood}
    mine, right = fe.linear_gaussian_nll(*given, x, **options), unfused(given, x, **options)
    torch.testing.assert_close(mine, right, rtol=1e-5, atol=0)
    for found, true in zip(*(oracle.grads(value, [*given, x]) for value in (mine, right)), strict=True):
        assert true.isfinite().all()
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_stay_in_their_row(backend, device, bad):
    given = layer(5, 6, device=device)
    x = oracle.randn(5, 6, seed=3, dtype=torch.float64, device=device)
    x[2, 3] = bad
    leaves = given.leaves()
    terms = fe.linear_gaussian_nll(*leaves, x, reduction="none", chunk_size=2)
    assert terms.isfinite().tolist() == [True, True, False, True, True]
    g_h, g_weight, g_bias = oracle.grads(fe.linear_gaussian_nll(*leaves, x, chunk_size=2), leaves)
    assert g_h.isfinite().all(1).tolist() == terms.isfinite().tolist()
    assert g_weight.isfinite().all(1).tolist() == g_bias.isfinite().tolist() == [True, True, True, False, True, True]
    seen = fe.linear_gaussian_nll(*leaves, x, mask=torch.isfinite(x), chunk_size=2)
    assert all(g.isfinite().all() for g in (seen, *oracle.grads(seen, leaves)))
