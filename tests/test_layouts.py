"""Strides and launches: every tensor in every layout gives what its contiguous copy gives, with the gradient laid out as its
input; and the loops of a launch, whatever the sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from hypothesis import strategies as st
from tolerances import compute

import fused_elbo as fe
from fused_elbo import reference
from fused_elbo.accuracy import NOISE

SEED = 31
SIZES = (1, 2, 3, 4, 5, 7, 8, 11, 13)
MOST_ELEMENTS = 3000


class Layout(NamedTuple):
    """How values lie in memory: ``steps`` are applied in turn, each a name and its numbers."""

    steps: tuple[tuple[Any, ...], ...] = ()

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor laid out so; what lies between its elements is NaN. Expanding changes the values."""
        for name, *numbers in self.steps:
            values = getattr(self, name)(values, *numbers)
        return values

    @staticmethod
    def permuted(t, *order):
        order = sorted(range(t.dim()), key=lambda d: order[d % len(order)])
        inverse = [order.index(d) for d in range(t.dim())]
        return t.permute(order).contiguous().permute(inverse)

    @staticmethod
    def every_other(t, dim):
        return Layout._inside(t, dim, 2 * t.shape[dim % t.dim()], slice(1, None, 2))

    @staticmethod
    def half(t, dim, side):
        size = t.shape[dim % t.dim()]
        return Layout._inside(t, dim, 2 * size, slice(side * size, (side + 1) * size))

    @staticmethod
    def margin(t, dim):
        size = t.shape[dim % t.dim()]
        return Layout._inside(t, dim, size + 3, slice(1, size + 1))

    @staticmethod
    def shifted(t, count):
        flat = t.new_full((t.numel() + count,), torch.nan)
        flat[count:] = t.flatten()
        return flat[count:].view(t.shape)

    @staticmethod
    def expanded(t, dim):
        return t.narrow(dim % t.dim(), 0, 1).expand(t.shape)

    @staticmethod
    def scalar(t):
        return t.flatten()[0].expand(t.shape)

    @staticmethod
    def channels_last(t):
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim(), torch.contiguous_format)
        return t.contiguous(memory_format=memory_format)

    @staticmethod
    def _inside(t, dim, size, where):
        dim %= t.dim()
        order = sorted(range(t.dim()), key=t.stride, reverse=True)
        shape = [size if d == dim else t.shape[d] for d in order]
        buffer = t.new_full(shape, torch.nan).permute([order.index(d) for d in range(t.dim())])
        view = buffer[(slice(None),) * dim + (where,)]
        view.copy_(t)
        return view


CONTIGUOUS = Layout()
NAMED = {
    "transposed": Layout((("permuted", 1, 0, 2, 3, 4),)),
    "reversed": Layout((("permuted", 4, 3, 2, 1, 0),)),
    "batch_last": Layout((("permuted", 4, 0, 1, 2, 3),)),
    "channels_last": Layout((("channels_last",),)),
    "chunk_0": Layout((("half", 1, 0),)),
    "chunk_1": Layout((("half", 1, 1),)),
    "chunk_last": Layout((("half", -1, 1),)),
    "chunk_channels_last": Layout((("channels_last",), ("half", 1, 1))),
    "every_other": Layout((("every_other", -1),)),
    "every_other_sample": Layout((("every_other", 0),)),
    "crop": Layout((("margin", -1), ("margin", -2))),
    "shifted_1": Layout((("shifted", 1),)),
    "shifted_3": Layout((("shifted", 3),)),
    "expanded_batch": Layout((("expanded", 0),)),
    "expanded_last": Layout((("expanded", -1),)),
    "expanded_middle": Layout((("expanded", 1),)),
    "scalar": Layout((("scalar",),)),
    "transposed_every_other": Layout((("permuted", 1, 0, 2, 3, 4), ("every_other", 0), ("margin", -1))),
}

dims = st.integers(-5, 4)
steps = st.one_of(
    st.permutations(range(5)).map(lambda order: ("permuted", *order)),
    st.tuples(st.just("every_other"), dims),
    st.tuples(st.just("half"), dims, st.integers(0, 1)),
    st.tuples(st.just("margin"), dims),
    st.tuples(st.just("shifted"), st.integers(1, 7)),
    st.tuples(st.just("expanded"), dims),
    st.just(("channels_last",)),
)
layouts = st.one_of(st.sampled_from([CONTIGUOUS, *NAMED.values()]), st.lists(steps, max_size=3).map(lambda s: Layout(tuple(s))))


@st.composite
def shapes(draw) -> tuple[int, ...]:
    if draw(st.booleans()):
        shape = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=5))
    else:
        shape = [draw(st.sampled_from((1, 2, 3, 9))), draw(st.sampled_from((127, 128, 257, 1031)))]
    while math.prod(shape) > MOST_ELEMENTS:
        shape.remove(max(shape))
    return tuple(shape)


def made(layout, shape, seed, dtype, device) -> torch.Tensor:
    return layout(oracle.randn(*shape, seed=seed, dtype=dtype, device=device))


def leaf(t: torch.Tensor) -> torch.Tensor:
    """With the strides that ``t`` has, which ``clone`` would change."""
    return t.detach().requires_grad_()


def packed_leaf(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def is_dense(t: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def assert_same(found, right, names, inputs=()):
    for name, mine, true in zip(names, found, right, strict=True):
        assert mine.shape == true.shape, name
        # Elements round once more or less where PyTorch vectorises one layout and not the other; sums are ordered anew.
        bound = 4 * torch.finfo(mine.dtype).eps if mine.dim() > 1 else max(2 * torch.finfo(mine.dtype).eps, 1e-15) * 4
        torch.testing.assert_close(mine, true, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient, source in inputs:
        if is_dense(source):
            strides = [(a, b) for a, b, size in zip(gradient.stride(), source.stride(), source.shape, strict=True) if size > 1]
            assert all(a == b for a, b in strides), f"{name}: gradient strides {gradient.stride()}, input's {source.stride()}"


def check_latent(shape, layouts, dtype, device, source):
    tensors = [made(layout, shape, seed, dtype, device) for seed, layout in enumerate(layouts)]
    mu, logvar, eps, g_z = tensors
    g_kl = oracle.randn(shape[0], seed=9, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)

    def run(as_leaf):
        leaves = [as_leaf(mu), as_leaf(logvar)]
        noise = {"seed": SEED, "first_index": 3} if source == "seed" else {"eps": as_leaf(eps).detach()}
        z, kl = fe.rsample_kl(*leaves, **noise)
        upstream = g_z if as_leaf is leaf else g_z.contiguous()
        return leaves, z, (z, kl, *oracle.grads((z, kl), leaves, (upstream, g_kl)))

    leaves, z, found = run(leaf)
    _, _, right = run(packed_leaf)
    inputs = [("z", z, mu), ("mu", found[2], leaves[0]), ("logvar", found[3], leaves[1])]
    assert_same(found, right, ("z", "kl", "g_mu", "g_logvar"), inputs)


def check_data(shape, layouts, dtype, device, reduction):
    x_hat, x, mu, logvar = (made(layout, shape, seed, dtype, device) for seed, layout in enumerate(layouts))
    upstream = torch.tensor(-0.7) if reduction != "none" else oracle.randn(shape[0], seed=9)
    upstream = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)

    def run(as_leaf):
        leaves = [as_leaf(t) for t in (x_hat, x, mu, logvar)]
        out = fe.elbo_loss(*leaves, beta=0.5, sigma=0.8, reduction=reduction)
        return leaves, (*out, *oracle.grads(out.loss, leaves, upstream))

    leaves, found = run(leaf)
    _, right = run(packed_leaf)
    names = ("x_hat", "x", "mu", "logvar")
    # A sum in another order: relative to the terms that it is made of.
    for name, mine, true in zip(("loss", "nll", "kl"), found[:3], right[:3], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=2e-6 * x[0].numel(), msg=lambda m, n=name: f"{n}: {m}")
    assert_same(found[3:], right[3:], names, zip(names, found[3:], leaves, strict=True))


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (2, 3, 2, 3, 2), (5, 7)], ids=str)
@pytest.mark.parametrize("layout", NAMED)
def test_latent_layouts(backend, device, shape, layout):
    for place in range(4):
        layouts = [CONTIGUOUS] * 4
        layouts[place] = NAMED[layout]
        check_latent(shape, layouts, torch.float32, device, "eps")
    check_latent(shape, [NAMED[layout]] * 4, torch.float32, device, "seed")


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (2, 3, 2, 3, 2), (5, 7)], ids=str)
@pytest.mark.parametrize("layout", NAMED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_data_layouts(backend, device, shape, layout, reduction):
    for place in range(4):
        layouts = [CONTIGUOUS] * 4
        layouts[place] = NAMED[layout]
        check_data(shape, layouts, torch.float32, device, reduction)
    check_data(shape, [NAMED[layout]] * 4, torch.float32, device, reduction)


def test_any_latent_layout(backend, device, every):
    dtypes = st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))

    @every(st.tuples(shapes(), st.tuples(layouts, layouts, layouts, layouts), dtypes, st.sampled_from(("seed", "eps"))))
    def check(case):
        shape, chosen, dtype, source = case
        check_latent(shape, chosen, dtype, device, source)


def test_any_data_layout(backend, device, every):
    dtypes = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))

    @every(st.tuples(shapes(), st.tuples(layouts, layouts, layouts, layouts), dtypes, st.sampled_from(("mean", "sum", "none"))))
    def check(case):
        shape, chosen, dtype, reduction = case
        check_data(shape, chosen, dtype, device, reduction)


def test_any_packed_layout(backend, device, every):
    @every(st.tuples(shapes().filter(lambda s: len(s) > 1), layouts, st.integers(1, 4), st.booleans()))
    def check(case):
        shape, layout, chunk_dim, with_loss = case
        chunk_dim = 1 + chunk_dim % (len(shape) - 1)
        shape = tuple(2 * s if d == chunk_dim else s for d, s in enumerate(shape))
        moments = leaf(made(layout, shape, 1, torch.float32, device))
        halves = [packed_leaf(t) for t in moments.chunk(2, chunk_dim)]
        x = oracle.randn(shape[0], 3, seed=4, device=device)

        def run(*inputs, **options):
            if with_loss:
                out = fe.elbo_loss(x, x + 1, *inputs, **options)
                return (out.kl, *oracle.grads(out.loss, inputs))
            z, kl = fe.rsample_kl(*inputs, seed=SEED, **options)
            return (z, kl, *oracle.grads((z * 2).sum() + kl.sum(), inputs))

        *found, gradient = run(moments, chunk_dim=chunk_dim)
        *right, g_mu, g_logvar = run(*halves)
        right.append(torch.cat((g_mu, g_logvar), chunk_dim))
        names = ("kl", "gradient") if with_loss else ("z", "kl", "gradient")
        assert_same([*found, gradient], right, names, [("moments", gradient, moments)])


@pytest.mark.parametrize("layout", ["transposed", "reversed", "channels_last", "shifted_1"])
def test_inplace_layouts(backend, device, layout):
    shape = (3, 4, 2, 5)
    x_hat, x = leaf(made(NAMED[layout], shape, 1, torch.float32, device)) * 1, oracle.randn(*shape, seed=2, device=device)
    expected = (x_hat.detach() - x) / 3
    (gradient,) = oracle.grads(fe.gaussian_nll(x_hat, x, inplace=True), [x_hat])
    assert gradient.data_ptr() == x_hat.data_ptr()
    assert gradient.stride() == x_hat.stride()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[..., 1::2],
        lambda t: t[1:3],
        lambda t: t.chunk(2, 1)[1],
        lambda t: t.permute(0, 3, 1, 2)[:, 2:],
        lambda t: t.flatten(1),
        lambda t: t.view(4, 2, -1)[:, 1],
    ],
    ids=("every_other", "samples", "chunk", "permuted", "flatten", "view"),
)
@pytest.mark.parametrize("upstream", [1.0, -2.0])
def test_inplace_in_a_view_of_an_activation(backend, device, view, upstream):
    """The gradient takes the view's memory; what lies beside it in the activation survives."""
    source = oracle.leaf(oracle.randn(4, 6, 2, 5, seed=1, device=device))
    activation = source * 1
    x_hat = view(activation)
    x = oracle.randn(*x_hat.shape, seed=2, device=device)
    expected = torch.zeros_like(source)
    view(expected).copy_(upstream * (x_hat.detach() - x) / x_hat.shape[0])
    beside = torch.ones_like(expected)
    view(beside).zero_()
    (upstream * fe.gaussian_nll(x_hat, x, inplace=True)).backward()
    torch.testing.assert_close(source.grad, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(view(activation), view(expected), rtol=1e-6, atol=1e-7)
    assert torch.equal(activation[beside == 1], source[beside == 1])


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: torch.stack((t, -t), 1)[:, 0],
        lambda t: t[:1].expand(t.shape),
        lambda t: t.flip(0).contiguous()[::1],
        lambda t: torch.cat((t, t * torch.nan))[: len(t)],
        lambda t: torch.stack((t, -t), 1).flatten()[::2],
    ],
    ids=("column", "expanded", "contiguous", "head", "every_other"),
)
@pytest.mark.parametrize("count", [3, 150])
def test_kl_layouts(backend, device, layout, count):
    x_hat, x = (leaf(oracle.randn(count, 5, seed=s, device=device)) for s in (1, 2))
    kl = leaf(layout(oracle.randn(count, seed=3, device=device)))
    out = fe.elbo_loss(x_hat, x, kl=kl, beta=0.5, reduction="sum")
    exact = oracle.elbo(x_hat.double(), x.double(), kl=kl.double(), beta=0.5, reduction="sum")[0]
    torch.testing.assert_close(out.loss.double(), exact, rtol=1e-6, atol=1e-5)
    assert torch.equal(oracle.grads(out.loss, [kl])[0], torch.full((count,), 0.5, device=device))
    terms = fe.elbo_loss(x_hat, x, kl=kl, beta=0.5, reduction="none").loss
    torch.testing.assert_close(terms, out.nll + 0.5 * kl)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 131), torch.float32), ((2, 17, 5), torch.float16), ((19, 3), torch.float64), ((3, 96), torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed_every_other"])
def test_launches_of_many_tiles(backend, device, small_launches, shape, dtype, layout):
    chosen = [NAMED.get(layout, CONTIGUOUS)] * 4
    tensors = [made(one, shape, seed, dtype, device) for seed, one in enumerate(chosen)]
    wide = [t.double() for t in tensors]
    sums = {"rtol": {torch.float64: 1e-12}.get(dtype, 1e-6), "atol": 0.0}
    elements = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    key = torch.tensor(SEED, device=device)
    noise = reference.noise(key, shape, dtype=torch.float64, first_index=3)
    close = {"rtol": elements["rtol"], "atol": max(elements["atol"], NOISE[compute(dtype)] * 30)}
    c = torch.tensor(-2.5, device=device)

    leaves, exact = [leaf(t) for t in tensors], [leaf(t) for t in wide]
    z, kl = fe.rsample_kl(*leaves[2:], seed=key, first_index=3)
    right_z, right_kl = oracle.reparameterize(*exact[2:], noise), oracle.kl_divergence(*exact[2:])
    torch.testing.assert_close(z.double(), right_z, **close)
    torch.testing.assert_close(kl.double(), right_kl, **sums)
    found = oracle.grads((z, kl), leaves[2:], (tensors[1], c.to(kl.dtype).expand(shape[0])))
    right = oracle.grads((right_z, right_kl), exact[2:], (wide[1], c.double().expand(shape[0])))
    for mine, true in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), true, **close)

    for reduction, upstream in (("sum", torch.ones_like(c)), ("sum", c), ("none", c.expand(shape[0]))):
        out = fe.elbo_loss(*leaves, beta=0.5, reduction=reduction)
        right = oracle.elbo(*exact, beta=0.5, reduction=reduction)
        for mine, true in zip(out, right, strict=True):
            torch.testing.assert_close(mine.double(), true, **sums)
        found = oracle.grads(out.loss, leaves, upstream.to(out.loss.dtype))
        for mine, true in zip(found, oracle.grads(right[0], exact, upstream.double()), strict=True):
            torch.testing.assert_close(mine.double(), true, **elements)


def test_gradients_of_shared_memory(backend, device):
    base = oracle.randn(3, 10, seed=1, device=device)
    x_hat = leaf(base[:, :5])
    x = leaf(base[:, 5:])
    found = oracle.grads(fe.gaussian_nll(x_hat, x, reduction="sum"), [x_hat, x])
    torch.testing.assert_close(found[0], x_hat - x)
    torch.testing.assert_close(found[1], x - x_hat)
    same = leaf(base)
    out = fe.elbo_loss(same, same, same, same)
    (gradient,) = oracle.grads(out.loss, [same])
    torch.testing.assert_close(gradient, (same + 0.5 * torch.expm1(same)).detach() / 3)


@pytest.mark.parametrize(
    ("shape", "wide"), [((2**31 + 8, 1), True), ((1, 2**31 + 8), True), ((3, 2**29), False), ((4, 2**20), False)], ids=str
)
def test_counts_beyond_32_bits_are_counted_in_64(shape, wide):
    launch = pytest.importorskip("fused_elbo.backends.triton.launch")
    t = torch.empty(shape, device="meta")
    assert launch.as_rows(t, keep_order=True).wide is wide
    # A column apart, twice the offsets.
    assert launch.as_rows(torch.empty(3, 2**30, 2, device="meta")[:, :, 0], keep_order=True).wide


def test_dimensions_merge_as_they_lie_in_memory():
    launch = pytest.importorskip("fused_elbo.backends.triton.launch")
    t = torch.empty(2, 3, 4, 5, device="meta").contiguous(memory_format=torch.channels_last)
    assert [launch.as_rows(t, keep_order=kept).sizes for kept in (False, True)] == [(60,), (3, 20)]
