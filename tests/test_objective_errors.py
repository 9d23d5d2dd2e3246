"""Invalid options and combinations of them: refused before anything runs, with the argument, what it got and what it takes."""

from __future__ import annotations

import pytest
import torch

import fused_elbo as fe
from fused_elbo import ops

T = torch.zeros(3, 4)
WIDE = torch.zeros(3, 2, 4)
ROW = torch.zeros(3)
LEVELS = T.to(torch.uint8)
MASK = T == 0
PRIOR = (T, T)
LEARNED = torch.zeros(3, requires_grad=True)


def nll(**options):
    return fe.nll(options.pop("x_hat", T), options.pop("x", T), **options)


def sample(**options):
    return fe.rsample_kl(T, T, seed=1, **options)


def elbo(**options):
    return fe.elbo_loss(T, T, T, T, **options)


def linear(**options):
    return fe.linear_gaussian_nll(T, T.T @ T, None, T, **options)


def staged(**options):
    return fe.elbo_loss(T, T, kl=ROW, **options)


def iwae(**options):
    return fe.iwae_loss(
        options.pop("x_hat", WIDE.transpose(0, 1)), options.pop("x", T), options.pop("log_ratio", WIDE[:, :, 0].T), **options
    )


def ratio(**options):
    return fe.rsample_log_ratio(T, T, **{"num_samples": 2, **options})


def held_out(**options):
    return fe.log_likelihood(lambda z: z, T, T, T, **options)


CASES = [
    (nll, {"likelihood": "poisson"}, ValueError, "likelihood", ("'poisson'", "'laplace'")),
    (nll, {"activation": "relu"}, ValueError, "activation", ("'relu'", "'tanh'")),
    (nll, {"likelihood": "bernoulli", "activation": "sigmoid"}, ValueError, "activation", ("'sigmoid'", "logits")),
    (nll, {"likelihood": "bernoulli", "sigma": 0.5}, ValueError, "sigma", ("bernoulli", "no scale")),
    (nll, {"likelihood": "bernoulli", "log_sigma": ROW[0]}, ValueError, "sigma", ("log_sigma", "no scale")),
    (nll, {"sigma": 1e-160}, ValueError, "sigma", ("1e-160", "at least 1e-154", "1 / sigma^2")),
    (nll, {"sigma": 1e-160, "mask": MASK}, ValueError, "sigma", ("1e-160", "at least 1e-154")),
    (fe.nn.ELBOLoss, {"log_sigma": 10**400}, ValueError, "log_sigma", ("beyond 1.8e+308", "float")),
    (linear, {"sigma": 1e-160}, ValueError, "sigma", ("1e-160", "at least 1e-154")),
    (nll, {"sigma": 0.0, "likelihood": "laplace"}, ValueError, "sigma", ("0.0", "positive")),
    (nll, {"sigma": "best"}, ValueError, "sigma", ("'best'", '"optimal"')),
    (nll, {"sigma": "optimal", "likelihood": "laplace"}, ValueError, "sigma", ("'laplace'", "gaussian")),
    (nll, {"sigma": "optimal", "log_sigma": ROW[0]}, ValueError, "log_sigma", ("together with sigma", "one of the two")),
    (nll, {"sigma": 0.5, "log_sigma": ROW[0]}, ValueError, "log_sigma", ("together with sigma", "one of the two")),
    (nll, {"log_sigma": 0.5}, TypeError, "log_sigma", ("0.5", "a tensor")),
    (nll, {"log_sigma": ROW}, ValueError, "log_sigma", ("(3,)", "(3, 4)", "x_hat")),
    (nll, {"log_sigma": WIDE}, ValueError, "log_sigma", ("(3, 2, 4)", "(3, 4)")),
    (nll, {"log_sigma": ROW[0].to("meta")}, ValueError, "log_sigma", ("meta", "cpu")),
    (nll, {"min_log_sigma": -6.0}, ValueError, "min_log_sigma", ("fixed sigma", "log_sigma=")),
    (nll, {"x": LEVELS}, TypeError, "x", ("torch.uint8", "torch.float32", "scale=")),
    (nll, {"x": LEVELS, "scale": 0.0}, ValueError, "scale", ("0.0", "positive")),
    (nll, {"scale": 0.5}, ValueError, "scale", ("torch.float32", "uint8")),
    (nll, {"shift": 0.5}, ValueError, "scale", ("shift", "uint8")),
    (nll, {"likelihood": "discretized_logistic"}, TypeError, "x", ("torch.float32", "torch.uint8")),
    (nll, {"x": LEVELS, "scale": 1.0, "shift": "a"}, TypeError, "shift", ("'a'", "float")),
    (nll, {"weight": 2.0}, TypeError, "weight", ("2.0", "a tensor")),
    (nll, {"weight": ROW[:2]}, ValueError, "weight", ("(2, 1)", "(3, 4)", "leading")),
    (nll, {"weight": LEARNED}, ValueError, "weight", ("requires grad", "constant")),
    (nll, {"weight": WIDE}, ValueError, "weight", ("(3, 2, 4)", "(3, 4)")),
    (nll, {"mask": T}, TypeError, "mask", ("torch.float32", "torch.bool")),
    (nll, {"mask": [True]}, TypeError, "mask", ("a list", "bools")),
    (nll, {"mask": MASK[:2]}, ValueError, "mask", ("(2, 4)", "(3, 4)")),
    (nll, {"mask": MASK.to("meta")}, ValueError, "mask", ("meta", "cpu")),
    (nll, {"batch_dims": (1,)}, ValueError, "batch_dims", ("(1,)", "0 among them")),
    (nll, {"batch_dims": (0, 2)}, ValueError, "batch_dims", ("(0, 2)", "2")),
    (nll, {"batch_dims": (0, 0)}, ValueError, "batch_dims", ("(0, 0)", "different")),
    (nll, {"batch_dims": "time"}, ValueError, "batch_dims", ("'time'", "dimensions")),
    (nll, {"likelihood": "laplace", "reduction": "average"}, ValueError, "reduction", ("'average'", "'mean'")),
    (nll, {"likelihood": "laplace", "grad_scale": LEARNED[:1]}, ValueError, "grad_scale", ("requires grad", "constant")),
    (sample, {"param": "precision"}, ValueError, "param", ("'precision'", "'softplus'")),
    (sample, {"min_std": 0.1}, ValueError, "min_std", ("0.1", "softplus")),
    (sample, {"param": "softplus", "min_std": -0.1}, ValueError, "min_std", ("-0.1", ">= 0")),
    (sample, {"clamp": 3.0}, TypeError, "clamp", ("3.0", "(low, high)")),
    (sample, {"clamp": (1.0, -1.0)}, ValueError, "clamp", ("(1.0, -1.0)", "low < high")),
    (sample, {"clamp": (0, 1), "soft_clamp": (0, 1)}, ValueError, "soft_clamp", ("together with clamp", "one of")),
    (sample, {"prior": (T[:, :2], None)}, ValueError, r"prior\[0\]", ("(3, 2)", "(3, 4)")),
    (sample, {"prior": (None, 1.0)}, TypeError, r"prior\[1\]", ("1.0", "a tensor")),
    (sample, {"prior": T[:1]}, TypeError, "prior", ("a Tensor", "pair")),
    (sample, {"kl_balance": 0.8}, ValueError, "kl_balance", ("without a prior", "prior=")),
    (sample, {"kl_balance": 1.8, "prior": PRIOR}, ValueError, "kl_balance", ("1.8", "[0, 1]")),
    (sample, {"free_bits": -1.0}, ValueError, "free_bits", ("-1.0", ">= 0")),
    (sample, {"free_bits": 1e160}, ValueError, "free_bits", ("1e+160", "float32", "3.4e+38")),
    (sample, {"clamp": (0, 10**400)}, ValueError, "clamp", ("beyond 1.8e+308", "float")),
    (sample, {"free_bits": 1.0, "free_bits_over": "batch"}, ValueError, "free_bits_over", ("'batch'", "'dim'")),
    (sample, {"free_bits_over": "dim"}, ValueError, "free_bits_over", ("without free_bits", "both")),
    (sample, {"free_bits": 1.0, "batch_dims": (0, 1)}, ValueError, "free_bits_over", ("dim", "element")),
    (sample, {"free_bits": 1.0, "mask": MASK}, ValueError, "free_bits_over", ("mask", "element")),
    (sample, {"free_bits": 1.0, "process_group": "world"}, TypeError, "process_group", ("'world'", "ProcessGroup")),
    (nll, {"sigma": "optimal", "process_group": -100}, TypeError, "process_group", ("-100", "this process is in")),
    (elbo, {"capacity": 1.0, "process_group": T}, TypeError, "process_group", ("a Tensor", "ProcessGroup")),
    (sample, {"num_samples": 0}, ValueError, "num_samples", ("0", "at least 1")),
    (sample, {"num_samples": 2.5}, TypeError, "num_samples", ("2.5", "int")),
    (sample, {"mask": MASK[:, :2]}, ValueError, "mask", ("(3, 2)", "(3, 4)")),
    (elbo, {"capacity": 2.0, "reduction": "none"}, ValueError, "capacity", ("none", "batch")),
    (elbo, {"capacity": "2"}, TypeError, "capacity", ("'2'", "float")),
    (elbo, {"mask": MASK[:, 0]}, ValueError, "mask", ("leading dimensions", "kl=rsample_kl")),
    (elbo, {"likelihood": "laplace", "inplace": True}, ValueError, "inplace", ("options", "False")),
    (elbo, {"beta": ROW[:2]}, ValueError, "beta", ("(2,)", "(3,)")),
    (staged, {"free_bits": 1.0}, ValueError, "free_bits", ("together with kl", '"sample"')),
    (staged, {"param": "std"}, ValueError, "param", ("together with kl", "made kl")),
    (staged, {"batch_dims": (0, 1)}, ValueError, "kl", ("(3,)", "(3, 4)")),
    (iwae, {"x": T[:2]}, ValueError, "x", ("(2, 4)", "(3, 4)")),
    (iwae, {"log_ratio": ROW}, ValueError, "log_ratio", ("(3,)", "(2, 3)")),
    (iwae, {"sigma": "optimal"}, ValueError, "sigma", ("'optimal'", "float")),
    (iwae, {"reduction": "best"}, ValueError, "reduction", ("'best'", "'mean'")),
    (ratio, {"estimator": "vimco"}, ValueError, "estimator", ("'vimco'", "'dreg'")),
    (ratio, {"eps": T}, ValueError, "eps", ("(3, 4)", "(2, 3, 4)")),
    (held_out, {"num_samples": 0}, ValueError, "num_samples, samples_at_once", ("0", "at least 1")),
]


@pytest.mark.parametrize(("call", "options", "error", "name", "says"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_message(monkeypatch, call, options, error, name, says):
    def launched(*_):
        raise AssertionError("a backend was chosen before the arguments were checked")

    if call is not iwae or "log_ratio" not in options:
        monkeypatch.setattr(ops, "select", launched)
    with pytest.raises(error, match=f"^{name}: got .*takes? |^{name}: got .*leave it out") as caught:
        call(**options)
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (nll, {"beta": 2.0, "likelihood": "laplace"}),
        (nll, {"free_bits": 1.0}),
        (sample, {"likelihood": "laplace"}),
        (elbo, {"capcity": 1.0}),
        (ratio, {"free_bits": 1.0}),
        (iwae, {"batch_dims": (0,)}),
        (iwae, {"process_group": None}),
        (ratio, {"process_group": None}),
        (held_out, {"kl_balance": 0.5}),
        (lambda **o: fe.kl_per_dim(T, T, **o), {"free_bits": 0.1}),
    ],
)
def test_an_unknown_option_is_named_with_those_that_there_are(call, options):
    name = next(n for n in options if n not in ("likelihood",) or call is sample)
    pattern = "|".join((f"{name}: is no argument here, which takes also ", f"unexpected keyword argument '{name}'"))
    with pytest.raises(TypeError, match=pattern):
        call(**options)


def test_a_posterior_of_gradients_only():
    with pytest.raises(ValueError, match=r"^eps: got a tensor that requires grad"):
        fe.rsample_kl(T, T, eps=torch.zeros(3, 4, requires_grad=True), param="std")
    mu, logvar = (torch.zeros(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    _, log_ratio = fe.rsample_log_ratio(mu, logvar, num_samples=2, seed=1, estimator="dreg")
    (g,) = torch.autograd.grad(log_ratio.sum(), mu, create_graph=False, retain_graph=True)
    assert g.isfinite().all()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(log_ratio.sum(), mu, create_graph=True)
