"""Any posterior and prior: samples, KL and log ratios of one pass, and the gradients of another."""

import triton
import triton.language as tl

from .arithmetic import NEAR, normal_at, normals, sigma_and_excess
from .functions import log_of, logistic, reciprocal, root_and_expm1, sigmoid, softplus
from .latent_kernels import first_element, key_of
from .tiles import arrive, columns_of, combine, load, mask_of, number, share_of, store


@triton.jit
def _clamped(raw, low, high, CLAMP: tl.constexpr):
    """The parameter within its bounds, and the derivative by ``raw``."""
    if CLAMP == "hard":
        value = tl.where(raw < low, low, raw)
        return tl.where(value > high, high, value), tl.where((raw >= low) & (raw <= high), 1.0, 0.0)
    elif CLAMP == "soft":
        # high - softplus(high - raw) is the lesser of the two but for the small part of softplus, and so on.
        large, small, rest = logistic(raw - high)
        below = tl.minimum(raw, high) - rest
        slope = tl.where(raw <= high, large, small)
        large, small, rest = logistic(below - low)
        return tl.maximum(below, low) + rest, slope * tl.where(below >= low, large, small)
    else:
        return raw, 1.0


@triton.jit
def _deviation(raw, min_std, PARAM: tl.constexpr):
    """The standard deviation, and the measure of scale that distributions are compared by: the log-variance of a logarithmic
    parameter, the variance of "var", the standard deviation of others."""
    if PARAM == "logvar":
        return sigma_and_excess(raw)[0], raw
    elif PARAM == "log_std":
        return sigma_and_excess(2.0 * raw)[0], 2.0 * raw
    elif PARAM == "var":
        return tl.sqrt(raw), raw
    elif PARAM == "std":
        return raw, raw
    else:
        sigma = softplus(raw) + min_std
        return sigma, sigma


@triton.jit
def _prior(raw, min_std, PARAM: tl.constexpr):
    """1 / s^2, the measure of scale, and the inverse of the measure where that is no logarithm."""
    if PARAM == "logvar" or PARAM == "log_std":
        logvar = raw if PARAM == "logvar" else 2.0 * raw
        return sigma_and_excess(-2.0 * logvar)[0], logvar, logvar
    else:
        measure = _deviation(raw, min_std, PARAM)[1]
        inverse = reciprocal(measure)
        return inverse if PARAM == "var" else inverse * inverse, measure, inverse


@triton.jit
def _compared(measure, prior_measure, prior_inverse, PARAM: tl.constexpr):
    """d = ln sigma^2 - ln s^2, expm1(d) and expm1(d) - d; ``prior_measure`` is None where s is 1."""
    if PARAM == "logvar" or PARAM == "log_std":
        d = measure if prior_measure is None else measure - prior_measure
        return d, root_and_expm1(d)[1], sigma_and_excess(d)[1]
    else:
        # The difference is exact where the two are close, so that d is right to the last digits there too.
        if prior_measure is None:
            ratio = measure
            t = measure - 1.0
        else:
            ratio = measure * prior_inverse
            t = (measure - prior_measure) * prior_inverse
        d = log_of(ratio, t) if PARAM == "var" else 2.0 * log_of(ratio, t)
        expm1 = t if PARAM == "var" else t * (2.0 + t)
        return d, expm1, tl.where(tl.abs(d) < NEAR, sigma_and_excess(d)[1], expm1 - d)


@triton.jit
def _log_variance_slope(raw, sigma, PARAM: tl.constexpr):
    """Derivative of ln sigma^2 by the parameter."""
    if PARAM == "logvar":
        return 1.0
    elif PARAM == "log_std":
        return 2.0
    elif PARAM == "var":
        return reciprocal(raw)
    elif PARAM == "std":
        return 2.0 * reciprocal(raw)
    else:
        return 2.0 * sigmoid(raw) * reciprocal(sigma)


@triton.jit
def _deviation_slope(raw, sigma, PARAM: tl.constexpr):
    """Derivative of sigma by the parameter."""
    if PARAM == "logvar":
        return 0.5 * sigma
    elif PARAM == "log_std":
        return sigma
    elif PARAM == "var":
        return 0.5 * reciprocal(sigma)
    elif PARAM == "std":
        return 1.0
    else:
        return sigmoid(raw)


@triton.jit
def _noise(
    eps, key, offset_low, offset_high, element, sample, sample_step, eps_stride, eps_strides, sizes,
    row, column, row_mask, mask, tile,
    BLOCK: tl.constexpr, PACK: tl.constexpr, WIDE_NOISE: tl.constexpr, SINGLE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Normals of a tile of one sample; ``element`` is the number of the row's first in the first sample."""
    if eps is not None:
        return load(eps + sample * eps_stride, row, column, row_mask, mask, sizes, eps_strides, COMPUTE)
    elif SINGLE:
        return normal_at(key, offset_low, offset_high, element + sample * sample_step + column, COMPUTE)
    else:
        first = (element + sample * sample_step) // 4 + tile * (BLOCK // 4)
        return normals(key, offset_low, offset_high, first, BLOCK, PACK, WIDE_NOISE, COMPUTE)


@triton.jit(do_not_specialize=["first_low", "first_high", "offset_low", "offset_high"])
def posterior_kernel(
    mu, raw, prior_mean, prior_raw,  # (rows, columns); the prior's | None
    eps, z,  # (samples, rows, columns) | None
    kl,  # (rows,) | None
    kl_elements,  # (rows, columns) | None
    log_ratio,  # (samples, rows) | None
    seed,  # () | (rows,) | None
    partials,  # (rows if kl, then samples rows if log_ratio; chunks) | None
    ticket,  # () | None
    min_std, low, high, free_bits,
    seed_stride, first_low, first_high, offset_low, offset_high, eps_stride, z_stride,
    samples, rows, columns, steps, chunks,
    sizes, mu_strides, raw_strides, prior_mean_strides, prior_raw_strides, eps_strides, z_strides, kl_strides,
    PARAM: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr,
    WIDE_NOISE: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, ALIGNED: tl.constexpr, SINGLE: tl.constexpr,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """z_k = mu + noise_k sigma, kl = sum of 1/2 ((mu - m)^2 / s^2 + expm1(d) - d) or its elements, and
    log_ratio_k = 1/2 sum (noise_k^2 + d - (z_k - m)^2 / s^2): each if wanted; with log_ratio a program has one tile."""
    chunk, row = share_of(tl.program_id(0), chunks, ROWS, WIDE)
    row_mask = row < rows
    index = tl.reshape(row, [ROWS])
    element = first_element(row, columns, first_low, first_high, SEED_PER_SAMPLE)
    sample_step = columns if SEED_PER_SAMPLE else (row * 0 + rows) * columns
    shift = 0 if ALIGNED else (element % 4).to(tl.int32)
    key = None
    if seed is not None:
        key = key_of(seed, seed_stride, row, row_mask, SEED_PER_SAMPLE)
    min_std = number(min_std, COMPUTE)
    low = number(low, COMPUTE)
    high = number(high, COMPUTE)
    ratio_partials = partials
    if SPLIT and kl is not None:
        ratio_partials += (tl.zeros([], tl.int64) + rows) * chunks
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = columns_of(chunk, step, steps, shift, BLOCK, WIDE)
        mask = mask_of(row, rows, column, columns, not ALIGNED, EVEN)
        mean = load(mu, row, column, row_mask, mask, sizes, mu_strides, COMPUTE)
        parameter = load(raw, row, column, row_mask, mask, sizes, raw_strides, COMPUTE)
        sigma, measure = _deviation(_clamped(parameter, low, high, CLAMP)[0], min_std, PARAM)
        prior_location = None
        if prior_mean is not None:
            prior_location = load(prior_mean, row, column, row_mask, mask, sizes, prior_mean_strides, COMPUTE)
        precision, prior_measure, prior_inverse = None, None, None
        if prior_raw is not None:
            prior_parameter = load(prior_raw, row, column, row_mask, mask, sizes, prior_raw_strides, COMPUTE)
            precision, prior_measure, prior_inverse = _prior(prior_parameter, min_std, PARAM)
        d, _, excess = _compared(measure, prior_measure, prior_inverse, PARAM)
        gap = mean if prior_mean is None else mean - prior_location
        if kl is not None or kl_elements is not None:
            square = gap * gap if prior_raw is None else gap * gap * precision
            value = 0.5 * (square + excess)
            if free_bits is not None:
                least = number(free_bits, COMPUTE)
                value = tl.where(value < least, least, value)
            if kl_elements is not None:
                store(kl_elements, row, column, mask, sizes, kl_strides, value)
            total += value if EVEN else tl.where(mask, value, 0.0)
        if z is not None:
            for k in range(samples):
                sample = row * 0 + k
                noise = _noise(
                    eps, key, offset_low, offset_high, element, sample, sample_step, eps_stride, eps_strides, sizes,
                    row, column, row_mask, mask, (chunk * steps + step).to(tl.int64),
                    BLOCK, PACK, WIDE_NOISE, SINGLE, COMPUTE,
                )  # fmt: skip
                scatter = noise * sigma
                drawn = mean + scatter
                store(z + sample * z_stride, row, column, mask, sizes, z_strides, drawn)
                if log_ratio is not None:
                    distance = drawn if prior_mean is None else drawn - prior_location
                    square = distance * distance if prior_raw is None else distance * distance * precision
                    terms = noise * noise + d - square
                    sums = 0.5 * tl.sum(terms if EVEN else tl.where(mask, terms, 0.0), 1)
                    place = tl.reshape(sample * rows + row, [ROWS])
                    if SPLIT:
                        tl.store(ratio_partials + place * chunks + chunk, sums, index < rows)
                    else:
                        tl.store(log_ratio + place, sums.to(log_ratio.dtype.element_ty), index < rows)
    if SPLIT:
        if kl is not None:
            tl.store(partials + index * chunks + chunk, tl.sum(total, 1), index < rows)
        if arrive(ticket, tl.num_programs(0)):
            if kl is not None:
                combine(partials, kl, rows, chunks, 0.0, WIDTH)
            if log_ratio is not None:
                combine(ratio_partials, log_ratio, samples * rows, chunks, 0.0, WIDTH)
    elif kl is not None:
        tl.store(kl + index, tl.sum(total, 1).to(kl.dtype.element_ty), index < rows)


@triton.jit(do_not_specialize=["first_low", "first_high", "offset_low", "offset_high"])
def posterior_backward_kernel(
    g_z,  # (samples, rows, columns) | None
    g_kl,  # (rows, columns) | None
    g_log_ratio, path_weight,  # (samples, rows) | None
    mu, raw, prior_mean, prior_raw,  # (rows, columns); the prior's | None
    eps,  # (samples, rows, columns) | None
    seed,  # () | (rows,) | None
    g_mu, g_raw, g_prior_mean, g_prior_raw,  # (rows, columns) | None
    min_std, low, high, free_bits, posterior_share, prior_share,
    seed_stride, first_low, first_high, offset_low, offset_high, eps_stride, g_z_stride, ratio_strides, weight_strides,
    samples, rows, columns, steps, chunks,
    sizes, g_z_strides, g_kl_strides, mu_strides, raw_strides, prior_mean_strides, prior_raw_strides, eps_strides,
    g_mu_strides, g_raw_strides, g_prior_mean_strides, g_prior_raw_strides,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, SAMPLED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr,
    WIDE_NOISE: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, ALIGNED: tl.constexpr, SINGLE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What reaches mu, sigma, ln sigma^2, m and ln s^2 through samples, log ratios and KL, and from there the parameters."""
    chunk, row = share_of(tl.program_id(0), chunks, ROWS, WIDE)
    row_mask = row < rows
    element = first_element(row, columns, first_low, first_high, SEED_PER_SAMPLE)
    sample_step = columns if SEED_PER_SAMPLE else (row * 0 + rows) * columns
    shift = 0 if ALIGNED else (element % 4).to(tl.int32)
    key = None
    if seed is not None:
        key = key_of(seed, seed_stride, row, row_mask, SEED_PER_SAMPLE)
    min_std = number(min_std, COMPUTE)
    low = number(low, COMPUTE)
    high = number(high, COMPUTE)
    posterior_share = number(posterior_share, COMPUTE)
    prior_share = number(prior_share, COMPUTE)
    if g_kl is not None and len(g_kl_strides) == 1:
        row_weight = tl.load(g_kl + row * g_kl_strides[0], row_mask, other=0.0).to(COMPUTE)
    for step in range(steps):
        column = columns_of(chunk, step, steps, shift, BLOCK, WIDE)
        mask = mask_of(row, rows, column, columns, not ALIGNED, EVEN)
        mean = load(mu, row, column, row_mask, mask, sizes, mu_strides, COMPUTE)
        parameter = load(raw, row, column, row_mask, mask, sizes, raw_strides, COMPUTE)
        parameter, clamp_slope = _clamped(parameter, low, high, CLAMP)
        sigma, measure = _deviation(parameter, min_std, PARAM)
        gap = mean
        if prior_mean is not None:
            gap = mean - load(prior_mean, row, column, row_mask, mask, sizes, prior_mean_strides, COMPUTE)
        prior_measure, prior_inverse = None, None
        if prior_raw is not None:
            prior_parameter = load(prior_raw, row, column, row_mask, mask, sizes, prior_raw_strides, COMPUTE)
            precision, prior_measure, prior_inverse = _prior(prior_parameter, min_std, PARAM)
        by_mean = tl.zeros([ROWS, BLOCK], COMPUTE)
        by_deviation = tl.zeros([ROWS, BLOCK], COMPUTE)
        by_log_variance = tl.zeros([ROWS, BLOCK], COMPUTE)
        by_prior_mean = tl.zeros([ROWS, BLOCK], COMPUTE)
        by_prior_log_variance = tl.zeros([ROWS, BLOCK], COMPUTE)
        if SAMPLED:
            inverse_deviation = reciprocal(sigma)
            for k in range(samples):
                sample = row * 0 + k
                noise = _noise(
                    eps, key, offset_low, offset_high, element, sample, sample_step, eps_stride, eps_strides, sizes,
                    row, column, row_mask, mask, (chunk * steps + step).to(tl.int64),
                    BLOCK, PACK, WIDE_NOISE, SINGLE, COMPUTE,
                )  # fmt: skip
                g = tl.zeros([ROWS, BLOCK], COMPUTE)
                if g_z is not None:
                    g += load(g_z + sample * g_z_stride, row, column, row_mask, mask, sizes, g_z_strides, COMPUTE)
                if g_log_ratio is not None:
                    c = tl.load(g_log_ratio + sample * ratio_strides[0] + row * ratio_strides[1], row_mask, other=0.0).to(
                        COMPUTE
                    )
                    distance = gap + noise * sigma
                    pull = distance if prior_raw is None else distance * precision
                    if path_weight is None:
                        g -= c * pull
                        by_log_variance += 0.5 * c
                    else:
                        g += c * (noise * inverse_deviation - pull)
                    if g_prior_mean is not None:
                        by_prior_mean += c * pull
                    if g_prior_raw is not None:
                        by_prior_log_variance += 0.5 * c * (distance * pull - 1.0)
                if path_weight is not None:
                    w = tl.load(path_weight + sample * weight_strides[0] + row * weight_strides[1], row_mask, other=0.0)
                    g *= w.to(COMPUTE)
                by_mean += g
                by_deviation += g * noise
        if g_kl is not None:
            c = row_weight if len(g_kl_strides) == 1 else load(g_kl, row, column, row_mask, mask, sizes, g_kl_strides, COMPUTE)
            _, expm1, excess = _compared(measure, prior_measure, prior_inverse, PARAM)
            pull = gap if prior_raw is None else gap * precision
            if free_bits is not None:
                c = tl.where(0.5 * (gap * pull + excess) >= number(free_bits, COMPUTE), c, 0.0)
            by_mean += posterior_share * c * pull
            by_log_variance += 0.5 * posterior_share * c * expm1
            if g_prior_mean is not None:
                by_prior_mean -= prior_share * c * pull
            if g_prior_raw is not None:
                by_prior_log_variance -= 0.5 * prior_share * c * (gap * pull + expm1)
        if g_mu is not None:
            store(g_mu, row, column, mask, sizes, g_mu_strides, by_mean)
        if g_raw is not None:
            g = tl.zeros([ROWS, BLOCK], COMPUTE)
            # What is absent is not multiplied: a derivative may be infinite.
            if SAMPLED:
                g += by_deviation * _deviation_slope(parameter, sigma, PARAM)
            if g_kl is not None or (g_log_ratio is not None and path_weight is None):
                g += by_log_variance * _log_variance_slope(parameter, sigma, PARAM)
            if CLAMP == "hard":
                g = tl.where(clamp_slope > 0, g, 0.0)
            else:
                g *= clamp_slope
            store(g_raw, row, column, mask, sizes, g_raw_strides, g)
        if g_prior_mean is not None:
            store(g_prior_mean, row, column, mask, sizes, g_prior_mean_strides, by_prior_mean)
        if g_prior_raw is not None:
            g = tl.zeros([ROWS, BLOCK], COMPUTE)
            if g_kl is not None or g_log_ratio is not None:
                prior_sigma = _deviation(prior_parameter, min_std, PARAM)[0]
                g += by_prior_log_variance * _log_variance_slope(prior_parameter, prior_sigma, PARAM)
            store(g_prior_raw, row, column, mask, sizes, g_prior_raw_strides, g)
