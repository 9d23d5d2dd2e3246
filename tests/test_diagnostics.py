"""``fe.check_values`` and ``docs/messages.md``: what is said of each mistake, of nothing else, and of nothing outside."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from documents import blocks
from torch.utils.checkpoint import checkpoint

import fused_elbo as fe
from fused_elbo import diagnostics

DOCUMENT = (Path(__file__).parents[1] / "docs/messages.md").read_text()
N, D, LATENTS = 4, 784, 20


def rows() -> list[tuple[str, str, str, str]]:
    found = re.findall(r"^\| `([^|]+)` \| ([^|]+) \| `([^|]+)` \| `([^|]+)` \|$", DOCUMENT, re.MULTILINE)
    assert len(found) == 12
    return found


def scope() -> dict[str, object]:
    x_hat, mu, logvar = (oracle.randn(N, size, seed=k) for k, size in enumerate((D, LATENTS, LATENTS)))
    missing = oracle.randn(N, D, seed=5).sigmoid()
    missing[1, 5] = missing[2, 7] = torch.nan
    kl = fe.kl_divergence(mu, logvar, reduction="none")
    tensors = {"x_hat": x_hat.requires_grad_(), "x": oracle.randn(N, D, seed=4).sigmoid(), "mu": mu, "logvar": logvar}
    return {
        **tensors,
        "variance": logvar.exp(),
        "missing": missing,
        "kl": kl,
        "fe": fe,
        "torch": torch,
        "checkpoint": checkpoint,
    }


def said(expression: str) -> str:
    """The error or the warnings of an expression in ``check_values``."""
    with warnings.catch_warnings(record=True) as caught, fe.check_values():
        warnings.simplefilter("always")
        try:
            eval(expression, scope())
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
    assert all(Path(w.filename).name == "<string>" for w in caught), "the line that made the call"
    return "\n".join(str(w.message) for w in caught)


@pytest.mark.parametrize(("mistake", "when", "message", "instead"), rows(), ids=lambda text: text[:40])
def test_a_mistake_and_its_cure(mistake, when, message, instead):
    assert message in said(mistake)
    assert said(instead) == ""
    if when == "`check_values`":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            eval(mistake, scope())


def test_code_runs():
    (block,) = blocks(DOCUMENT)
    namespace: dict[str, object] = {}
    exec(compile(block, "messages.md", "exec"), namespace)
    assert namespace["x_hat"].grad.any()
    assert diagnostics.active is False


def test_torch_has_nothing_to_say_of_a_tensor_that_needs_a_gradient():
    with warnings.catch_warnings(), fe.check_values():
        warnings.simplefilter("error")
        fe.rsample_kl(torch.nn.Linear(784, 40)(torch.rand(16, 784)), chunk_dim=1)


def test_blocks_of_threads_may_overlap():
    first, second = fe.check_values(), fe.check_values()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert diagnostics.active is True, "the second has not ended"
    second.__exit__(None, None, None)
    assert diagnostics.active is False


PACKED = "torch.cat((mu, variance), 1)"
LAYER = "torch.ones(784, 20), None"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("fe.elbo_loss(x_hat, x, mu, variance)", "logvar: got nothing but positive"),
        ("fe.elbo_loss(x_hat, missing, kl=kl)", "x: got nan"),
        ("fe.elbo_loss(x_hat, x, kl=kl / 0)", "kl: got inf at (0,)"),
        ("fe.elbo_loss(x_hat, x, kl=kl, beta=0.001, batch_dims=(0,))", "summed over 784 elements"),
        ("fe.elbo_loss(x_hat.view(4, 7, 112), x.view(4, 7, 112), kl=kl[:, None].expand(4, 7), beta=0.001, batch_dims=(0, 1))",
         "summed over 112 elements"),
        ("fe.nn.ELBOLoss(beta=0.001)(x_hat, x, mu, logvar)", "beta: got 0.001"),
        ("fe.nn.GaussianLatent()(mu, variance)", "logvar: got nothing but positive"),
        (f"torch.nn.Sequential(fe.nn.GaussianLatent(chunk_dim=1))({PACKED})", "logvar: got nothing but positive"),
        (f"checkpoint(fe.nn.GaussianLatent(chunk_dim=1), {PACKED}, use_reentrant=False)", "logvar: got nothing but positive"),
        (f"fe.rsample_kl({PACKED}, chunk_dim=1)", "logvar: got nothing but positive"),
        (f"fe.reparameterize({PACKED}, chunk_dim=1)", "logvar: got nothing but positive"),
        ("fe.kl_per_dim(mu, variance)", "logvar: got nothing but positive"),
        ("fe.kl_per_dim(mu / 0, logvar)", "mu: got"),
        ("fe.rsample_kl(mu.half(), logvar.half() * 0 + 23)", "in a sample of torch.float16"),
        ("fe.rsample_kl(mu, logvar - 31)", "logvar: got -3"),
        ("fe.rsample_kl(mu, variance * 0, param='var')", 'got 0 with param="var", takes positive numbers'),
        ("fe.nll(x_hat, x * 2, likelihood='bernoulli', mask=x < 0.5)", ""),
        ("fe.nll(x_hat / 0, x, likelihood='laplace')", "x_hat: got"),
        ("fe.gaussian_nll(x_hat, x, sigma=0.1)", ""),
        ("fe.elbo_loss(x_hat, x, mu, logvar, beta=0.0)", ""),
        ("fe.elbo_loss(x_hat, x, mu, logvar, beta=0.001, sigma=0.1)", ""),
        ("fe.kl_divergence(mu, variance[:1] * 0 + logvar)", ""),
        ("fe.kl_divergence(mu[:1], variance[:1])", ""),
        ("fe.kl_divergence(mu, variance, prior=(mu, logvar))", ""),
        ("fe.kl_divergence(mu, logvar * 0)", ""),
        ("fe.kl_divergence(mu[:0], logvar[:0])", ""),
        ("fe.nll(x_hat[:0], x[:0], likelihood='bernoulli')", ""),
        ("fe.kl_divergence(missing[:, :20], logvar, mask=~missing[:, :20].isnan())", ""),
        ("fe.kl_divergence(missing[:, :20], logvar, mask=missing[:, :20].isnan())", "mu: got nan at (1, 5), and 2 of 80"),
        ("fe.rsample_log_ratio(mu, variance, num_samples=2)", "logvar: got nothing but positive"),
        ("fe.iwae_loss(torch.stack((x_hat, x_hat / 0)), x, kl.expand(2, 4))", "x_hat: got"),
        ("fe.iwae_loss(torch.stack((x_hat, x_hat)), missing, kl.expand(2, 4))", "x: got nan"),
        ("fe.iwae_loss(torch.stack((x_hat, x_hat)), missing, kl.expand(2, 4), mask=~missing.isnan())", ""),
        ("fe.log_likelihood(torch.nn.Linear(20, 784), x, mu / 0, logvar, num_samples=2)", "mu: got"),
        (f"fe.linear_gaussian_nll(mu / 0, {LAYER}, x)", "h: got"),
        (f"fe.linear_gaussian_nll(mu, {LAYER}, missing)", "x: got nan"),
        (f"fe.linear_gaussian_nll(mu, {LAYER}, missing, mask=~missing.isnan())", ""),
        (f"fe.linear_gaussian_nll(mu, {LAYER}, 2 * x, likelihood='bernoulli')", 'with likelihood="bernoulli", takes numbers'),
        (f"fe.linear_gaussian_nll(mu, {LAYER}, (x / 0).to_sparse_csr())", "x: got inf"),
        ("fe.linear_gaussian_nll(mu, torch.ones(784, 20), torch.ones(784) / 0, x)", "bias: got inf at (0,)"),
        ("fe.gaussian_nll(x_hat, x.to('meta'))", "x: got device meta"),
        ("fe.gaussian_nll(x_hat, 3.0)", "x: got 3.0, takes a tensor"),
        ("fe.kl_divergence(mu, None)", "logvar: got None"),
        ("fe.elbo_loss(x_hat, x)", "kl: got neither of mu and kl"),
        ("fe.nll(x_hat, x, mask=x)", "mask: got dtype torch.float32, takes torch.bool"),
        ("fe.kl_divergence(mu, logvar, mask=mu)", "mask: got dtype torch.float32, takes torch.bool"),
    ],
)  # fmt: skip
def test_what_is_said(expression, message):
    if message:
        assert message in said(expression)
    else:
        assert said(expression) == ""


def test_it_ends_with_the_block_and_nests():
    with fe.check_values():
        assert said("fe.gaussian_nll(x_hat, missing)")
        assert diagnostics.active is True
        with pytest.raises(ValueError, match="nan"):
            eval("fe.gaussian_nll(x_hat, missing)", scope())
    assert diagnostics.active is False
    assert eval("fe.gaussian_nll(x_hat, missing)", scope()).isnan()


def test_transforms_and_compilers_are_left_alone():
    x_hat, x = oracle.randn(3, 5), oracle.randn(3, 5, seed=1)

    def loss(t):
        return fe.gaussian_nll(t, x)

    with fe.check_values():
        expected = x_hat - x
        torch.testing.assert_close(torch.func.grad(loss)(x_hat), expected / 3)
        graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(graph(x_hat), loss(x_hat))
