"""Under ``torch.compile`` the operations break the graph, as the README says, and give the same numbers. ``torch.func``
differentiates them; what it cannot do with them it refuses."""

from __future__ import annotations

import oracle
import pytest
import torch

import fused_elbo as fe


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)
        self.latent, self.loss = fe.nn.GaussianLatent(chunk_dim=1), fe.nn.ELBOLoss(beta=0.5)

    def forward(self, x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        z, kl = self.latent(self.encoder(x), seed=seed)
        return self.loss(self.decoder(z), x, kl=kl).loss


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiled_equals_eager(backend, device):
    torch.manual_seed(0)
    model, x, seed = Model().to(device), oracle.randn(16, 12, device=device), torch.tensor(3, device=device)
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        loss = forward(x, seed)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


def test_func_grad_and_its_grad(backend, device):
    mu, logvar, x, eps = (oracle.randn(3, 4, seed=k, dtype=torch.float64, device=device) for k in range(4))

    def fused(mu):
        z, kl = fe.rsample_kl(mu, logvar, eps=eps)
        return fe.elbo_loss(torch.tanh(z), x, kl=kl).loss + fe.elbo_loss(mu * mu, x, mu, logvar).loss

    def eager(mu):
        z, kl = oracle.reparameterize(mu, logvar, eps), oracle.kl_divergence(mu, logvar)
        return oracle.elbo(torch.tanh(z), x, kl=kl)[0] + oracle.elbo(mu * mu, x, mu, logvar)[0]

    found, right = (
        (torch.func.grad(loss)(mu), torch.func.grad(lambda m, loss=loss: (torch.func.grad(loss)(m) ** 2).sum())(mu))
        for loss in (fused, eager)
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_vmap_is_refused(backend, device):
    t = torch.zeros(2, 3, 4, device=device)
    for function, name in ((fe.gaussian_nll, "ELBO"), (fe.kl_divergence, "RsampleKL")):
        with pytest.raises(RuntimeError, match=f"vmap over {name}"):
            torch.vmap(function)(t, t)


def test_a_tensor_that_outlived_its_transform_stands_for_what_it_wraps(backend, device):
    t, other = (oracle.randn(3, 4, seed=k, device=device) for k in range(2))
    outlived = []
    torch.func.grad(lambda a: outlived.append(a) or a.sum())(t)
    for function in (lambda a: fe.gaussian_nll(a, other), lambda a: fe.reparameterize(a, other, seed=3)):
        out = function(*outlived)
        assert not out.requires_grad
        assert torch.equal(out, function(t))
