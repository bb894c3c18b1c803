"""Acceptance of one drafted token by one rejection test.

Does not handle: several candidates (`multidraft`), whole drafts (`block`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from specref.theory._check import (
    Array,
    between,
    chance,
    laws,
    pair,
    same_vocabulary,
)


def _two(p: ArrayLike, q: ArrayLike) -> tuple[Array, Array]:
    p, q = laws("p", p), laws("q", q)
    same_vocabulary(p, q)
    try:
        np.broadcast_shapes(p.shape, q.shape)
    except ValueError:
        raise ValueError(
            f"p and q must have shapes that broadcast, got {p.shape} and "
            f"{q.shape}"
        ) from None
    return p, q


def alpha(p: ArrayLike, q: ArrayLike) -> float | Array:
    """Chance that a draft from ``q`` is accepted: sum min(p, q).

    Leviathan et al. 2023 (2211.17192), Theorem 3.5 and Corollary 3.6 (there
    beta for one context; alpha is its mean over contexts of the target).
    No other one-token coupling with marginals p and q agrees more often.

    Args:
        p: target laws, ``[..., V]``.
        q: draft laws, ``[..., V]``; leading shapes broadcast.
    Returns:
        ``[...]``, a float for one pair.
    Raises:
        ValueError: not laws, or over different vocabularies.
    """
    p, q = _two(p, q)
    return chance(np.minimum(p, q).sum(-1))


def tv(p: ArrayLike, q: ArrayLike) -> float | Array:
    """Total variation distance, half the L1 distance: 1 - alpha(p, q).

    Leviathan et al. 2023 (2211.17192), Lemma 3.3 (there D_LK).  Shapes and
    errors as in `alpha`.
    """
    p, q = _two(p, q)
    return chance(0.5 * np.abs(p - q).sum(-1))


def residual(p: ArrayLike, q: ArrayLike) -> Array:
    """norm([p - q]_+), ``[V]``: the law of a correction; p if p = q.

    Leviathan et al. 2023 (2211.17192), Algorithm 1.  The normaliser is
    tv(p, q).
    """
    p, q = pair(p, q)
    return rest(p, q)


def rest(p: Array, q: Array) -> Array:
    """`residual` of laws that were checked before."""
    over = np.maximum(p - q, 0.0)
    total = over.sum()
    return over / total if total > 0 else p


def rejection_sampling_alpha(p: ArrayLike, q: ArrayLike) -> float:
    """Acceptance of textbook rejection sampling: min over p > 0 of q / p.

    Leviathan et al. 2023 (2211.17192), appendix A.2: draw from q, accept
    with probability p / (M q), M = max p / q, else draw again.  Never more
    than `alpha`.
    """
    p, q = pair(p, q)
    on = p > 0
    return float(min(1.0, (q[on] / p[on]).min()))


def lenient_alpha(p: ArrayLike, q: ArrayLike, l: float) -> float | Array:
    """Acceptance under lenience ``l``: sum min(p / l, q).

    Leviathan et al. 2023 (2211.17192), appendix A.5.  Lossy for l < 1.

    Args:
        p, q: as in `alpha`.
        l: in (0, 1]; 1 is the lossless test.
    """
    p, q = _two(p, q)
    l = _lenience(l)
    return chance(np.minimum(p / l, q).sum(-1))


def lenient_law(p: ArrayLike, q: ArrayLike, l: float) -> Array:
    """Law ``[V]`` of one token under lenience ``l``.

    Accept a draft x with probability min(1, p / (l q)), else draw from
    norm([p - q]_+): min(p / l, q) + (1 - alpha_l) norm([p - q]_+).  No
    token gets more than p / l (Leviathan et al. 2023, appendix A.5).
    """
    p, q = pair(p, q)
    kept = np.minimum(p / _lenience(l), q)
    return kept + max(1.0 - kept.sum(), 0.0) * rest(p, q)


def _lenience(l: float) -> float:
    value = between("l", l, 0.0, 1.0, open_low=True)
    if value.ndim:
        raise ValueError(f"l must be one number, got shape {value.shape}")
    return float(value)
