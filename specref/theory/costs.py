"""Time of a target pass over n tokens: the roofline model.

A pass reads the weights once whatever n is, and computes n times as much
for n tokens; the slower of the two bounds it (Williams et al. 2009,
"Roofline").  It is why verification is nearly free for small n.

Does not handle: caches, kernels and overlap.  Measure, then compare.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from specref.theory._check import Array, counts, not_negative, plain, positive


def roofline(
    n: ArrayLike,
    weight_bytes: float,
    flops_per_token: float,
    bandwidth: float,
    flops_rate: float,
    cache_bytes: float = 0.0,
    overhead: float = 0.0,
) -> float | Array:
    """Seconds of a pass over ``n`` new tokens of one sequence.

    overhead + max((weight_bytes + cache_bytes) / bandwidth,
    n flops_per_token / flops_rate).

    Args:
        n: tokens, at least 1; broadcasts.
        weight_bytes: bytes of weights read by a pass.
        flops_per_token: floating-point operations of one token, about two
            per weight.
        bandwidth: bytes per second.
        flops_rate: floating-point operations per second.
        cache_bytes: bytes of keys and values read by a pass.
        overhead: seconds that every pass takes besides (launches, Python).
    """
    tokens = counts("n", n, 1)
    reading = (
        positive("weight_bytes", weight_bytes)
        + not_negative("cache_bytes", cache_bytes)
    ) / positive("bandwidth", bandwidth)
    computing = positive("flops_per_token", flops_per_token) / positive(
        "flops_rate", flops_rate
    )
    extra = not_negative("overhead", overhead)
    return plain(extra + np.maximum(reading, tokens * computing))


def roofline_ratio(
    n: ArrayLike,
    weight_bytes: float,
    flops_per_token: float,
    bandwidth: float,
    flops_rate: float,
    cache_bytes: float = 0.0,
    overhead: float = 0.0,
) -> float | Array:
    """t_n / t_1 of `roofline`: the ``verify`` of `walltime.speedup`."""
    rest = (
        weight_bytes,
        flops_per_token,
        bandwidth,
        flops_rate,
        cache_bytes,
        overhead,
    )
    return plain(np.asarray(roofline(n, *rest)) / roofline(1, *rest))


def ridge(
    weight_bytes: float,
    flops_per_token: float,
    bandwidth: float,
    flops_rate: float,
    cache_bytes: float = 0.0,
) -> float:
    """Tokens up to which a pass costs as much as a pass over one.

    Where n flops_per_token / flops_rate meets the time of reading; below 1
    when even one token is bound by arithmetic.  Units as in `roofline`.
    """
    reading = (
        positive("weight_bytes", weight_bytes)
        + not_negative("cache_bytes", cache_bytes)
    ) / positive("bandwidth", bandwidth)
    return float(
        reading
        * positive("flops_rate", flops_rate)
        / positive("flops_per_token", flops_per_token)
    )
