"""The autograd Functions. They own the gradients' buffers and the rules of the backward pass; backends fill the buffers.

* A gradient is computed in the forward pass, for the upstream gradient that is expected (1, or ``grad_scale``). The
  backward scales it in place by a kernel that returns at once where the expectation held; the upstream gradient never
  leaves the device. float16 is recomputed instead: what underflowed in the forward cannot be scaled back.
* Where the graph is kept (``retain_graph``), the saved gradient is left as it is and a scaled copy returned.
* With ``reduction="none"`` the upstream gradient is a vector that nobody can foresee: the backward starts from the inputs.
* Double backward differentiates the reference formulas.

``RsampleKL``, ``ELBO`` and ``GaussianNLL`` are the plain objective's; ``Posterior`` and ``NLL`` those of every other.
``LinearNLL`` is any likelihood behind a linear layer, whose output it never holds.
"""

from .common import apply, halves
from .likelihood import NLL
from .linear import LinearCall, LinearNLL
from .plain import ELBO, Excess, GaussianNLL, RsampleKL
from .posterior import Posterior, PosteriorCall

__all__ = [
    "ELBO",
    "NLL",
    "Excess",
    "GaussianNLL",
    "LinearCall",
    "LinearNLL",
    "Posterior",
    "PosteriorCall",
    "RsampleKL",
    "apply",
    "halves",
]
