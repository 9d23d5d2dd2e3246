"""The linear head in a training loop: the products it makes, the memory it takes, how often it may be differentiated."""

from __future__ import annotations

import copy
import itertools
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_linear import Layer, assert_same, layer, unfused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fused_elbo as fe
from fused_elbo import linear_operator
from fused_elbo.autograd.linear import CHUNK_BYTES, GRANULE, chunk_of
from fused_elbo.bench.memory import allocated_at_once

PRODUCTS = ("aten::addmm", "aten::mm", "aten::addmm_")


class Calls(TorchDispatchMode):
    """The products that are made, and the bytes of the largest tensor that is, other than those of ``known``."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.products = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function._schema.name in PRODUCTS
        stored = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *(s.nbytes() for s in stored if s.data_ptr() not in self.known)])
        return out


def data(count, features, device="cpu", dtype=torch.float64):
    return oracle.randn(count, features, seed=3, dtype=dtype, device=device)


def sparse(count, features, share=0.2, dtype=torch.float64, device="cpu"):
    dense = data(count, features, device, dtype)
    return dense.masked_fill(torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)).to(device) > share, 0.0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("needed", [s for r in range(5) for s in itertools.combinations(range(4), r)], ids=str)
def test_a_gradient_that_is_not_needed_costs_no_product(device, needed, reduction):
    tensors = [*layer(8, 6, device=device), data(8, 6, device)]
    for k in needed:
        tensors[k] = oracle.leaf(tensors[k])
    with Calls() as forward:
        value = fe.linear_gaussian_nll(*tensors, reduction=reduction, chunk_size=4)
    with Calls() as backward:
        found = oracle.grads(value.sum(), [tensors[k] for k in needed]) if needed else ()
    chunks, wanted = 2, len({0, 1} & set(needed))
    assert forward.products == chunks * (1 if reduction == "none" else 1 + wanted)
    assert backward.products == (chunks * (1 + wanted) if reduction == "none" and needed else 0)
    everything = [oracle.leaf(t) for t in tensors]
    right = oracle.grads(unfused(Layer(*everything[:3]), everything[3], reduction="sum"), everything)
    assert_same(found, [right[k] for k in needed])


def test_without_gradients_no_product_but_the_first(device):
    given = layer(8, 6, device=device).leaves()
    with torch.no_grad(), Calls() as calls:
        value = fe.linear_gaussian_nll(*given, data(8, 6, device), sigma="optimal", chunk_size=4)
    assert (calls.products, value.requires_grad) == (2, False)


MEMORY = {
    "plain": {},
    "none": {"reduction": "none"},
    "optimal": {"sigma": "optimal"},
    "laplace": {"likelihood": "laplace", "activation": "tanh"},
    "sparse": {"sparse": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", MEMORY)
def test_x_hat_never_exists(name):
    """Nothing of its size, and no more at once than gradients and two chunks; a sparse target's rows make a third."""
    options = dict(MEMORY[name])
    dtype, is_sparse = options.pop("dtype", torch.float32), options.pop("sparse", False)
    count, features, width, chunk = 512, 2048, 4, (64, 512)
    given = layer(count, features, width, dtype).leaves()
    x = sparse(count, features, dtype=dtype).to_sparse_csr() if is_sparse else data(count, features, dtype=dtype)
    if is_sparse:
        chunk = (16, 512)

    def run():
        value = fe.linear_gaussian_nll(*given, x, chunk_size=chunk, **options)
        return oracle.grads(value.sum(), given)

    inputs = (x.crow_indices(), x.col_indices(), x.values()) if is_sparse else (x,)
    with Calls(*given, *inputs) as calls:
        run()
    whole, itemsize = count * features * dtype.itemsize, max(4, dtype.itemsize)
    gradients = (count * width + features * width + features) * itemsize
    assert calls.largest < whole / 8
    # Terms in float32 and the sums of each chunk's rows are the rest.
    rest = 4 * count * (features // chunk[1] + 3) + 4096
    full_rows = 3 * chunk[0] * features * 4 if is_sparse else 0
    both = 2 * gradients if dtype.itemsize < 4 else gradients
    assert allocated_at_once(run) < both + 2 * math.prod(chunk) * itemsize + rest + full_rows < whole


def test_the_rule_for_chunks():
    count, features = 4096, 30000
    rows, columns = chunk_of(count, features, 4, "cpu")
    # The unfused route holds x_hat and its gradient.
    assert 2 * rows * columns * 4 < 0.05 * 2 * count * features * 4
    for device, bytes_ in CHUNK_BYTES.items():
        for n, d in ((4096, 30000), (30000, 4096), (65536, 784), (256, 262144), (1, 10**7), (10**7, 1), (3, 5), (0, 4), (4, 0)):
            for itemsize in (2, 4, 8):
                rows, columns = chunk_of(n, d, itemsize, device)
                assert 1 <= rows <= max(n, 1)
                assert 1 <= columns <= max(d, 1)
                assert rows * columns * itemsize <= bytes_
                whole = rows == max(n, 1) and columns == max(d, 1)
                # One more granule each way would not fit.
                assert whole or (rows + GRANULE) * (columns + GRANULE) * itemsize > bytes_
                assert rows in (n, 1) or rows % GRANULE == 0
                assert columns in (d, 1) or columns % GRANULE == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_gives_the_same_gradient_every_time(backend, device, reduction):
    given, x = layer(7, 13, device=device).leaves(), oracle.leaf(data(7, 13, device))
    value = fe.linear_gaussian_nll(*given, x, reduction=reduction, chunk_size=4)
    right = unfused(given, x, reduction=reduction)
    for factor, kept in ((2.0, True), (-1.0, True), (2.0, False)):
        # Of a sum's gradient every element is one number in memory.
        found = oracle.grads((factor * value).sum(), (*given, x), retain_graph=kept)
        assert_same(found, oracle.grads((factor * right).sum(), (*given, x), retain_graph=kept))
    with pytest.raises(RuntimeError, match="second time"):
        oracle.grads(value.sum(), (*given, x))


def test_a_gradient_is_accumulated_and_belongs_to_the_caller(device):
    given, x = layer(7, 13, device=device).leaves(), data(7, 13, device)
    for _ in range(3):
        fe.linear_gaussian_nll(*given, x).backward()
    assert_same([t.grad for t in given], [3 * g for g in oracle.grads(unfused(given, x), given)])


@pytest.mark.parametrize("options", [{}, {"sigma": "optimal"}, {"likelihood": "laplace", "reduction": "none"}], ids=str)
def test_two_runs_give_the_same_bits(backend, device, interpreted, options):
    given, x = layer(70, 130, dtype=torch.float32, device=device).leaves(), data(70, 130, device, torch.float32)

    def run():
        value = fe.linear_gaussian_nll(*given, x, chunk_size=40 if interpreted else (32, 64), **options)
        return value, *oracle.grads(value.sum(), given)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("options", [{}, {"likelihood": "laplace", "reduction": "none"}], ids=str)
def test_a_sparse_target_on_every_backend(backend, device, interpreted, options):
    assert_sparse_is_dense(sparse(7, 13, device=device), 4 if interpreted else (3, 5), **options)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("chunk", [None, 1, 7, (2, 4)], ids=str)
def test_a_sparse_target_is_the_dense_one(device, share, chunk):
    assert_sparse_is_dense(sparse(7, 13, share, device=device), chunk, sigma="optimal")


def assert_sparse_is_dense(dense, chunk, **options):
    """To the bit, with a row of zeros, and with indices of 64 and of 32 bits."""
    given = layer(7, 13, device=dense.device).leaves()
    dense[3] = 0.0
    csr = dense.to_sparse_csr()
    narrow = torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape)
    results = []
    for x in (dense, csr, narrow):
        value = fe.linear_gaussian_nll(*given, x, chunk_size=chunk, **options)
        results.append((value, *oracle.grads(value.sum(), given)))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_sparse_targets_elsewhere(device):
    """Bytes; no rows at all; a function transform, which takes none; and double backward, which makes it dense."""
    given, dense = layer(6, 9, device=device).leaves(), sparse(6, 9, device=device)
    levels = (dense.abs() * 80).clamp(0, 255).to(torch.uint8)
    bernoulli = {"likelihood": "bernoulli", "scale": 1 / 255}
    both = [fe.linear_gaussian_nll(*given, x, **bernoulli) for x in (levels, levels.to_sparse_csr())]
    assert torch.equal(*both)
    empty = layer(0, 9, device=device)
    assert fe.linear_gaussian_nll(*empty, dense[:0].to_sparse_csr(), reduction="sum") == 0
    csr = dense.to_sparse_csr()
    with pytest.raises(TypeError, match=r"^x: got torch.sparse_csr under a function transform .*, takes a dense tensor there"):
        torch.func.grad(lambda h: fe.linear_gaussian_nll(h, given.weight, given.bias, csr))(given.h.detach())
    (first,) = oracle.grads(fe.linear_gaussian_nll(*given, csr), [given.h], create_graph=True)
    (right,) = oracle.grads(unfused(given, dense), [given.h], create_graph=True)
    assert_same(oracle.grads(first.square().sum(), [given.h]), oracle.grads(right.square().sum(), [given.h]))


def test_function_transforms(device):
    given, x = layer(5, 9, device=device), data(5, 9, device)

    def of_one(h, x):
        return fe.linear_gaussian_nll(h[None], given.weight, given.bias, x[None])

    def right_of_one(h, x):
        return unfused(Layer(h[None], given.weight, given.bias), x[None])

    per_sample = [torch.func.vmap(torch.func.grad(f))(given.h, x) for f in (of_one, right_of_one)]
    assert_same(per_sample[:1], per_sample[1:])
    tangents = [torch.func.jvp(lambda h, f=f: f(h, x[0]), (given.h[0],), (given.h[1],)) for f in (of_one, right_of_one)]
    assert_same(*tangents)


@pytest.mark.parametrize("reentrant", [False, True], ids=("", "reentrant"))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_checkpoint(device, reduction, reentrant):
    given, x = layer(7, 13, device=device).leaves(), data(7, 13, device)

    def run(*tensors):
        return fe.linear_gaussian_nll(*tensors, reduction=reduction, likelihood="laplace").sum()

    found = checkpoint(run, *given, x, use_reentrant=reentrant)
    assert_same(oracle.grads(run(*given, x), given), run_backward(found, given))


def run_backward(loss, leaves):
    """A reentrant checkpoint takes backward() alone."""
    loss.backward()
    return [t.grad for t in leaves]


def test_gradients_in_batches(device):
    given, x = layer(5, 9, device=device).leaves(), data(5, 9, device)
    terms = [f(*args, reduction="none") for f, args in ((fe.linear_gaussian_nll, (*given, x)), (unfused, (given, x)))]
    eye = torch.eye(5, dtype=torch.float64, device=device)
    assert_same(*(oracle.grads(t, given, eye, is_grads_batched=True) for t in terms))


def test_fake_tensors():
    with FakeTensorMode():
        h, weight = (torch.empty(size, 3, requires_grad=True) for size in (5, 4))
        fe.linear_gaussian_nll(h, weight, None, torch.empty(5, 4), sigma="optimal").backward()
        assert (h.grad.shape, weight.grad.shape) == (h.shape, weight.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, dtype):
    """Products and x_hat in the low precision, losses and parameters' gradients in float32, summed up as such."""
    given, x = layer(70, 40, dtype=torch.float32, device=device).leaves(), data(70, 40, device, torch.float32)
    with torch.autocast(device.type, dtype):
        loss = fe.linear_gaussian_nll(*given, x, chunk_size=32)
        composed = unfused(given, x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, composed, rtol=1e-5, atol=0)
    for mine, right in zip(oracle.grads(loss, given), oracle.grads(composed, given), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2 * right.abs().max().item())
    wide = layer(7, 5, device=device).leaves()
    with torch.autocast(device.type, dtype):
        assert fe.linear_gaussian_nll(*wide, data(7, 5, device)).dtype == torch.float64


COMPILED = {
    "none": {"reduction": "none", "likelihood": "laplace"},
    "optimal": {"sigma": "optimal", "min_log_sigma": -1.0},
    "learned": {"log_sigma": -0.3, "activation": "tanh"},
}


def test_full_graph(backend, device):
    assert_compiles(device, chunk_size=8)


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_full_graph_of_options(device, options):
    assert_compiles(device, chunk_size=(8, 8), **options)


def assert_compiles(device, **options):
    torch._dynamo.reset()
    head = fe.nn.LinearGaussianHead(4, 12, **options).to(device)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (16, 7):
        h, x = oracle.leaf(oracle.randn(count, 4, device=device)), data(count, 12, device, torch.float32)
        results = [(v, *oracle.grads(v.sum(), (h, *head.parameters()))) for v in (compiled(h, x), head(h, x))]
        assert_same(*results, bound=1e-5)
    torch._dynamo.reset()


def operator_calls(dtype):
    tensors = [t.requires_grad_() for t in (*layer(5, 6, 3, dtype), data(5, 6, dtype=dtype))]
    scales = [oracle.randn(*shape, dtype=dtype).requires_grad_() for shape in ((5, 6), (1, 6), (5, 1))]
    weight, mask = oracle.randn(5, 1, seed=4).abs(), oracle.randn(5, 6, seed=5) > 0
    gaussian, laplace = ("gaussian", "identity", -0.5, True, 1.0, 0.0), ("laplace", "tanh", 0.0, False, 1.0, 0.0)
    all_needed = [True] * 5
    yield (*tensors, None, None, None, *gaussian, dtype, [2, 4], False, [True] * 4 + [False])
    yield (*tensors, None, None, None, *gaussian, dtype, None, True, [True] * 4 + [False])
    for scale in scales:
        yield (*tensors, scale, weight, mask, *laplace, dtype, None, False, all_needed)
    frozen = [tensors[0], *(t.detach() for t in tensors[1:])]
    yield (*frozen, None, None, None, *gaussian, dtype, None, False, [True] + [False] * 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    """Schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    calls = list(operator_calls(dtype))
    for k, call in enumerate(calls if dtype == torch.float64 else calls[:1]):
        torch.library.opcheck(linear_operator.linear_nll, call)
        if k < 2:
            *args, _, needs = (a.detach() if isinstance(a, torch.Tensor) else a for a in call)
            upstream = torch.ones(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            torch.library.opcheck(linear_operator.linear_nll_backward, (upstream, *args, needs))


def test_module(device):
    dense = torch.nn.Linear(4, 12).to(device)
    head = fe.nn.LinearGaussianHead(4, 12, activation="sigmoid", sigma=0.5, device=device)
    head.load_state_dict(dense.state_dict())
    h, x = oracle.leaf(oracle.randn(5, 4, device=device)), data(5, 12, device, torch.float32)
    assert_same([head(h, x)], [fe.gaussian_nll(dense(h), x, activation="sigmoid", sigma=0.5)], 1e-6)
    assert torch.equal(head.reconstruct(h), dense(h).sigmoid())
    assert head(h, x, mask=x > 0) < head(h, x) + 12 * math.log(2)
    for options, function in (({}, torch.nn.Identity()), ({"likelihood": "bernoulli"}, torch.sigmoid)):
        other = fe.nn.LinearGaussianHead(4, 12, bias=False, device=device, **options)
        assert other.state_dict().keys() == {"weight"}
        assert torch.equal(other.reconstruct(h), function(F.linear(h, other.weight)))
    learned = fe.nn.LinearGaussianHead(4, 12, log_sigma=-0.5, device=device)
    learned(h, x).backward()
    assert {name for name, p in learned.named_parameters() if p.grad is not None} == {"weight", "bias", "log_sigma"}
    wide = fe.nn.LinearGaussianHead(4, 12, log_sigma=0, device="meta", dtype=torch.float64)
    assert {(p.dtype, p.device.type) for p in wide.parameters()} == {(torch.float64, "meta")}
    assert "in_features=4, out_features=12, bias=True, sigma=0.5" in repr(head)
    assert "activation='sigmoid'" in repr(head)
    torch.manual_seed(3)
    head.reset_parameters()
    torch.manual_seed(3)
    dense.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), dense.parameters(), strict=True))
    assert copy.deepcopy(head).state_dict().keys() == head.state_dict().keys()


H, W, B, X = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(6), torch.zeros(4, 6)
ERRORS = [
    ((H[0], W, B, X), {}, ValueError, r"^h: got shape \(3,\), takes \(N, H\)"),
    ((H.long(), W, B, X), {}, TypeError, r"^h: got dtype torch.int64"),
    ((H, W.t(), B, X), {}, ValueError, r"^weight: got shape \(3, 6\), takes \(D, 3\)"),
    ((H, W.double(), B, X), {}, TypeError, r"^weight: got dtype torch.float64, takes that of h, torch.float32"),
    ((H, W, B.double(), X), {}, TypeError, r"^bias: got dtype torch.float64, takes that of h"),
    ((H, W, B[:5], X), {}, ValueError, r"^bias: got shape \(5,\), takes \(6,\)"),
    ((H, W, B.to("meta"), X), {}, ValueError, r"^bias: got device meta, takes that of h, cpu"),
    ((H, W, B, X[:3]), {}, ValueError, r"^x: got shape \(3, 6\), takes h's 4 samples of weight's 6 elements"),
    ((H, W, B, X[:, :5]), {}, ValueError, r"^x: got shape \(4, 5\)"),
    ((H, W, B, X.long()), {}, TypeError, r"^x: got dtype torch.int64"),
    ((H, W, B, X.to_sparse()), {}, TypeError, r"^x: got layout torch.sparse_coo, takes torch.strided or torch.sparse_csr"),
    ((H, W, B, X[:, :5].to_sparse_csr()), {}, ValueError, r"^x: got shape \(4, 5\), takes \(4, 6\) of a sparse tensor"),
    ((H, W, B, X.to_sparse_csr().requires_grad_()), {}, ValueError, r"^x: got a sparse tensor that requires grad"),
    ((H, W, B, X), {"chunk_size": 0}, ValueError, r"^chunk_size: got 0, takes rows, or a pair"),
    ((H, W, B, X), {"chunk_size": (1, 2, 3)}, ValueError, r"^chunk_size: got \(1, 2, 3\)"),
    ((H, W, B, X), {"chunk_size": 1.5}, TypeError, r"^chunk_size: got 1.5, takes an int"),
    ((H, W, B, X), {"reduction": "max"}, ValueError, r"^reduction: got 'max'"),
    ((H, W, B, X), {"sigma": 0.0}, ValueError, r"^sigma: got 0.0"),
    ((H, W, B, X), {"inplace": True}, TypeError, r"^inplace: is no argument here"),
    ((H, W, B, X), {"batch_dims": (0, 1), "reduction": "none"}, ValueError, r"^batch_dims: got \(0, 1\) with reduction"),
    ((H, W, B, X.to(torch.uint8)), {}, TypeError, r"^x: got dtype torch.uint8"),
]


@pytest.mark.parametrize(("tensors", "options", "kind", "message"), ERRORS, ids=[e[3][1:22] for e in ERRORS])
def test_errors(tensors, options, kind, message):
    with pytest.raises(kind, match=message):
        fe.linear_gaussian_nll(*tensors, **options)
