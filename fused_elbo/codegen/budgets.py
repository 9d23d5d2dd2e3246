"""The budgets, in one table: what each kernel's machine code may cost. A kernel over its budget fails ``make codegen``.

No kernel may spill or keep anything in local memory, and the bytes that an element moves in 16-byte accesses are exact.
Registers are what was measured, rounded up to the 8 that hardware hands out at a time; instructions an element are what was
measured and 3%. Those two depend on the compiler: with another version than the table's, a kernel may take 25% more
instructions than its budget, and any registers. ``python -m fused_elbo.codegen --propose`` prints the table that today's code
would get.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .report import Row

VERSIONS = {"triton": "3.7.1", "nvcc": "13.0.88"}
SLACK = 1.03
OTHER_VERSION = 1.25
REGISTER_UNIT = 8
MOST_REGISTERS = 255


class Limit(NamedTuple):
    """``bytes`` an element are exact; ``registers`` of a thread and ``instructions`` an element are the most allowed."""

    bytes: float
    registers: int
    instructions: float


def limit(compiler: str, version: str, kernel: str, dtype: str, architecture: int) -> Limit | None:
    """The budget of a row; None if it has none."""
    entry = BUDGETS[compiler].get((kernel, dtype))
    if entry is None:
        return None
    moved, registers, instructions = entry[ARCHITECTURES.index(architecture)]
    if version != VERSIONS[compiler]:
        return Limit(moved, MOST_REGISTERS, OTHER_VERSION * instructions)
    return Limit(moved, registers, instructions)


def may_access_narrower(compiler: str, kernel: str) -> bool:
    """Whether a loop has more than its 16-byte accesses: operands of any dtype (8-bit targets, masks), or sums."""
    mixed = ("likelihood", "posterior") if compiler == "nvcc" else ("likelihood of levels", "posterior with log ratios")
    return kernel.startswith(mixed)


def proposal(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of ``BUDGETS`` for rows as they are."""
    table: dict[str, dict[tuple[str, str], dict[int, Row]]] = {}
    for row in rows:
        table.setdefault(row.compiler, {}).setdefault((row.kernel, row.dtype), {})[row.architecture] = row
    for compiler, kernels in table.items():
        yield f'    "{compiler}": {{'
        for (kernel, dtype), by_architecture in sorted(kernels.items()):
            entries = ", ".join(_budget(by_architecture[architecture]) for architecture in ARCHITECTURES)
            yield f'        ("{kernel}", "{dtype}"): ({entries}),'
        yield "    },"


def _budget(row: Row) -> str:
    registers = math.ceil(row.registers / REGISTER_UNIT) * REGISTER_UNIT
    return f"({row.bytes:g}, {registers}, {math.ceil(10 * SLACK * (row.instructions or 0)) / 10:g})"


ARCHITECTURES = (80, 90, 100)
# (kernel, dtype): (bytes an element, registers, instructions an element) on each of ARCHITECTURES.
BUDGETS: dict[str, dict[tuple[str, str], tuple]] = {
    "triton": {
        ("elbo, data", "bfloat16"): ((6, 96, 8.1), (6, 96, 7.7), (6, 96, 6.7)),
        ("elbo, data", "float16"): ((6, 96, 7.1), (6, 96, 6.7), (6, 96, 5.7)),
        ("elbo, data", "float32"): ((12, 96, 4.9), (12, 96, 4.5), (12, 96, 3.5)),
        ("elbo, latents", "bfloat16"): ((8, 96, 33.8), (8, 96, 33.9), (8, 96, 24.1)),
        ("elbo, latents", "float16"): ((8, 96, 32.8), (8, 96, 32.9), (8, 96, 23.1)),
        ("elbo, latents", "float32"): ((16, 96, 30.2), (16, 96, 30.3), (16, 96, 21)),
        ("gaussian_nll", "bfloat16"): ((6, 96, 7.7), (6, 96, 7.7), (6, 96, 6.7)),
        ("gaussian_nll", "float16"): ((6, 96, 6.7), (6, 96, 6.7), (6, 96, 5.7)),
        ("gaussian_nll", "float32"): ((12, 96, 4.5), (12, 96, 4.5), (12, 96, 3.5)),
        ("gaussian_nll without gradient", "bfloat16"): ((4, 96, 6), (4, 96, 6), (4, 96, 4.9)),
        ("gaussian_nll without gradient", "float16"): ((4, 96, 4.9), (4, 96, 4.9), (4, 96, 3.9)),
        ("gaussian_nll without gradient", "float32"): ((8, 96, 3.1), (8, 96, 3.1), (8, 96, 2.1)),
        ("gaussian_nll_backward", "bfloat16"): ((6, 40, 6.7), (6, 40, 6.7), (6, 40, 5.7)),
        ("gaussian_nll_backward", "float16"): ((6, 40, 5.7), (6, 40, 5.7), (6, 40, 4.6)),
        ("gaussian_nll_backward", "float32"): ((12, 48, 3.5), (12, 48, 3.5), (12, 48, 3.5)),
        ("likelihood", "bfloat16"): ((6, 96, 35.3), (6, 96, 34.7), (6, 96, 24.9)),
        ("likelihood", "float16"): ((6, 96, 33.8), (6, 96, 33.7), (6, 96, 23.9)),
        ("likelihood", "float32"): ((12, 96, 32), (12, 96, 32), (12, 96, 23.2)),
        ("likelihood of levels", "bfloat16"): ((4, 96, 74.7), (4, 96, 74.6), (4, 104, 56.1)),
        ("likelihood of levels", "float16"): ((4, 96, 74.2), (4, 96, 74.1), (4, 104, 55.5)),
        ("likelihood of levels", "float32"): ((8, 96, 73.6), (8, 96, 74.6), (8, 96, 56.7)),
        ("posterior", "bfloat16"): ((10, 96, 140.8), (10, 96, 140.8), (10, 96, 108.6)),
        ("posterior", "float16"): ((10, 96, 138.7), (10, 96, 138.7), (10, 96, 106.8)),
        ("posterior", "float32"): ((20, 96, 132.5), (20, 96, 132.7), (20, 96, 101.9)),
        ("posterior with log ratios, a sample", "bfloat16"): ((2, 120, 31.9), (2, 120, 32.2), (2, 96, 29.7)),
        ("posterior with log ratios, a sample", "float16"): ((2, 112, 31.9), (2, 120, 32.2), (2, 96, 29.7)),
        ("posterior with log ratios, a sample", "float32"): ((4, 112, 31.5), (4, 120, 31.9), (4, 112, 28.6)),
        ("posterior_backward", "bfloat16"): ((18, 128, 127.5), (18, 112, 126.9), (18, 128, 100)),
        ("posterior_backward", "float16"): ((18, 128, 123.6), (18, 112, 123.8), (18, 128, 97.4)),
        ("posterior_backward", "float32"): ((36, 96, 130.1), (36, 96, 129.8), (36, 104, 109.2)),
        ("rescale", "bfloat16"): ((4, 32, 4.6), (4, 32, 4.6), (4, 32, 4.1)),
        ("rescale", "float16"): ((4, 32, 4.1), (4, 32, 4.1), (4, 40, 3.6)),
        ("rescale", "float32"): ((8, 32, 3.5), (8, 32, 3.5), (8, 32, 3.5)),
        ("rsample_kl", "bfloat16"): ((6, 96, 43), (6, 96, 44), (6, 96, 36.2)),
        ("rsample_kl", "float16"): ((6, 96, 42), (6, 96, 42.9), (6, 96, 35.2)),
        ("rsample_kl", "float32"): ((12, 96, 44.9), (12, 96, 45.9), (12, 120, 39.1)),
        ("rsample_kl_backward", "bfloat16"): ((10, 112, 52.5), (10, 112, 52.4), (10, 112, 41.1)),
        ("rsample_kl_backward", "float16"): ((10, 104, 50.9), (10, 104, 50.8), (10, 104, 39.5)),
        ("rsample_kl_backward", "float32"): ((20, 72, 46.7), (20, 80, 47.2), (20, 80, 47.2)),
    },
    "nvcc": {
        ("backward, noise: eps", "any in float32"): ((0, 80, 0), (0, 80, 0), (0, 88, 0)),
        ("backward, noise: eps", "any in float64"): ((0, 96, 0), (0, 104, 0), (0, 104, 0)),
        ("backward, noise: eps", "bfloat16"): ((12, 152, 30.8), (12, 144, 30.6), (12, 144, 21.9)),
        ("backward, noise: eps", "float16"): ((12, 152, 30.6), (12, 152, 30.7), (12, 144, 21.9)),
        ("backward, noise: eps", "float32"): ((24, 136, 33), (24, 128, 33), (24, 88, 27.1)),
        ("backward, noise: eps", "float64"): ((48, 136, 69.8), (48, 136, 78.6), (48, 152, 78.6)),
        ("backward, noise: none", "any in float32"): ((0, 72, 0), (0, 80, 0), (0, 80, 0)),
        ("backward, noise: none", "any in float64"): ((0, 88, 0), (0, 88, 0), (0, 96, 0)),
        ("backward, noise: none", "bfloat16"): ((10, 120, 29.7), (10, 120, 29.5), (10, 112, 18.6)),
        ("backward, noise: none", "float16"): ((10, 120, 29.5), (10, 120, 29.4), (10, 112, 18.6)),
        ("backward, noise: none", "float32"): ((20, 120, 31.7), (20, 112, 32), (20, 72, 24.1)),
        ("backward, noise: none", "float64"): ((40, 112, 65.5), (40, 128, 78.1), (40, 128, 73.7)),
        ("backward, noise: seed", "any in float32"): ((0, 80, 0), (0, 88, 0), (0, 80, 0)),
        ("backward, noise: seed", "any in float64"): ((0, 96, 0), (0, 112, 0), (0, 120, 0)),
        ("backward, noise: seed", "bfloat16"): ((10, 144, 47.4), (10, 144, 47.4), (10, 160, 37.6)),
        ("backward, noise: seed", "float16"): ((10, 152, 47.3), (10, 152, 47.3), (10, 160, 37.6)),
        ("backward, noise: seed", "float32"): ((20, 120, 51), (20, 120, 51), (20, 96, 44.6)),
        ("backward, noise: seed", "float64"): ((40, 128, 133.7), (40, 128, 173.6), (40, 160, 166.7)),
        ("elbo", "any, latents any"): ((0, 104, 0), (0, 104, 0), (0, 112, 0)),
        ("elbo, data", "bfloat16, latents any"): ((8, 104, 10.3), (8, 88, 10.3), (8, 104, 7.6)),
        ("elbo, data", "bfloat16, latents bfloat16"): ((8, 120, 10.3), (8, 104, 10.3), (8, 104, 7.6)),
        ("elbo, data", "bfloat16/float32, latents any"): ((12, 104, 8.7), (12, 88, 8.7), (12, 104, 6.2)),
        ("elbo, data", "bfloat16/float32, latents bfloat16"): ((12, 120, 8.7), (12, 104, 8.7), (12, 104, 6.2)),
        ("elbo, data", "float16, latents any"): ((8, 104, 10.3), (8, 88, 10.3), (8, 104, 7.6)),
        ("elbo, data", "float16, latents float16"): ((8, 120, 10.3), (8, 112, 10.3), (8, 104, 7.6)),
        ("elbo, data", "float16/float32, latents any"): ((12, 104, 8.7), (12, 88, 8.7), (12, 104, 6.2)),
        ("elbo, data", "float16/float32, latents float16"): ((12, 120, 8.7), (12, 112, 8.7), (12, 104, 6.2)),
        ("elbo, data", "float32, latents any"): ((16, 104, 6.9), (16, 88, 7), (16, 104, 4.8)),
        ("elbo, data", "float32, latents float32"): ((16, 112, 6.9), (16, 96, 7), (16, 112, 4.8)),
        ("elbo, data", "float64, latents any"): ((32, 104, 11.6), (32, 96, 13.1), (32, 104, 12.4)),
        ("elbo, data", "float64, latents float64"): ((32, 112, 11.6), (32, 128, 13.1), (32, 120, 12.4)),
        ("elbo, latents", "bfloat16, latents bfloat16"): ((8, 120, 31.1), (8, 104, 31.1), (8, 104, 22.8)),
        ("elbo, latents", "bfloat16/float32, latents bfloat16"): ((8, 120, 31.1), (8, 104, 31.1), (8, 104, 22.8)),
        ("elbo, latents", "float16, latents float16"): ((8, 120, 31.1), (8, 112, 31.1), (8, 104, 22.8)),
        ("elbo, latents", "float16/float32, latents float16"): ((8, 120, 31.1), (8, 112, 31.1), (8, 104, 22.8)),
        ("elbo, latents", "float32, latents float32"): ((16, 112, 27.8), (16, 96, 27.8), (16, 112, 19.9)),
        ("elbo, latents", "float64, latents float64"): ((32, 112, 55), (32, 128, 59.1), (32, 120, 57.1)),
        ("forward, noise: eps", "any in float32"): ((0, 80, 0), (0, 72, 0), (0, 96, 0)),
        ("forward, noise: eps", "any in float64"): ((0, 88, 0), (0, 96, 0), (0, 112, 0)),
        ("forward, noise: eps", "bfloat16"): ((8, 80, 23.1), (8, 80, 23.2), (8, 96, 16.4)),
        ("forward, noise: eps", "float16"): ((8, 80, 23.1), (8, 80, 23.2), (8, 96, 16.4)),
        ("forward, noise: eps", "float32"): ((16, 80, 25.5), (16, 72, 25.4), (16, 96, 18.1)),
        ("forward, noise: eps", "float64"): ((32, 88, 52.1), (32, 104, 60.3), (32, 104, 61.8)),
        ("forward, noise: none", "any in float32"): ((0, 80, 0), (0, 72, 0), (0, 96, 0)),
        ("forward, noise: none", "any in float64"): ((0, 80, 0), (0, 80, 0), (0, 104, 0)),
        ("forward, noise: none", "bfloat16"): ((4, 80, 20), (4, 80, 19.9), (4, 96, 13.8)),
        ("forward, noise: none", "float16"): ((4, 80, 20), (4, 80, 19.9), (4, 96, 13.8)),
        ("forward, noise: none", "float32"): ((8, 80, 22.5), (8, 88, 22.4), (8, 96, 15.2)),
        ("forward, noise: none", "float64"): ((16, 88, 46.5), (16, 112, 50.8), (16, 104, 51.5)),
        ("forward, noise: seed", "any in float32"): ((0, 80, 0), (0, 72, 0), (0, 96, 0)),
        ("forward, noise: seed", "any in float64"): ((0, 96, 0), (0, 96, 0), (0, 128, 0)),
        ("forward, noise: seed", "bfloat16"): ((6, 96, 40.7), (6, 96, 40.8), (6, 112, 32)),
        ("forward, noise: seed", "float16"): ((6, 96, 40.7), (6, 96, 40.8), (6, 112, 32)),
        ("forward, noise: seed", "float32"): ((12, 104, 42.7), (12, 96, 42.8), (12, 120, 33.4)),
        ("forward, noise: seed", "float64"): ((24, 128, 124.6), (24, 136, 163.8), (24, 144, 153.9)),
        ("likelihood, bernoulli", "bfloat16"): ((12, 104, 54.5), (14, 112, 55), (12, 120, 52.3)),
        ("likelihood, bernoulli", "float16"): ((12, 104, 54.5), (14, 112, 55), (12, 120, 52.3)),
        ("likelihood, bernoulli", "float32"): ((16, 88, 61.6), (16, 88, 62.1), (16, 120, 60.6)),
        ("likelihood, bernoulli", "float64"): ((64, 104, 290), (64, 104, 398.7), (64, 120, 401.8)),
        ("likelihood, bernoulli, all", "any in float32"): ((0, 104, 0), (0, 104, 0), (0, 120, 0)),
        ("likelihood, bernoulli, all", "any in float64"): ((0, 128, 0), (0, 120, 0), (0, 136, 0)),
        ("likelihood, bernoulli, all", "bfloat16"): ((28, 136, 79), (30, 144, 80), (24, 160, 72)),
        ("likelihood, bernoulli, all", "float16"): ((28, 136, 79), (30, 144, 80), (24, 160, 72)),
        ("likelihood, bernoulli, all", "float32"): ((28, 96, 86.6), (28, 104, 85.8), (28, 120, 84.8)),
        ("likelihood, bernoulli, all", "float64"): ((112, 144, 348.2), (112, 152, 452.2), (112, 160, 445)),
        ("likelihood, discretized_logistic", "bfloat16"): ((12, 128, 100.2), (14, 128, 100.9), (12, 128, 100.6)),
        ("likelihood, discretized_logistic", "float16"): ((12, 128, 100.2), (14, 128, 100.9), (12, 128, 100.6)),
        ("likelihood, discretized_logistic", "float32"): ((16, 112, 108.5), (16, 104, 108.7), (16, 120, 107.2)),
        ("likelihood, discretized_logistic", "float64"): ((64, 120, 547), (64, 128, 766.4), (64, 136, 766.4)),
        ("likelihood, discretized_logistic, all", "any in float32"): ((0, 112, 0), (0, 112, 0), (0, 128, 0)),
        ("likelihood, discretized_logistic, all", "any in float64"): ((0, 152, 0), (0, 152, 0), (0, 160, 0)),
        ("likelihood, discretized_logistic, all", "bfloat16"): ((28, 152, 132.3), (36, 152, 133.8), (28, 152, 129.6)),
        ("likelihood, discretized_logistic, all", "float16"): ((28, 152, 132.3), (36, 152, 133.8), (28, 152, 129.6)),
        ("likelihood, discretized_logistic, all", "float32"): ((32, 112, 146.8), (32, 112, 147.3), (32, 120, 142.2)),
        ("likelihood, discretized_logistic, all", "float64"): ((128, 184, 637.1), (128, 184, 850.3), (128, 192, 830.7)),
        ("likelihood, gaussian", "bfloat16"): ((12, 88, 32.8), (14, 88, 33.8), (12, 120, 32.5)),
        ("likelihood, gaussian", "float16"): ((12, 88, 32.8), (14, 88, 33.8), (12, 120, 32.5)),
        ("likelihood, gaussian", "float32"): ((16, 88, 41.5), (16, 88, 41.2), (16, 120, 38.7)),
        ("likelihood, gaussian", "float64"): ((64, 104, 106.1), (64, 104, 102), (64, 120, 100.5)),
        ("likelihood, gaussian, all", "any in float32"): ((0, 112, 0), (0, 112, 0), (0, 128, 0)),
        ("likelihood, gaussian, all", "any in float64"): ((0, 136, 0), (0, 128, 0), (0, 152, 0)),
        ("likelihood, gaussian, all", "bfloat16"): ((28, 144, 62.8), (36, 160, 64.4), (28, 152, 58.1)),
        ("likelihood, gaussian, all", "float16"): ((28, 144, 62.8), (36, 160, 64.4), (28, 152, 58.1)),
        ("likelihood, gaussian, all", "float32"): ((32, 104, 75.2), (32, 112, 74.2), (32, 120, 68.5)),
        ("likelihood, gaussian, all", "float64"): ((128, 160, 184.4), (128, 168, 177.7), (128, 160, 163.3)),
        ("likelihood, laplace", "bfloat16"): ((12, 88, 36), (14, 88, 37), (12, 120, 35.3)),
        ("likelihood, laplace", "float16"): ((12, 88, 36), (14, 88, 37), (12, 120, 35.3)),
        ("likelihood, laplace", "float32"): ((16, 88, 44.9), (16, 88, 44.6), (16, 120, 41.8)),
        ("likelihood, laplace", "float64"): ((64, 104, 115.9), (64, 104, 112.8), (64, 120, 110.8)),
        ("likelihood, laplace, all", "any in float32"): ((0, 112, 0), (0, 112, 0), (0, 128, 0)),
        ("likelihood, laplace, all", "any in float64"): ((0, 136, 0), (0, 128, 0), (0, 152, 0)),
        ("likelihood, laplace, all", "bfloat16"): ((28, 144, 66.6), (36, 152, 68.4), (28, 152, 61.2)),
        ("likelihood, laplace, all", "float16"): ((28, 144, 66.6), (36, 152, 68.4), (28, 152, 61.2)),
        ("likelihood, laplace, all", "float32"): ((32, 104, 79.1), (32, 112, 78.1), (32, 120, 71.4)),
        ("likelihood, laplace, all", "float64"): ((128, 160, 195.2), (128, 168, 190.1), (128, 168, 173.6)),
        ("nll_backward", "any in float32"): ((0, 80, 0), (0, 72, 0), (0, 80, 0)),
        ("nll_backward", "any in float64"): ((0, 88, 0), (0, 88, 0), (0, 88, 0)),
        ("nll_backward", "bfloat16"): ((8, 56, 9.1), (8, 56, 9), (8, 56, 6.9)),
        ("nll_backward", "bfloat16/float32"): ((12, 64, 7.4), (12, 56, 7.3), (12, 56, 5.5)),
        ("nll_backward", "float16"): ((8, 56, 9.1), (8, 56, 9), (8, 56, 6.9)),
        ("nll_backward", "float16/float32"): ((12, 64, 7.4), (12, 56, 7.3), (12, 56, 5.5)),
        ("nll_backward", "float32"): ((16, 64, 5.8), (16, 64, 5.8), (16, 64, 4)),
        ("nll_backward", "float64"): ((32, 64, 11.1), (32, 64, 10.3), (32, 64, 10.3)),
        ("posterior", "any in float32"): ((0, 128, 0), (0, 128, 0), (0, 120, 0)),
        ("posterior", "any in float64"): ((0, 160, 0), (0, 160, 0), (0, 184, 0)),
        ("posterior", "bfloat16"): ((14, 128, 56.4), (14, 128, 57.5), (14, 120, 58.8)),
        ("posterior", "float16"): ((14, 128, 56.4), (14, 128, 57.5), (14, 120, 58.8)),
        ("posterior", "float32"): ((28, 128, 107.7), (28, 128, 111), (28, 120, 110.8)),
        ("posterior_backward", "any in float32"): ((0, 96, 0), (0, 96, 0), (0, 120, 0)),
        ("posterior_backward", "any in float64"): ((0, 160, 0), (0, 152, 0), (0, 200, 0)),
        ("posterior_backward", "bfloat16"): ((26, 152, 89.1), (26, 144, 92.6), (26, 160, 119)),
        ("posterior_backward", "float16"): ((26, 152, 89.1), (26, 144, 92.6), (26, 160, 119)),
        ("posterior_backward", "float32"): ((52, 144, 194.7), (52, 144, 201.4), (52, 152, 213)),
        ("rescale", "float64"): ((16, 80, 4.4), (16, 72, 5.1), (16, 104, 5.1)),
        ("rescale, bfloat16 or float16", "float32"): ((4, 64, 3.7), (4, 64, 3.7), (4, 104, 3.3)),
        ("rescale, float16 or bfloat16", "float32"): ((4, 64, 3.7), (4, 64, 3.7), (4, 104, 3.3)),
        ("rescale, float32", "float32"): ((8, 64, 2.4), (8, 64, 2.4), (8, 104, 2)),
    },
}
