"""What is the native CPU library's own: its instruction sets, its threads, its conversions."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from tolerances import FLOATS

import fused_elbo as fe
from fused_elbo import ops
from fused_elbo.backends import native

pytestmark = pytest.mark.skipif(ops.unavailable("native", "cpu") is not None, reason=str(ops.unavailable("native", "cpu")))

# Rows that share a tile, rows of a tile and one more, rows of several tiles; too few and enough elements for two threads.
SHAPES = ((3, 5), (700, 20), (40, 1023), (40, 1024), (40, 1025), (5, 4099), (1, 60001), (2, 3, 67, 101))


def outputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Everything that one training step computes."""
    mu, logvar, x_hat, x = (oracle.randn(*shape, seed=s, dtype=dtype) for s in range(4))
    leaves = [t.requires_grad_() for t in (mu, logvar, x_hat, x)]
    with fe.backend("native"):
        z, kl = fe.rsample_kl(mu, logvar, seed=5, first_index=2)
        terms = fe.elbo_loss(x_hat, x, kl=kl, beta=0.3)
        classic = fe.elbo_loss(x_hat, x, mu, logvar, beta=0.3, reduction="none")
        upstream = torch.linspace(0.5, 2, shape[0]).to(classic.loss.dtype)
        grads = torch.autograd.grad((z.sum(), terms.loss * 1.7, (classic.loss * upstream).sum()), leaves)
    return [t.detach() for t in (z, kl, *terms, *classic, *grads)]


def test_what_is_watched_for_faults(monkeypatch, capsys, one_thread):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    every_kernel = importlib.import_module("benchmarks.every_kernel")
    every_kernel.main()
    assert capsys.readouterr().out.startswith("every native kernel ran on")
    monkeypatch.setattr(every_kernel, "ROUGHLY", {torch.float32: 0.0})
    with pytest.raises(SystemExit, match="off by"):
        every_kernel.main()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_for_any_number_of_threads(shape, dtype):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outputs(shape, dtype))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_capability_is_the_best_that_the_processor_has():
    assert native.capability() == (os.environ.get("FUSED_ELBO_CPU") or native.supported()[0])
    assert native.supported()[-1] == "portable"


@pytest.mark.parametrize("instruction_set", native.supported())
def test_one_instruction_set_can_be_asked_for(instruction_set):
    program = "from fused_elbo.backends import native; print(native.capability())"
    environment = {**os.environ, "FUSED_ELBO_CPU": instruction_set}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == instruction_set


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_a_low_precision_survives(dtype):
    # z = mu where sigma is 0: 65,536 patterns in, the same out; NaN stays NaN, of whatever pattern.
    mu = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, -1)
    with fe.backend("native"):
        z = fe.reparameterize(mu, torch.full_like(mu, -1e4), eps=torch.zeros_like(mu))
    assert torch.equal(z.isnan(), mu.isnan())
    same = z.view(torch.int16) == mu.view(torch.int16)
    # -0 + 0 is 0.
    assert (same | mu.isnan() | (mu == 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_as_torch_does(dtype):
    bits = torch.randint(-(2**31), 2**31, (64, 4099), generator=torch.Generator().manual_seed(3), dtype=torch.int64)
    wide = bits.to(torch.int32).view(torch.float32)
    halfway = torch.arange(2**16, dtype=torch.int32) * 2**16 + 2**15
    wide = torch.cat((wide.flatten(), halfway.view(torch.float32), torch.linspace(-7e4, 7e4, 2**15)))[None]
    x = torch.zeros_like(wide, dtype=dtype)
    x_hat = wide.clone().requires_grad_()
    with fe.backend("native"):
        target = x.clone().requires_grad_()
        fe.gaussian_nll(x_hat, target, reduction="sum").backward()
    expected = (-wide).to(dtype)
    assert torch.equal(target.grad.isnan(), expected.isnan())
    assert torch.equal(target.grad[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("shapes", [((4, 0), (4, 3)), ((4, 3), (4, 0)), ((4, 0), (4, 0))])
def test_gradients_of_nothing(shapes):
    data, latents = shapes
    leaves = [torch.randn(shape).requires_grad_() for shape in (data, data, latents, latents)]
    with fe.backend("native"):
        grads = torch.autograd.grad(2 * fe.elbo_loss(*leaves).loss, leaves)
    with fe.backend("reference"):
        expected = torch.autograd.grad(2 * fe.elbo_loss(*leaves).loss, leaves)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ends_of_the_exponential(dtype):
    # Where exp(logvar / 2) leaves the dtype at either end, step by step, and far beyond.
    high, low = (1419.6, -1490.0) if dtype == torch.float64 else (177.5, -206.0)
    steps = torch.linspace(-12, 12, 481, dtype=torch.float64)
    logvar = torch.cat((high + steps, low + 5 * steps, torch.tensor([1e4, -1e4, 1e30, -1e30, torch.inf, -torch.inf]))).to(dtype)
    mu, eps = torch.zeros_like(logvar)[:, None], torch.ones_like(logvar)[:, None]
    found = {}
    for name in ("native", "reference"):
        with fe.backend(name):
            v = logvar[:, None].clone().requires_grad_()
            z, kl = fe.rsample_kl(mu, v, eps=eps)
            found[name] = z, kl, *torch.autograd.grad(z.sum(), v, retain_graph=True), *torch.autograd.grad(kl.sum(), v)
    tiny = 4 * torch.finfo(dtype).smallest_normal
    for ours, exact in zip(found["native"], found["reference"], strict=True):
        finite = ours.isfinite() & exact.isfinite()
        torch.testing.assert_close(ours[finite], exact[finite], rtol=1e-5, atol=tiny)
        # Neither a wrong sign nor a finite number where the formula has none.
        assert (ours[~finite].abs() > torch.finfo(dtype).max / 1e3).logical_or(ours[~finite].isnan()).all()


def test_tensors_without_memory_are_left_to_torch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), fe.backend("native"):
        mu, logvar, x = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
        z, kl = fe.rsample_kl(mu, logvar)
        fe.elbo_loss(z, x, kl=kl).loss.backward()
    assert mu.grad.shape == (3, 4)
