"""`specref.theory`: tokens per call, speedup, draft length, roofline.

Closed forms against sums over every outcome, and against what Leviathan et
al. print.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_theory import EXACT

from specref import theory


@pytest.mark.parametrize("alpha", [0.0, 1e-12, 0.3, 0.5, 0.9, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_expected_tokens_over_all_patterns(alpha: float, gamma: int) -> None:
    mean = 0.0
    for coins in itertools.product((1, 0), repeat=gamma):
        chance = np.prod([alpha if x else 1 - alpha for x in coins])
        kept = coins.index(0) if 0 in coins else gamma
        mean += chance * (kept + 1)
    assert theory.expected_tokens(alpha, gamma) == pytest.approx(mean, **EXACT)
    by_depth = theory.expected_tokens_by_depth([alpha] * gamma)
    assert by_depth == pytest.approx(mean, **EXACT)


def test_expected_tokens_keeps_its_digits_near_one() -> None:
    for miss in (1e-6, 1e-9, 1e-12, 1e-15):
        alpha, gamma = 1 - miss, 1000
        want = sum((1 - miss) ** i for i in range(gamma + 1))
        got = theory.expected_tokens(alpha, gamma)
        assert got == pytest.approx(want, rel=1e-12)
    assert theory.expected_tokens(1.0, 7) == 8.0


def test_expected_tokens_broadcasts() -> None:
    alpha = np.array([0.2, 1.0, 0.0])
    got = theory.expected_tokens(alpha[:, None], [0, 1, 2, 3])
    assert got.shape == (3, 4)
    assert got[0] == pytest.approx([1, 1.2, 1.24, 1.248], **EXACT)
    assert got[1].tolist() == [1, 2, 3, 4]
    assert got[2].tolist() == [1, 1, 1, 1]
    assert isinstance(theory.expected_tokens(0.2, 3), float)
    assert theory.oracle([0.0, 0.5, 1.0]).tolist() == [1.0, 2.0, np.inf]
    long = theory.expected_tokens(0.8, 500)
    assert long == pytest.approx(theory.oracle(0.8))


def test_expected_tokens_by_depth_is_conditional() -> None:
    assert theory.expected_tokens_by_depth([]) == 1.0
    got = theory.expected_tokens_by_depth([0.8, 0.5, 0.25])
    assert got == pytest.approx(1 + 0.8 + 0.4 + 0.1, **EXACT)


def test_mixture_of_contexts() -> None:
    alphas, weights, gamma = (0.1, 0.95, 0.6), (0.3, 0.5, 0.2), 6
    each = [theory.expected_tokens(a, gamma) for a in alphas]
    want = float(np.dot(weights, each))
    got = theory.expected_tokens_mixture(alphas, weights, gamma)
    assert got == pytest.approx(want, **EXACT)
    betas = theory.mixture_by_depth(alphas, weights, gamma)
    assert theory.expected_tokens_by_depth(betas) == pytest.approx(want)
    assert (np.diff(betas) > 0).all()
    mean = float(np.dot(alphas, weights))
    assert betas[0] == pytest.approx(mean, **EXACT)
    assert got > theory.expected_tokens(mean, gamma) + 0.1
    # Nothing varies: i.i.d. again; nothing is ever accepted: no 0 / 0.
    assert theory.mixture_by_depth([0.7], [1.0], 3).tolist() == pytest.approx(
        [0.7] * 3
    )
    assert theory.mixture_by_depth([0.0], [1.0], 3).tolist() == [0, 0, 0]


TABLE_1 = [
    (0.6, 2, 1.53, 1.96),
    (0.7, 3, 1.58, 2.53),
    (0.8, 2, 1.23, 2.44),
    (0.8, 5, 1.63, 3.69),
    (0.9, 2, 1.11, 2.71),
    (0.9, 10, 1.60, 6.86),
]


@pytest.mark.parametrize("alpha,gamma,ops,speed", TABLE_1)
def test_leviathan_table_1(
    alpha: float, gamma: int, ops: float, speed: float
) -> None:
    assert round(theory.operations(alpha, gamma, 0.0), 2) == ops
    assert round(theory.speedup(alpha, gamma, 0.0), 2) == speed


# gamma, alpha, c, expected speedup as printed (Table 4).
TABLE_4 = [
    (7, 0.75, 0.02, 3.2),
    (7, 0.80, 0.04, 3.3),
    (7, 0.82, 0.11, 2.5),
    (7, 0.62, 0.02, 2.3),
    (5, 0.68, 0.04, 2.4),
    (3, 0.71, 0.11, 2.0),
    (5, 0.65, 0.02, 2.4),
    (5, 0.73, 0.04, 2.6),
    (3, 0.74, 0.11, 2.0),
    (5, 0.53, 0.02, 1.9),
    (3, 0.55, 0.04, 1.8),
    (3, 0.56, 0.11, 1.6),
]


@pytest.mark.parametrize("gamma,alpha,c,printed", TABLE_4)
def test_leviathan_table_4(
    gamma: int, alpha: float, c: float, printed: float
) -> None:
    assert abs(theory.speedup(alpha, gamma, c) - printed) < 0.07


def test_leviathan_table_5_and_text() -> None:
    got = theory.speedup([0.75, 0.75, 0.8, 0.87], 8, 0.015)
    assert np.round(got, 2).tolist() == [3.30, 3.30, 3.87, 4.91]
    assert round(theory.speedup(0.2, 3, 0.0), 3) == 1.248
    some = (0.62, 0.71, 0.76, 0.84)
    best = [theory.optimal_gamma(a, 0.015)[1] for a in some]
    assert np.round(best, 2).tolist() == [2.33, 2.94, 3.45, 4.79]


def test_table_4_rows_that_do_not_round_trip() -> None:
    got = [
        theory.speedup(0.68, 5, 0.04),
        theory.speedup(0.71, 3, 0.11),
        theory.speedup(0.56, 3, 0.11),
    ]
    assert np.round(got, 3).tolist() == [2.347, 1.934, 1.541]


BEST = {  # c -> (gamma, speedup) at alpha = .5, .6, .7, .8, .9
    0.01: [(5, 1.875), (7, 2.297), (9, 2.972), (14, 4.232), (24, 7.486)],
    0.02: [(4, 1.794), (6, 2.170), (8, 2.758), (11, 3.817), (19, 6.365)],
    0.05: [(3, 1.630), (4, 1.921), (6, 2.353), (8, 3.092), (13, 4.674)],
    0.10: [(2, 1.458), (3, 1.674), (4, 1.981), (6, 2.470), (10, 3.431)],
}


@pytest.mark.parametrize("c", BEST)
def test_optimal_gamma_table(c: float) -> None:
    for alpha, want in zip((0.5, 0.6, 0.7, 0.8, 0.9), BEST[c], strict=True):
        gamma, gain = theory.optimal_gamma(alpha, c)
        assert (gamma, round(gain, 3)) == want
        assert gain == theory.speedup(alpha, gamma, c)


def test_optimal_gamma_is_zero_exactly_when_alpha_is_at_most_c() -> None:
    for alpha, c in itertools.product(np.linspace(0, 1, 21), repeat=2):
        gamma, gain = theory.optimal_gamma(alpha, c, most=64)
        assert (gamma > 0) == (alpha > c)
        assert gain >= theory.guaranteed_speedup(alpha, c) - 1e-15
        if gamma == 0:
            assert gain == 1.0
    assert theory.optimal_gamma(0.6, 0.2, most=0) == (0, 1.0)
    assert isinstance(theory.optimal_gamma(0.7, 0.1)[0], int)


def test_guaranteed_speedup_is_that_of_one_draft() -> None:
    assert theory.guaranteed_speedup(0.7, 0.1) == pytest.approx(
        theory.speedup(0.7, 1, 0.1), **EXACT
    )
    got = theory.guaranteed_speedup([0.1, 0.5, 0.6], 0.5)
    assert got == pytest.approx([1.0, 1.0, 1.6 / 1.5], **EXACT)


def test_verification_cost_in_every_form() -> None:
    def cost(n: int) -> float:
        return 1.0 + 0.25 * (n - 1)

    listed = [cost(n) for n in range(1, 9)]
    table = {n: cost(n) for n in range(1, 9)}
    for gamma in range(8):
        want = theory.expected_tokens(0.8, gamma) / (
            0.1 * gamma + cost(gamma + 1)
        )
        for verify in (cost, listed, table, np.array(listed)):
            got = theory.speedup(0.8, gamma, 0.1, verify)
            assert got == pytest.approx(want, **EXACT)
    assert theory.speedup(0.8, 3, 0.1, 2.0) == pytest.approx(2.952 / 2.3)
    assert theory.speedup(0.8, 0, 0.1, 2.0) == 1.0
    best = {theory.optimal_gamma(0.8, 0.1, v) for v in (listed, table)}
    best.add(theory.optimal_gamma(0.8, 0.1, cost, most=7))
    assert len(best) == 1
    gamma, gain = best.pop()
    each = [theory.speedup(0.8, g, 0.1, cost) for g in range(8)]
    assert (gamma, gain) == (int(np.argmax(each)), max(each))
    assert theory.optimal_gamma(0.8, 0.1, verify=5.0, most=50) == (0, 1.0)
    assert theory.optimal_gamma(0.8, 0.1, verify=[1.0]) == (0, 1.0)
    # A measured table need not hold every size.
    assert theory.optimal_gamma(0.9, 0.1, {1: 1.0, 4: 1.1})[0] == 3


def test_optimal_gamma_passes_over_a_step_in_the_cost() -> None:
    def tiles(n: int) -> float:  # a kernel that works in blocks of 8
        return 1.0 if n <= 2 else 1.0 + 0.5 * -(-n // 8)

    gains = [theory.speedup(0.9, g, 0.01, tiles) for g in range(40)]
    assert gains[2] < gains[1] < max(gains)
    assert theory.optimal_gamma(0.9, 0.01, tiles, most=39) == (
        int(np.argmax(gains)),
        max(gains),
    )


def test_operations_with_a_draft() -> None:
    want = (5 * 0.1 + 6) / theory.expected_tokens(0.8, 5)
    assert theory.operations(0.8, 5, 0.1) == pytest.approx(want, **EXACT)
    assert theory.operations(0.8, 0, 0.3) == 1.0


# --- roofline


def test_roofline_by_hand() -> None:
    # 1 GB at 100 GB/s is 10 ms; 1 Gflop per token at 500 Gflop/s is 2 ms.
    card = (1e9, 1e9, 100e9, 500e9)
    assert theory.roofline([1, 5, 6], *card) == pytest.approx(
        [0.010, 0.010, 0.012]
    )
    assert theory.ridge(*card) == pytest.approx(5.0)
    assert theory.roofline_ratio(10, *card) == pytest.approx(2.0)
    assert theory.roofline_ratio(1, *card) == 1.0
    more = theory.roofline(1, *card, cache_bytes=1e9, overhead=0.001)
    assert more == pytest.approx(0.021)
    assert theory.ridge(*card, cache_bytes=1e9) == pytest.approx(10.0)
    ratio = theory.roofline_ratio(20, *card, 1e9, 0.001)
    assert ratio == pytest.approx(0.041 / 0.021)
    # Below the ridge Theorem 3.8 holds as it stands.
    gamma, gain = theory.optimal_gamma(
        0.7, 0.1, lambda n: theory.roofline_ratio(n, *card), most=32
    )
    assert gamma <= 4 and gain == theory.optimal_gamma(0.7, 0.1, most=4)[1]


BAD = [
    ("expected_tokens", (1.2, 3), r"alpha must be in \[0, 1\], got 1.2"),
    ("expected_tokens", (0.5, -1), "gamma must be at least 0, got -1"),
    ("expected_tokens", (0.5, 1.5), "gamma must be a whole number, got 1.5"),
    ("expected_tokens", (None, 1), "alpha must be finite"),
    ("oracle", (-0.1,), "alpha must be in"),
    ("speedup", (0.5, 2, -0.1), r"c must be in \[0, inf\), got -0.1"),
    ("speedup", (0.5, 2, 0.1, [1.0, 1.1]), "verify must have at least 3"),
    ("speedup", (0.5, 2, 0.1, {1: 1.0}), "verify must have a cost for 3"),
    ("speedup", (0.5, 2, 0.1, 0.0), r"verify must be in \(0, inf\)"),
    ("pass_cost", (None, 0), "tokens must be at least 1"),
    ("operations", (0.5, 2, -1.0), "c_hat must be in"),
    ("optimal_gamma", ([0.5], 0.1), "alpha must be one number"),
    ("optimal_gamma", (0.5, 0.1, None, -1), "most must be at least 0"),
    ("roofline", (0, 1, 1, 1, 1), "n must be at least 1"),
    ("roofline", (1, 1, 1, 0, 1), r"bandwidth must be in \(0, inf\), got 0"),
    ("roofline", (1, 1, 1, 1, 1, -1), "cache_bytes must be in"),
    ("ridge", (1, 0, 1, 1), "flops_per_token must be in"),
]


@pytest.mark.parametrize("name,args,message", BAD)
def test_bad_input_is_one_clear_sentence(
    name: str, args: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        getattr(theory, name)(*args)
    assert "\n" not in str(error.value)
