"""Acceptance of one of k candidates for the next token, rule by rule.

Every function returns the chance that the emitted token is one of the
candidates (no bonus is counted: one position, one answer).

Does not handle: deeper trees (`trees`), candidates from different drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from specref.theory._check import Array, chance, count, law, numbers, pair
from specref.theory.acceptance import alpha, rest

MOST_WORK = 200_000_000  # numbers visited by the exact recursion


def single(p: ArrayLike, q: ArrayLike) -> float:
    """Acceptance of one candidate: sum min(p, q); every rule at k = 1.

    Leviathan et al. 2023 (2211.17192), Theorem 3.5.

    Args:
        p: target law, ``[V]``.
        q: draft law, ``[V]``.
    """
    return float(alpha(*pair(p, q)))


def kseq(p: ArrayLike, q: ArrayLike, k: int) -> tuple[float, float]:
    """SpecTr's k-SEQ for k i.i.d. candidates: (rho, acceptance).

    Sun et al. 2023 (2310.15141), Algorithm 2.  Candidates are tested
    against p / rho; with beta = sum min(q, p / rho) one of them passes with
    chance 1 - (1 - beta)^k.  rho is the root of 1 - (1 - beta)^k =
    rho beta: the left side falls with rho (beta does), the right side
    sum min(rho q, p) grows, so bisection finds it.  The upper end is
    returned: a smaller rho has a negative residual (or, where p > rho q
    on all of p's support, may be valid and accepts the same).  It is k
    where p and q have nothing in common.

    At least (1 - (1 - 1/k)^k) times `optimal_transport`.

    Args:
        p, q: ``[V]``.
        k: candidates, at least 1.
    """
    p, q = pair(p, q)
    k = count("k", k, 1)
    low, high = 1.0, float(k)
    while k > 1:
        rho = 0.5 * (low + high)
        if not low < rho < high:  # neighbours in floating point
            break
        # 1 - rho beta >= (1 - beta)^k, in a form that keeps its digits.
        if np.maximum(p - rho * q, 0.0).sum() >= _fail(p, q, rho) ** k:
            low = rho
        else:
            high = rho
    return high, float(1.0 - _fail(p, q, high) ** k)


def _fail(p: Array, q: Array, rho: float) -> float:
    """1 - beta: one candidate does not pass."""
    return min(float(np.maximum(q - p / rho, 0.0).sum()), 1.0)


def kseq_residual(p: ArrayLike, q: ArrayLike, k: int) -> Array:
    """Law ``[V]`` of k-SEQ's correction, after k rejections.

    (p - min(q, p / rho) acc / beta) / (1 - acc) with `kseq`'s rho and
    acceptance (Sun et al. 2023, 2310.15141, Algorithm 2); p where
    all candidates or none are always accepted.
    """
    rho, accepted = kseq(p, q, k)
    p, q = pair(p, q)
    thin = np.minimum(q, p / rho)
    beta = thin.sum()
    if beta == 0.0:
        return p
    left = np.maximum(p - thin * (accepted / beta), 0.0)
    total = left.sum()
    return left / total if total > 0 else p


def recursive_rejection(
    p: ArrayLike, q: ArrayLike, k: int, replace: bool
) -> float:
    """Acceptance of recursive rejection with k candidates.

    With replacement (SpecInfer, Miao et al. 2024, 2305.09781, section 4.3):
    1 - prod_i (1 - sum min(R_i, q)), R_1 = p, R_{i+1} = norm([R_i - q]_+).
    No residual depends on which token was rejected.

    Without (Sequoia, Chen et al. 2024, 2402.12374, Algorithm 2; RSD, Jeon
    et al. 2024, 2402.14160): the i-th candidate comes from q with earlier
    ones removed, D_i, and R_{i+1} = norm([R_i - D_i]_+) depends on the
    order of the rejected.  Exact, by recursion over the ordered rejected
    prefixes.  When q's support is exhausted no further candidate is drawn
    (Sequoia would go on with a uniform law over the rest).

    Args:
        p, q: ``[V]``.
        k: candidates, at least 1.
        replace: whether candidates are drawn with replacement (i.i.d.).
    Raises:
        ValueError: also when the recursion has too many prefixes.
    """
    p, q = pair(p, q)
    k = count("k", k, 1)
    if replace:
        return _with_replacement(p, q, k)
    on = q > 0
    # Tokens that cannot be drawn matter through their total only.
    p, q = np.append(p[on], p[~on].sum()), np.append(q[on], 0.0)
    k = min(k, len(q) - 1)
    work = math.perm(len(q) - 1, max(k - 2, 0)) * len(q) ** min(k, 2)
    if work > MOST_WORK:
        raise ValueError(
            f"k must be smaller for q with {len(q) - 1} tokens in its "
            f"support: {k} candidates without replacement need about "
            f"{work:.1e} numbers, the limit is {MOST_WORK:.1e}"
        )
    return float(1.0 - _none_of(p, q, k))


def _with_replacement(p: Array, q: Array, k: int) -> float:
    missed, left = 1.0, p
    for _ in range(k):
        missed *= max(1.0 - np.minimum(left, q).sum(), 0.0)
        left = rest(left, q)
    return float(1.0 - missed)


def _none_of(r: Array, d: Array, k: int) -> float:
    """Chance that k candidates are all rejected, without replacement.

    Args:
        r: what is left of the target.
        d: law of the next candidate, with at least k positive entries.
    """
    reject = np.maximum(d - r, 0.0)  # d(x) (1 - min(1, r(x) / d(x)))
    if k == 1:
        return float(reject.sum())
    left, drawn = rest(r, d), np.flatnonzero(reject)
    after = np.repeat(d[None], len(drawn), 0)
    after[np.arange(len(drawn)), drawn] = 0.0
    after /= after.sum(-1, keepdims=True)
    if k == 2:
        lost = np.maximum(after - left, 0.0).sum(-1)
        return float(reject[drawn] @ lost)
    return sum(
        reject[x] * _none_of(left, row, k - 1)
        for x, row in zip(drawn, after, strict=True)
    )


def deterministic_topk(p: ArrayLike, tokens: Sequence[int]) -> float:
    """Acceptance of fixed candidates (top-k): their mass under p.

    The draft law of each is a point mass, so recursive rejection takes one
    off p after the other (EAGLE's tree rule, Li et al. 2024, 2401.15077),
    and accepts exactly when the target's own draw is among them.

    Args:
        p: ``[V]``.
        tokens: different token ids, chosen without looking at chance.
    """
    p, ids = law("p", p), numbers("tokens", tokens)
    if ids.ndim != 1 or (ids != np.floor(ids)).any():
        raise ValueError(f"tokens must be a list of ids, got {tokens!r}")
    if ids.size and not (0 <= ids.min() and ids.max() < len(p)):
        raise ValueError(
            f"tokens must be ids in [0, {len(p)}), got {tokens!r}"
        )
    if len(np.unique(ids)) != len(ids):
        raise ValueError(f"tokens must be different ids, got {tokens!r}")
    return chance(p[ids.astype(np.int64)].sum())


def naive(p: ArrayLike, q: ArrayLike, k: int) -> float:
    """Naive sampling: draw from p, accept if among k i.i.d. candidates.

    sum p (1 - (1 - q)^k), the baseline of SpecInfer (Miao et al. 2024,
    2305.09781, section 4.3).

    Args:
        p, q: ``[V]``.
        k: candidates, at least 1.
    """
    p, q = pair(p, q)
    k = count("k", k, 1)
    with np.errstate(divide="ignore"):
        return chance(-p @ np.expm1(k * np.log1p(-np.minimum(q, 1.0))))


def optimal_transport(p: ArrayLike, q: ArrayLike, k: int) -> float:
    """Largest acceptance any rule can have with k i.i.d. candidates.

    1 + min over sets H of p(H) - q(H)^k: the value of the optimal transport
    of Sun et al. 2023 (2310.15141), without its linear program.

    Proof.  The best coupling of q^k with p is a largest flow from tuples
    (capacity q^k) to tokens (capacity p) along "token is in tuple".  A cut
    keeps some tuples with the source; all their tokens H must be cut on the
    sink's side, p(H), and given H it is best to keep all tuples inside H,
    which leaves 1 - q(H)^k.  Max-flow equals min-cut.

    H can be found by sorting: t^k is convex, so -t^k is the least of its
    tangents' negatives, and the minimum over H equals the minimum over
    slopes s and H of p(H) - s q(H) + const(s).  For fixed s that is least
    for H = {x: p(x) < s q(x)}, ties counting nothing: a prefix in the order
    of p / q.  So the best prefix is the best set.

    Args:
        p, q: ``[V]``.
        k: candidates, at least 1.
    Returns:
        Acceptance in [0, 1].  Drafts without replacement have another law:
        their acceptance may be larger.
    """
    p, q = pair(p, q)
    k = count("k", k, 1)
    on = q > 0
    p, q = p[on], q[on]
    order = np.argsort(p / q, kind="stable")
    inside, drawn = p[order].cumsum(), np.minimum(q[order].cumsum(), 1.0)
    least = min(0.0, (inside - drawn**k).min())
    return float(max(0.0, 1.0 + least))
