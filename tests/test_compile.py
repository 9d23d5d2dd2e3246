"""Under ``torch.compile`` the operations break the graph, as the README says, and give the same numbers."""

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
