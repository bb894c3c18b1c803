"""`specref.theory.block`: accepted drafts, token by token and as a block."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_theory import EXACT, C, laws

from specref import theory

THIRDS = ((1 / 3, 2 / 3), (2 / 3, 1 / 3))


def test_golden_example() -> None:
    got = [
        9 * f(*THIRDS, 2)
        for f in (
            theory.token_expected_accepted,
            theory.block_expected_accepted,
            theory.block_bound,
        )
    ]
    assert got == pytest.approx([10, 11, 12], rel=0, abs=1e-12)


def over_all_drafts(
    p: np.ndarray, q: np.ndarray, gamma: int
) -> tuple[float, float, float]:
    """Token, block and bound by summing over every draft of every length.

    The block's weight is written as in the theorem, a minimum over where
    the running product starts, not as the recursion that the library uses.
    """
    token = block = bound = 0.0
    for i in range(1, gamma + 1):
        for xs in itertools.product(np.flatnonzero(q), repeat=i):
            x = list(xs)
            chance, ratio = np.prod(q[x]), p[x] / q[x]
            token += chance * np.minimum(ratio, 1.0).prod()
            block += chance * min(
                ratio[j:].prod() if j < i else 1.0 for j in range(i + 1)
            )
            bound += min(np.prod(p[x]), chance)
    return token, block, bound


@pytest.mark.parametrize("seed", range(24))
def test_over_all_drafts(seed: int) -> None:
    for size, gamma in ((2, 6), (3, 4), (4, 3)):
        p, q = laws(seed, size)
        token, block, bound = over_all_drafts(p, q, gamma)
        got = theory.token_expected_accepted(p, q, gamma)
        assert got == pytest.approx(token, **EXACT)
        got = theory.block_expected_accepted(p, q, gamma)
        assert got == pytest.approx(block, rel=0, abs=1e-12)
        got = theory.block_bound(p, q, gamma)
        assert got == pytest.approx(bound, rel=0, abs=1e-12)


def test_the_three_differ_where_they_should() -> None:
    p, q = (np.array(x) for x in C)
    token, block, bound = over_all_drafts(p, q, 3)
    assert token + 0.05 < block < bound - 0.05


@pytest.mark.parametrize("seed", range(60))
def test_block_is_never_worse(seed: int) -> None:
    p, q = laws(seed, 3)
    for gamma in (0, 1, 2, 5):
        token = theory.token_expected_accepted(p, q, gamma)
        block = theory.block_expected_accepted(p, q, gamma)
        bound = theory.block_bound(p, q, gamma)
        assert token - 1e-12 <= block <= bound + 1e-12 <= gamma + 2e-12
        if gamma <= 1:
            assert block == pytest.approx(token, **EXACT)


def test_token_is_equation_1_without_the_extra_token() -> None:
    for gamma in (0, 1, 4, 9):
        want = theory.expected_tokens(theory.alpha(*C), gamma) - 1
        got = theory.token_expected_accepted(*C, gamma)
        assert got == pytest.approx(want, **EXACT)


def test_point_masses_gain_nothing() -> None:
    # Temperature 0: accepted or not, and both rules agree.
    p = (1.0, 0.0)
    for q, want in ((p, 5.0), ((0.0, 1.0), 0.0)):
        assert theory.token_expected_accepted(p, q, 5) == want
        assert theory.block_expected_accepted(p, q, 5) == want


def test_long_drafts_have_few_weights() -> None:
    # Powers of 2 only: 41 values after 20 drafts, not 2^20.
    block = theory.block_expected_accepted(*THIRDS, 200)
    short = theory.block_expected_accepted(*THIRDS, 20)
    assert 200 > block > short > theory.token_expected_accepted(*THIRDS, 20)
    # Unrelated ratios too, as long as they are few.
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(5), 2)
    assert theory.block_expected_accepted(p, q, 12) > 0


def test_equal_weights_are_merged_without_losing_mass() -> None:
    rng = np.random.default_rng(4)
    p, q = rng.dirichlet(np.ones(3), 2)
    twice = [np.concatenate((0.5 * x, 0.5 * x)) for x in (p, q)]
    for f in (theory.block_expected_accepted, theory.block_bound):
        assert f(*twice, 7) == pytest.approx(f(p, q, 7), rel=0, abs=1e-12)


def test_weights_that_are_close_stay_apart() -> None:
    for gap in (1e-4, 1e-8, 1e-11):
        p, q = np.array((0.5 + gap, 0.5 - gap)), np.array((0.5, 0.5))
        _, block, bound = over_all_drafts(p, q, 3)
        got = theory.block_expected_accepted(p, q, 3)
        assert got == pytest.approx(block, rel=0, abs=1e-13)
        got = theory.block_bound(p, q, 3)
        assert got == pytest.approx(bound, rel=0, abs=1e-13)


BAD = [
    ((*C, -1), "gamma must be at least 0, got -1"),
    ((*C, 2.5), "gamma must be a whole number, got 2.5"),
    (((0.5, 0.4), (0.5, 0.5), 2), "p must sum to 1"),
    (((1.0,), (0.5, 0.5), 2), "one vocabulary"),
]


@pytest.mark.parametrize("args,message", BAD)
def test_bad_input_is_one_clear_sentence(args: tuple, message: str) -> None:
    for f in (
        theory.token_expected_accepted,
        theory.block_expected_accepted,
        theory.block_bound,
    ):
        with pytest.raises(ValueError, match=message):
            f(*args)


def test_too_many_weights_are_refused() -> None:
    rng = np.random.default_rng(5)
    p, q = rng.dirichlet(np.ones(6000), 2)
    assert theory.block_expected_accepted(p, q, 1) == pytest.approx(
        theory.alpha(p, q)
    )
    with pytest.raises(ValueError, match="gamma must be smaller for laws"):
        theory.block_expected_accepted(p, q, 2)
