"""The Triton kernels' own exponentials and logarithms have the accuracy of the mathematics, in float32 and float64."""

from __future__ import annotations

import pytest
import torch

from fused_elbo import accuracy, ops

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

functions = pytest.importorskip("fused_elbo.backends.triton.functions")
decay, exponential, log1p, log_from_1 = functions.decay, functions.exponential, functions.log1p, functions.log_from_1
log_of, reciprocal, sigmoid, softplus = functions.log_of, functions.reciprocal, functions.sigmoid, functions.softplus
tanh_and_slope = functions.tanh_and_slope

COUNT = 4096
# What is built of several functions has the error of each.
ULPS = 6


@triton.jit
def evaluate_kernel(inputs, outputs, NAME: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    v = tl.load(inputs + i)
    if NAME == "decay":
        result = decay(v)
    elif NAME == "exponential":
        result = exponential(v)
    elif NAME == "log1p":
        result = log1p(v)
    elif NAME == "log_from_1":
        result = log_from_1(v)
    elif NAME == "log_of":
        result = log_of(v, v - 1.0)
    elif NAME == "reciprocal":
        result = reciprocal(v)
    elif NAME == "sigmoid":
        result = sigmoid(v)
    elif NAME == "softplus":
        result = softplus(v)
    elif NAME == "tanh":
        result = tanh_and_slope(v)[0]
    else:
        result = tanh_and_slope(v)[1]
    tl.store(outputs + i, result)


def evaluate(name, inputs):
    outputs = torch.empty_like(inputs)
    evaluate_kernel[(1,)](inputs, outputs, NAME=name, COUNT=COUNT)
    return outputs


def both_signs(low, high):
    """Numbers of either sign whose magnitudes run from ``low`` to ``high``."""
    magnitudes = torch.logspace(torch.log10(torch.tensor(low)).item(), torch.log10(torch.tensor(high)).item(), COUNT // 2)
    return torch.cat((magnitudes, -magnitudes))


def positive(low, high):
    return torch.logspace(torch.log10(torch.tensor(low)).item(), torch.log10(torch.tensor(high)).item(), COUNT)


GRIDS = {
    "decay": (lambda: both_signs(1e-6, 87.0), lambda v: torch.exp(-v.abs())),
    "exponential": (lambda: both_signs(1e-6, 87.0), torch.exp),
    "log1p": (lambda: both_signs(1e-9, 1.0).clamp(min=-0.5), torch.log1p),
    "log_from_1": (lambda: positive(1e-9, 1e9), torch.log1p),
    "log_of": (lambda: torch.cat((1 + both_signs(1e-6, 0.9)[::2], positive(1e-30, 1e30)[::2])), torch.log),
    "reciprocal": (lambda: both_signs(1e-30, 1e30), lambda v: 1 / v),
    "sigmoid": (lambda: both_signs(1e-6, 80.0), torch.sigmoid),
    "softplus": (lambda: both_signs(1e-6, 80.0), lambda v: -torch.nn.functional.logsigmoid(-v)),
    "tanh": (lambda: both_signs(1e-6, 30.0), torch.tanh),
    "slope of tanh": (lambda: both_signs(1e-6, 30.0), lambda v: 1 / torch.cosh(v) ** 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRIDS)
def test_functions(device, name, dtype):
    reason = ops.unavailable("triton", device.type)
    if reason is not None:
        pytest.skip(reason)
    grid, function = GRIDS[name]
    inputs = grid().to(device, dtype)
    exact = function(inputs.double())
    error = (evaluate(name, inputs).double() - exact).abs() / accuracy.ulp(exact, dtype)
    assert error.max() <= ULPS, (inputs[error.argmax()].item(), error.max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_number_stays_so(device, dtype):
    reason = ops.unavailable("triton", device.type)
    if reason is not None:
        pytest.skip(reason)
    for name in GRIDS:
        assert evaluate(name, torch.full((COUNT,), torch.nan, dtype=dtype, device=device)).isnan().all(), name
