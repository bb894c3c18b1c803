"""`specref.theory.multidraft`: k candidates for one token.

Every closed form against a sum over all candidates; the best that any rule
can do is in ``test_theory_optimum.py``.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from test_theory import EXACT, C, laws

from specref import theory

A = ((1.0, 0.0), (0.5, 0.5))
# rho, k-SEQ, recursive with and without replacement, naive, optimum.
GOLDEN = [
    (C, 2, 1.54031, 0.70806, 0.68, 0.76, 0.444, 0.76),
    (C, 3, 1.94837, 0.78967, 0.744, 1.0, 0.5774, 0.888),
    (A, 2, 1.5, 0.75, 0.75, 1.0, 0.75, 0.75),
    (A, 3, 1.75, 0.875, 0.875, 1.0, 0.875, 0.875),
]


@pytest.mark.parametrize("case,k,rho,seq,wr,wo,nss,best", GOLDEN)
def test_golden_values(
    case: tuple,
    k: int,
    rho: float,
    seq: float,
    wr: float,
    wo: float,
    nss: float,
    best: float,
) -> None:
    got = theory.kseq(*case, k)
    assert [round(x, 5) for x in got] == [rho, seq]
    exact = {"rel": 0, "abs": 1e-12}
    with_, without = (
        theory.recursive_rejection(*case, k, replace) for replace in (1, 0)
    )
    assert with_ == pytest.approx(wr, **exact)
    assert without == pytest.approx(wo, **exact)
    assert theory.naive(*case, k) == pytest.approx(nss, **exact)
    assert theory.optimal_transport(*case, k) == pytest.approx(best, **exact)


@pytest.mark.parametrize("seed", range(12))
def test_one_candidate_is_the_rejection_test(seed: int) -> None:
    p, q = laws(seed)
    want = theory.alpha(p, q)
    assert theory.single(p, q) == want
    assert theory.kseq(p, q, 1) == (1.0, pytest.approx(want, **EXACT))
    assert theory.optimal_transport(p, q, 1) == pytest.approx(want, **EXACT)
    for replace in (True, False):
        got = theory.recursive_rejection(p, q, 1, replace)
        assert got == pytest.approx(want, **EXACT)


# --- sums over all candidates


def tuples(q: np.ndarray, k: int):
    """Every k i.i.d. candidates with their chance."""
    for xs in itertools.product(np.flatnonzero(q), repeat=k):
        yield xs, float(np.prod(q[list(xs)]))


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_kseq_over_all_candidates(seed: int, k: int) -> None:
    p, q = laws(seed)
    rho, rate = theory.kseq(p, q, k)
    assert 1.0 <= rho <= k
    out, missed = np.zeros(len(p)), 0.0
    for xs, chance in tuples(q, k):
        for x in xs:
            take = min(1.0, p[x] / (rho * q[x]))
            out[x] += chance * take
            chance *= 1 - take
        missed += chance
    assert rate == pytest.approx(1 - missed, **EXACT)
    # Lossless with its residual, so the residual is right and not negative.
    out += missed * theory.kseq_residual(p, q, k)
    assert out == pytest.approx(p, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 6, 7])
def test_kseq_rho_is_the_smallest_valid(seed: int) -> None:
    p, q = laws(seed)
    for k in (2, 3, 8):
        rho, _ = theory.kseq(p, q, k)
        for factor, valid in ((1.0, True), (1 - 1e-9, False)):
            beta = np.minimum(q, p / (rho * factor)).sum()
            hit = 1 - (1 - beta) ** k
            assert (hit <= rho * factor * beta * (1 + 1e-15)) == valid


def test_kseq_edges() -> None:
    assert theory.kseq((1, 0), (0, 1), 4) == (4.0, 0.0)
    assert theory.kseq_residual((1, 0), (0, 1), 4).tolist() == [1, 0]
    rho, rate = theory.kseq((0.5, 0.5), (0.5, 0.5), 4)
    assert rho == pytest.approx(1.0, abs=1e-12)
    assert rate == pytest.approx(1.0, abs=1e-12)


def ordered(q: np.ndarray, k: int, replace: bool):
    """Every k candidates in order, with chance and the law of each.

    Without replacement the tuple ends when the support does.
    """
    def grow(xs: tuple, chance: float, law: np.ndarray, used: tuple):
        if len(xs) == k or not law.any():
            yield xs, chance, used
            return
        law = law / law.sum()
        for x in np.flatnonzero(law):
            after = law.copy()
            if not replace:
                after[x] = 0.0
            yield from grow((*xs, x), chance * law[x], after, (*used, law))

    yield from grow((), 1.0, q, ())


def rejection_rate(
    p: np.ndarray, q: np.ndarray, k: int, replace: bool, mutant: bool = False
) -> tuple[float, np.ndarray]:
    """Acceptance and output law by walking every candidate sequence.

    The mutant updates what is left with the next candidate's law.
    """
    rate, out = 0.0, np.zeros(len(p))
    for xs, chance, used in ordered(q, k, replace):
        left = p
        for i, (x, law) in enumerate(zip(xs, used, strict=True)):
            take = min(1.0, left[x] / law[x])
            out[x] += chance * take
            rate += chance * take
            chance *= 1 - take
            gone = used[i + 1] if mutant and i + 1 < len(xs) else law
            over = np.maximum(left - gone, 0.0)
            left = over / over.sum() if over.sum() > 0 else left
        out += chance * left
    return rate, out


@pytest.mark.parametrize("seed", range(18))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("replace", [True, False])
def test_recursive_rejection_over_all_sequences(
    seed: int, k: int, replace: bool
) -> None:
    p, q = laws(seed)
    rate, out = rejection_rate(p, q, k, replace)
    got = theory.recursive_rejection(p, q, k, replace)
    assert got == pytest.approx(rate, **EXACT)
    assert out == pytest.approx(p, **EXACT)


def test_the_walk_tells_right_from_wrong() -> None:
    p, q = laws(0)
    got = theory.recursive_rejection(p, q, 3, False)
    wrong, law = rejection_rate(p, q, 3, False, mutant=True)
    assert abs(got - wrong) > 1e-3
    assert np.abs(law - p).max() > 1e-3


def test_recursive_rejection_covers_a_small_support() -> None:
    # Sequoia's covering property, which drawing with replacement lacks.
    p, q = (0.7, 0.3, 0, 0), (0.05, 0.15, 0.8, 0)
    assert theory.recursive_rejection(p, q, 3, False) == pytest.approx(1.0)
    assert theory.recursive_rejection(p, q, 9, False) == pytest.approx(1.0)
    assert theory.recursive_rejection(p, q, 9, True) < 0.9
    # What q never draws is never accepted.
    p, q = (0.5, 0.25, 0.25), (1.0, 0.0, 0.0)
    assert theory.recursive_rejection(p, q, 3, False) == pytest.approx(0.5)


def test_recursive_rejection_is_fast_or_refuses() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(50), 2)
    start = time.process_time()
    theory.recursive_rejection(p, q, 4, False)
    assert time.process_time() - start < 2.0
    with pytest.raises(ValueError, match="k must be smaller for q with 50"):
        theory.recursive_rejection(p, q, 12, False)
    # A draft cut to its top 6 is cheap whatever the vocabulary.
    p = rng.dirichlet(np.ones(20_000))
    q = np.zeros(20_000)
    q[:6] = rng.dirichlet(np.ones(6))
    small = np.append(p[:6], p[6:].sum())
    assert theory.recursive_rejection(p, q, 6, False) == pytest.approx(
        rejection_rate(small, np.append(q[:6], 0.0), 6, False)[0], **EXACT
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_naive_over_all_candidates(seed: int, k: int) -> None:
    p, q = laws(seed)
    rate = sum(w * p[list(set(xs))].sum() for xs, w in tuples(q, k))
    assert theory.naive(p, q, k) == pytest.approx(rate, **EXACT)


def test_fixed_candidates() -> None:
    p = (0.6, 0.3, 0.1)
    assert theory.deterministic_topk(p, [0]) == 0.6
    assert theory.deterministic_topk(p, [2, 0]) == pytest.approx(0.7)
    assert theory.deterministic_topk(p, []) == 0.0
    # Sequoia's example: top-k alone is not an optimal transport.
    assert theory.deterministic_topk((0.6, 0.4), [0]) == 0.6
    assert theory.single((0.6, 0.4), (0.6, 0.4)) == 1.0
    # Point-mass drafts in turn, each taking its token off p.
    left, missed = np.array(p), 1.0
    for x in (2, 0):
        missed *= 1 - left[x]
        left = theory.residual(left, np.eye(3)[x])
    assert 1 - missed == pytest.approx(theory.deterministic_topk(p, [2, 0]))


BAD = [
    ("single", ((0.5, 0.4), (0.5, 0.5)), "p must sum to 1"),
    ("single", (np.eye(2), np.eye(2)), "p must be one law"),
    ("kseq", (*C, 0), "k must be at least 1, got 0"),
    ("kseq", (*C, 1.5), "k must be a whole number"),
    ("kseq_residual", ((1.0,), (0.5, 0.5), 2), "one vocabulary"),
    ("recursive_rejection", (*C, -1, True), "k must be at least 1"),
    ("naive", (*C, [1, 2]), "k must be one number"),
    ("optimal_transport", ((0.5, np.inf), (0.5, 0.5), 2), "p must be finite"),
    ("deterministic_topk", ((0.5, 0.5), [2]), r"tokens must be ids in \[0, 2"),
    ("deterministic_topk", ((0.5, 0.5), [-1]), "tokens must be ids in"),
    ("deterministic_topk", ((0.5, 0.5), [1, 1]), "must be different ids"),
    ("deterministic_topk", ((0.5, 0.5), 1), "must be a list of ids"),
    ("deterministic_topk", ((0.5, 0.5), [0.5]), "must be a list of ids"),
]


@pytest.mark.parametrize("name,args,message", BAD)
def test_bad_input_is_one_clear_sentence(
    name: str, args: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        getattr(theory, name)(*args)
    assert "\n" not in str(error.value)
