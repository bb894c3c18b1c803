"""Tokens per target call, speedup and the best draft length of a chain.

Token counts include the correction or bonus token.  Times are in units of
one target pass over one token; ``c`` is a draft step in that unit.

Does not handle: trees (`trees`), where the time of a pass comes from
(`costs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from specref.theory._check import (
    Array,
    chances,
    count,
    counts,
    law,
    not_negative,
    numbers,
    plain,
    positive,
)

ROUNDING = 1e-12  # a gain below this is none

Verify = float | Callable[[int], float] | Sequence[float] | Mapping[int, float]


def expected_tokens(alpha: ArrayLike, gamma: ArrayLike) -> float | Array:
    """Mean tokens per target call: (1 - alpha^(gamma+1)) / (1 - alpha).

    Leviathan et al. 2023 (2211.17192), Equation 1.  Includes the correction
    or bonus token; gamma + 1 at alpha = 1.  Holds when every position is
    accepted with chance alpha whatever came before.

    Args:
        alpha: acceptance, in [0, 1].
        gamma: draft length, at least 0.  Both broadcast.
    """
    a, g = chances("alpha", alpha), counts("gamma", gamma, 0)
    return plain(_tokens(a, g))


def _tokens(a: Array, g: Array) -> Array:
    miss = 1.0 - a
    with np.errstate(divide="ignore", invalid="ignore"):
        # expm1 keeps the digits that 1 - a**n loses near a = 1.
        log = np.where(a > 0.5, np.log1p(-miss), np.log(a))
        out = -np.expm1((g + 1.0) * log) / miss
    return np.where(miss == 0.0, g + 1.0, out)


def expected_tokens_by_depth(betas: Sequence[float]) -> float:
    """1 + b1 + b1 b2 + ...: mean tokens per target call, bonus included.

    Args:
        betas: ``betas[i]`` is the chance that draft i is accepted given that
            all before it were (not the share of rounds that got so far).
            Empty: plain decoding, 1 token.
    """
    b = chances("betas", betas)
    if b.ndim != 1:
        raise ValueError(f"betas must be a list, got shape {b.shape}")
    return 1.0 + float(b.cumprod().sum())


def mixture_by_depth(
    alphas: Sequence[float], weights: Sequence[float], gamma: int
) -> Array:
    """Conditional acceptance by depth when alpha varies between rounds.

    A round is of sort j with chance ``weights[j]`` and accepts each of its
    drafts with ``alphas[j]``.  Depth i accepts with E[a^i] / E[a^(i-1)],
    which grows with i (Cauchy-Schwarz): having come far is a sign of an
    easy context.

    Returns:
        ``[gamma]``, for `expected_tokens_by_depth`; 0 at depths that are
        never reached.
    """
    a, w = _mixture(alphas, weights)
    n = count("gamma", gamma, 0)
    moment = (a ** np.arange(n + 1)[:, None]) @ w
    below = np.where(moment[:-1] > 0, moment[:-1], 1.0)
    return np.minimum(moment[1:] / below, 1.0)


def expected_tokens_mixture(
    alphas: Sequence[float], weights: Sequence[float], gamma: int
) -> float:
    """Mean tokens per target call when alpha varies between rounds.

    The mean of `expected_tokens`, which is convex in alpha: never less than
    its value at the mean alpha (Jensen).  Bonus included.

    Args:
        alphas: acceptance of each sort of round.
        weights: share of rounds (not of tokens) of each sort; sums to 1.
    """
    a, w = _mixture(alphas, weights)
    return float(_tokens(a, counts("gamma", count("gamma", gamma, 0), 0)) @ w)


def _mixture(
    alphas: Sequence[float], weights: Sequence[float]
) -> tuple[Array, Array]:
    a, w = chances("alphas", alphas), law("weights", weights)
    if a.shape != w.shape:
        raise ValueError(
            f"weights must have one entry per alpha, got {w.shape} for "
            f"{a.shape}"
        )
    return a, w


def oracle(alpha: ArrayLike) -> float | Array:
    """1 / (1 - alpha): mean tokens per target call if each round knew where
    its draft would fail, bonus included; infinite at alpha = 1.

    Leviathan et al. 2023 (2211.17192), section 3.5 (the limit of Equation 1
    for a draft as long as it is useful).
    """
    a = chances("alpha", alpha)
    with np.errstate(divide="ignore"):
        return plain(1.0 / (1.0 - a))


def pass_cost(verify: Verify | None, tokens: int) -> float:
    """Time of a target pass over ``tokens`` new tokens; 1 for one token.

    Args:
        verify: see `speedup`.
        tokens: at least 1.
    """
    n = count("tokens", tokens, 1)
    if verify is None or n == 1:
        return 1.0  # one token is the unit
    if callable(verify):
        cost = verify(n)
    elif isinstance(verify, Mapping):
        if n not in verify:
            raise ValueError(f"verify must have a cost for {n} tokens")
        cost = verify[n]
    elif np.ndim(verify) == 0:
        cost = verify
    elif len(verify) < n:
        raise ValueError(
            f"verify must have at least {n} entries (entry n - 1 is the "
            f"cost of n tokens), got {len(verify)}"
        )
    else:
        cost = verify[n - 1]
    return float(positive("verify", cost))


def _pass_costs(verify: Verify | None, gamma: Array) -> Array:
    sizes, where = np.unique(gamma, return_inverse=True)
    cost = np.array([pass_cost(verify, int(g) + 1) for g in sizes])
    return cost[where].reshape(gamma.shape)


def speedup(
    alpha: ArrayLike,
    gamma: ArrayLike,
    c: ArrayLike,
    verify: Verify | None = None,
) -> float | Array:
    """Expected speedup over plain decoding: E / (gamma c + v).

    Leviathan et al. 2023 (2211.17192), Theorem 3.8, where v = 1: a pass
    over gamma + 1 tokens costs as much as one over one token.  With
    ``verify`` it may cost more.

    Args:
        alpha, gamma: as in `expected_tokens`; all broadcast.
        c: time of a draft step over time of a target step.
        verify: time of a pass over n = gamma + 1 tokens in units of a
            one-token pass: a number for every n above 1, a function of n, a
            sequence whose entry n - 1 it is, or a mapping from n.  One
            token costs 1, the unit.
    """
    a, g = chances("alpha", alpha), counts("gamma", gamma, 0)
    step = not_negative("c", c)
    return plain(_tokens(a, g) / (g * step + _pass_costs(verify, g)))


def operations(
    alpha: ArrayLike, gamma: ArrayLike, c_hat: ArrayLike
) -> float | Array:
    """Factor by which arithmetic per token grows (1 is plain decoding).

    (1 - alpha)(gamma c_hat + gamma + 1) / (1 - alpha^(gamma+1)), Leviathan
    et al. 2023 (2211.17192), Theorem 3.11.

    Args:
        c_hat: arithmetic of a draft token over that of a target token.
    """
    a, g = chances("alpha", alpha), counts("gamma", gamma, 0)
    hat = not_negative("c_hat", c_hat)
    return plain((g * hat + g + 1.0) / _tokens(a, g))


def guaranteed_speedup(alpha: ArrayLike, c: ArrayLike) -> float | Array:
    """(1 + alpha) / (1 + c) where alpha > c, else 1.

    The best gamma does at least as well: it is the speedup of gamma = 1
    (Leviathan et al. 2023, 2211.17192, Corollary 3.9; verification costs
    1).  Where alpha <= c no gamma helps.
    """
    a, step = chances("alpha", alpha), not_negative("c", c)
    return plain(np.where(a > step, (1.0 + a) / (1.0 + step), 1.0))


def optimal_gamma(
    alpha: float,
    c: float,
    verify: Verify | None = None,
    most: int = 4096,
) -> tuple[int, float]:
    """The draft length with the largest `speedup`, and that speedup.

    Every length up to ``most`` is tried, so that any ``verify`` will do.
    (0, 1.0) when none helps.  Without costs (c = 0 and no ``verify``)
    longer is better up to rounding: then ``most`` is what bounds gamma.

    Args:
        alpha, c: numbers, as in `speedup`.
        most: longest draft to try; a sequence or mapping ``verify`` may
            bound it further.
    """
    for name, value in (("alpha", alpha), ("c", c)):
        if numbers(name, value).ndim:
            raise ValueError(f"{name} must be one number, got {value!r}")
    top = count("most", most, 0)
    if isinstance(verify, Mapping):
        lengths = [0, *sorted(n - 1 for n in verify if 1 < n <= top + 1)]
    else:
        if not callable(verify) and np.ndim(verify):
            top = min(top, max(len(verify) - 1, 0))
        lengths = list(range(top + 1))
    gains = np.atleast_1d(speedup(alpha, lengths, c, verify))
    best = int(gains.argmax())
    if gains[best] <= 1.0 + ROUNDING:
        return 0, 1.0
    return lengths[best], float(gains[best])
