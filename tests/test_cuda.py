"""What only a GPU can show: streams, graphs, silence towards the host, other devices, more than 2^31 elements."""

from __future__ import annotations

import oracle
import pytest
import torch

import fused_elbo as fe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE, LATENTS = (64, 3, 50, 50), (64, 24)
GIB = 2**30


@pytest.fixture
def leaves() -> dict[str, torch.Tensor]:
    shapes = {"x_hat": SHAPE, "mu": LATENTS, "logvar": LATENTS}
    return {
        name: oracle.randn(*shape, seed=k, device="cuda").requires_grad_() for k, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture
def x() -> torch.Tensor:
    return oracle.randn(*SHAPE, seed=7, device="cuda")


def step(x_hat, x, mu, logvar, **noise):
    """Loss, sample and all gradients of one training step, both forms of the loss."""
    z, kl = fe.rsample_kl(mu, logvar, **noise)
    staged = fe.elbo_loss(x_hat, x, kl=kl).loss
    classic = fe.elbo_loss(x_hat, x, mu, logvar).loss
    grads = torch.autograd.grad(staged + classic + z.sum(), (x_hat, mu, logvar))
    return [staged.detach(), classic.detach(), z.detach(), *grads]


def test_concurrent_streams_give_the_same_bits(backend, leaves, x):
    expected = step(x=x, seed=3, **leaves)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(x=x, seed=3, **leaves))
    torch.cuda.synchronize()
    for result in results:
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)


def test_graph_replay_draws_fresh_noise_and_runs_beside_eager(backend, leaves, x):
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step(x=x, **leaves)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _, z, *_ = step(x=x, **leaves)
    samples = []
    for _ in range(3):
        graph.replay()
        beside = step(x=x, seed=3, **leaves)
        torch.cuda.synchronize()
        samples.append(z.clone())
        assert torch.equal(loss, beside[0])
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[1], samples[2])


def test_graphs_that_are_replayed_at_once_give_the_same_bits(backend, leaves, x):
    expected = step(x=x, seed=3, **leaves)
    graphs = []
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(x=x, seed=3, **leaves)
        graphs.append((graph, torch.cuda.Stream(), results))
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream, _ in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for *_, results in graphs:
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)


def test_a_compiler_makes_graphs_of_it(backend, leaves, x):
    """What a first call leaves behind must not lie in the memory of the compiler's graphs, which it looks through."""

    def total(x_hat, x, mu, logvar):
        z, kl = fe.rsample_kl(mu, logvar, seed=3)
        return fe.elbo_loss(x_hat, x, kl=kl).loss + z.sum()

    compiled = torch.compile(total, mode="reduce-overhead", fullgraph=True)
    found = []
    # The first call is made to warm up, the second is captured, the third is a replay.
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(x=x, **leaves)
        found.append([t.clone() for t in (value.detach(), *torch.autograd.grad(value, list(leaves.values())))])
    value = total(x=x, **leaves)
    expected = value.detach(), *torch.autograd.grad(value, list(leaves.values()))
    for result in found:
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_step_never_waits_for_the_device(backend, leaves, x):
    step(x=x, **leaves)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x=x, seed=3, **leaves)
        step(x=x, **leaves)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(backend, leaves, x):
    expected = step(x=x, seed=3, **leaves)
    moved = {name: t.detach().to("cuda:1").requires_grad_() for name, t in leaves.items()}
    for a, b in zip(step(x=x.to("cuda:1"), seed=3, **moved), expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.to("cuda:0"), b)


@pytest.fixture
def large(backend):
    """The backends that hold nothing besides what they return, on a GPU with room for that."""
    if backend == "reference":
        pytest.skip("plain PyTorch holds ten times as much")
    if torch.cuda.get_device_properties(0).total_memory < 60 * GIB:
        pytest.skip("needs 60 GiB")


@pytest.mark.parametrize("count", [2**31 - 7, 2**31 + 2**20])
def test_rescaling_about_2_to_the_31_elements(large, count):
    x_hat = torch.ones(1, count, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    loss = fe.gaussian_nll(x_hat, torch.zeros((), dtype=torch.bfloat16, device="cuda").expand_as(x_hat))
    (grad,) = torch.autograd.grad(3 * loss, [x_hat])
    assert (grad == 3).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_more_elements_than_32_bits_count(large, rows):
    columns = (2**31 + 2**20) // rows + 5
    mu = torch.full((rows, columns), 0.5, dtype=torch.bfloat16, device="cuda")
    logvar = torch.zeros_like(mu)
    z, kl = fe.rsample_kl(mu, logvar, seed=11)
    nll = fe.gaussian_nll(mu, logvar, reduction="none")
    torch.testing.assert_close(kl, torch.full_like(kl, columns / 8), rtol=1e-6, atol=0)
    torch.testing.assert_close(nll, torch.full_like(nll, columns / 8), rtol=1e-6, atol=0)
    # The last elements of the last row, as a shard of their own.
    tail = fe.reparameterize(mu[-1:, -9:], logvar[-1:, -9:], seed=11, first_index=rows * columns - 9)
    assert torch.equal(z[-1:, -9:], tail)
