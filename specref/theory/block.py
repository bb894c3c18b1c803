"""Accepted drafts of a chain, judged token by token or as a block.

For laws that do not depend on the context.  Counts exclude the correction
or bonus token.

Does not handle: context-dependent laws (enumerate them with
`specref.law`), trees.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from specref.theory._check import Array, count, pair
from specref.theory.acceptance import alpha

MOST_STATES = 5_000_000  # weights times ratios of one step
SAME = 1e-14  # relative gap below which two weights are one, up to rounding


def token_expected_accepted(p: ArrayLike, q: ArrayLike, gamma: int) -> float:
    """Mean accepted drafts of token-wise rejection, bonus excluded.

    alpha + ... + alpha^gamma (Leviathan et al. 2023, 2211.17192, Equation 1
    minus the extra token).

    Args:
        p, q: ``[V]``, the same at every position.
        gamma: draft length, at least 0.
    """
    a = float(alpha(*pair(p, q)))
    return float((a ** np.arange(1, count("gamma", gamma, 0) + 1)).sum())


def block_expected_accepted(p: ArrayLike, q: ArrayLike, gamma: int) -> float:
    """Mean accepted drafts of block verification, bonus excluded.

    Sun et al. 2024 (2403.10444), Algorithm 2: at least i drafts are kept
    with chance w_i given the draft, w_i = min(1, w_{i-1} p / q), w_0 = 1.
    So the mean is sum_i E[w_i] = sum_i sum_x q(x^i) min_{0<=j<=i}
    prod_{l>j} p(x_l) / q(x_l).  Computed from the law of w_i, step by step,
    equal weights being one state.

    Args:
        p, q: ``[V]``, the same at every position.
        gamma: draft length, at least 0.
    Raises:
        ValueError: also when there are too many different weights.
    """
    p, q = pair(p, q)
    steps = _weights(p, q, count("gamma", gamma, 0), capped=True)
    return float(sum(mass @ weight for weight, mass in steps))


def block_bound(p: ArrayLike, q: ArrayLike, gamma: int) -> float:
    """sum_i sum_x min(p(x^i), q(x^i)): what no prefix can exceed.

    The sum over lengths of the overlap of the joint laws.  A bound for
    every lossless rule, since a kept prefix is both drafted and output;
    block verification does not reach it in general.  Bonus excluded;
    arguments as in `block_expected_accepted`.
    """
    p, q = pair(p, q)
    steps = _weights(p, q, count("gamma", gamma, 0), capped=False)
    return float(sum(mass @ np.minimum(w, 1.0) for w, mass in steps))


def _weights(
    p: Array, q: Array, gamma: int, capped: bool
) -> Iterator[tuple[Array, Array]]:
    """Law of the running weight under q after 1..gamma drafts.

    Yields:
        weights and their chances; weight 0, which stays 0, is left out.
    """
    on = (q > 0) & (p > 0)
    ratio, share = _merge(p[on] / q[on], q[on])
    weight, mass = np.ones(1), np.ones(1)
    for _ in range(gamma):
        if len(weight) * len(ratio) > MOST_STATES:
            raise ValueError(
                f"gamma must be smaller for laws with {len(ratio)} different "
                f"ratios p / q: {gamma} drafts have too many weights"
            )
        weight = np.outer(weight, ratio).ravel()
        if capped:
            weight = np.minimum(weight, 1.0)
        weight, mass = _merge(weight, np.outer(mass, share).ravel())
        yield weight, mass


def _merge(value: Array, mass: Array) -> tuple[Array, Array]:
    """Join equal values (up to rounding), adding their masses."""
    value, mass = value[mass > 0], mass[mass > 0]
    if not len(value):
        return value, mass
    order = np.argsort(value, kind="stable")
    value, mass = value[order], mass[order]
    new = np.diff(value) > SAME * value[1:]
    starts = np.concatenate(([0], np.flatnonzero(new) + 1))
    total = np.add.reduceat(mass, starts)
    # The weighted mean keeps E[w], which is what is summed.
    return np.add.reduceat(mass * value, starts) / total, total
