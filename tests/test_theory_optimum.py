"""`specref.theory.optimal_transport`, and the order of the rules below it.

The optimum against all subsets and against a largest flow in exact
fractions, which knows nothing of sets or sorting.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
from test_theory import EXACT, C, laws

from specref import theory


def best_subset(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """1 + min over all 2^V sets of p(H) - q(H)^k."""
    sets = np.array(list(itertools.product((0, 1), repeat=len(p))))
    return float(1 + (sets @ p - (sets @ q) ** k).min())


@pytest.mark.parametrize("seed", range(60))
def test_optimal_transport_over_all_subsets(seed: int) -> None:
    for size, k in ((2, 2), (3, 3), (5, 2), (8, 3), (8, 7)):
        p, q = laws(seed, size)
        got = theory.optimal_transport(p, q, k)
        assert got == pytest.approx(best_subset(p, q, k), **EXACT)


def largest_flow(p: list, q: list, k: int) -> Fraction:
    """Flow from tuples (q^k) to their tokens (p), by shortest paths."""
    room: dict = {}

    def pipe(a: object, b: object, size: Fraction | None) -> None:
        room.setdefault(a, {})[b] = size  # None: as much as you like
        room.setdefault(b, {}).setdefault(a, Fraction(0))

    for xs in itertools.product(range(len(q)), repeat=k):
        share = Fraction(1)
        for x in xs:
            share *= q[x]
        pipe("in", xs, share)
        for x in set(xs):
            pipe(xs, x, None)
    for x, share in enumerate(p):
        pipe(x, "out", share)
    total = Fraction(0)
    while True:
        came, todo = {"in": None}, deque(["in"])
        while todo and "out" not in came:
            a = todo.popleft()
            for b, size in room[a].items():
                if b not in came and size != 0:
                    came[b] = a
                    todo.append(b)
        if "out" not in came:
            return total
        path, b = [], "out"
        while came[b] is not None:
            path.append((came[b], b))
            b = came[b]
        step = min(s for a, b in path if (s := room[a][b]) is not None)
        for a, b in path:
            for x, y, sign in ((a, b, -1), (b, a, 1)):
                if room[x][y] is not None:
                    room[x][y] += sign * step
        total += step


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size,k", [(2, 2), (2, 3), (3, 2), (3, 3), (4, 2)])
def test_optimal_transport_is_the_largest_flow(
    seed: int, size: int, k: int
) -> None:
    rng = np.random.default_rng(seed)
    p, q = (
        [Fraction(int(x), int(row.sum())) for x in row]
        for row in rng.integers(0, 9, (2, size)) + np.eye(size, dtype=int)[:2]
    )
    got = theory.optimal_transport([*map(float, p)], [*map(float, q)], k)
    assert got == pytest.approx(float(largest_flow(p, q, k)), **EXACT)


def test_a_rule_of_thumb_instead_of_the_order_is_found_out() -> None:
    # Sorting by p - q or by q is not enough.
    worst = {"p - q": 0.0, "-q": 0.0}
    for seed in range(30):
        p, q = laws(6 * seed, 6)
        for name, key in (("p - q", p - q), ("-q", -q)):
            order = np.argsort(key)
            value = 1 + (p[order].cumsum() - q[order].cumsum() ** 3).min()
            gap = value - theory.optimal_transport(p, q, 3)
            worst[name] = max(worst[name], gap)
            assert gap > -1e-12
    assert min(worst.values()) > 1e-3


@pytest.mark.parametrize("seed", range(100))
def test_order_of_the_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(7, rng.choice([0.2, 1.0, 5.0])), 2)
    for k in (1, 2, 3, 5):
        best = theory.optimal_transport(p, q, k)
        seq = theory.kseq(p, q, k)[1]
        wr = theory.recursive_rejection(p, q, k, True)
        assert best >= seq - 1e-12
        assert seq >= (1 - (1 - 1 / k) ** k) * best - 1e-12
        assert best >= wr - 1e-12
        assert wr >= theory.naive(p, q, k) - 1e-12
        assert best >= theory.single(p, q) - 1e-12


def test_without_replacement_may_beat_the_iid_optimum() -> None:
    # Another draft law: no contradiction, and no inequality to rely on.
    wo = theory.recursive_rejection(*C, 3, False)
    assert wo > theory.optimal_transport(*C, 3) + 0.1


def test_large_vocabulary_is_fast() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(50_000, 0.1), 2)
    start = time.process_time()
    best = theory.optimal_transport(p, q, 8)
    seq = theory.kseq(p, q, 8)[1]
    wr = theory.recursive_rejection(p, q, 8, True)
    assert time.process_time() - start < 1.0
    assert best >= max(seq, wr) and seq >= (1 - (7 / 8) ** 8) * best
