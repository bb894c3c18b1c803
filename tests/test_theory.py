"""`specref.theory`: imports, input checks and acceptance.

Closed forms against sums over every outcome.  Tokens and time are in
``test_theory_walltime.py``, the production rules, by enumeration, in
``test_theory_rules.py``.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from specref import theory

EXACT = {"rel": 0, "abs": 1e-10}
C = ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5))  # case C of SpecTr's tables


def laws(seed: int, size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Random p and q; by turns with zeros, ties, no overlap, or equal."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(size), 2)
    sort = seed % 6
    if sort == 1:
        p[0] = q[-1] = 0.0
    elif sort == 2:
        p, q = np.round(8 * p) + (p == p.max()), np.round(8 * q) + 1
    elif sort == 3:
        p[: size // 2], q[size // 2 :] = 0.0, 0.0
    elif sort == 4:
        q = p.copy()
    return p / p.sum(), q / q.sum()


# --- imports


def test_imports_numpy_only_and_fast() -> None:
    code = (
        "import sys, time; t = time.process_time()\n"
        "import specref; specref.theory.alpha\n"
        "print(time.process_time() - t)\n"
        "print(sorted(m for m in sys.modules if '.' not in m))\n"
    )
    times = []
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, modules = run.stdout.splitlines()
        times.append(float(seconds))
        for heavy in ("torch", "scipy", "transformers", "safetensors"):
            assert f"'{heavy}'" not in modules
    assert min(times) < 0.3


def test_all_names_are_public_and_documented() -> None:
    for name in theory.__all__:
        assert getattr(theory, name).__doc__, name


# --- acceptance


@pytest.mark.parametrize("seed", range(24))
def test_alpha_is_accepted_mass_and_one_minus_tv(seed: int) -> None:
    p, q = laws(seed)
    by_draft = sum(
        b * min(1.0, a / b) for a, b in zip(p, q, strict=True) if b > 0
    )
    assert theory.alpha(p, q) == pytest.approx(by_draft, **EXACT)
    assert theory.tv(p, q) == pytest.approx(1 - by_draft, **EXACT)
    # Draft, accept or correct: the target's law comes out.
    kept = np.minimum(p, q)
    out = kept + (1 - kept.sum()) * theory.residual(p, q)
    assert out == pytest.approx(p, **EXACT)
    assert theory.rejection_sampling_alpha(p, q) <= theory.alpha(p, q) + 1e-15


def test_alpha_on_batches() -> None:
    pairs = [laws(seed) for seed in range(6)]
    p, q = (np.array(x).reshape(2, 3, 4) for x in zip(*pairs, strict=True))
    want = np.array([theory.alpha(*pair) for pair in pairs]).reshape(2, 3)
    assert theory.alpha(p, q) == pytest.approx(want, **EXACT)
    assert theory.tv(p, q[0, 0]).shape == (2, 3)
    assert isinstance(theory.alpha(*pairs[0]), float)


def test_acceptance_is_a_chance_whatever_the_rounding() -> None:
    # Sums of these laws differ from 1 by rounding, either way.
    for seed in range(200):
        p = np.random.default_rng(seed).dirichlet(np.ones(50))
        for rate in (
            theory.alpha(p, p),
            theory.lenient_alpha(p, p, 0.5),
            theory.single(p, p),
            theory.deterministic_topk(p, range(50)),
            theory.kseq(p, p, 3)[1],
            theory.recursive_rejection(p, p, 3, True),
            theory.optimal_transport(p, p, 3),
        ):
            assert theory.expected_tokens(rate, 3) == pytest.approx(4.0)


def test_rejection_sampling_alpha_by_hand() -> None:
    # q / p = 1/3, 1, 5
    assert theory.rejection_sampling_alpha(*C) == pytest.approx(1 / 3, **EXACT)
    assert theory.rejection_sampling_alpha((1, 0), (1, 0)) == 1.0


@pytest.mark.parametrize("seed", range(12))
def test_lenience(seed: int) -> None:
    p, q = laws(seed)
    assert theory.lenient_alpha(p, q, 1.0) == theory.alpha(p, q)
    assert theory.lenient_law(p, q, 1.0) == pytest.approx(p, **EXACT)
    last = 0.0
    for l in (1.0, 0.5, 0.3, 0.1):
        on = q > 0
        chance = np.zeros(len(q))
        chance[on] = np.minimum(1.0, p[on] / (l * q[on]))
        rate = float(np.dot(q, chance))
        assert theory.lenient_alpha(p, q, l) == pytest.approx(rate, **EXACT)
        law = theory.lenient_law(p, q, l)
        assert law.sum() == pytest.approx(1.0, **EXACT)
        assert (law <= p / l + 1e-12).all()
        assert rate >= last - 1e-15
        last = rate


# --- bad input

BAD = [
    ("alpha", ((0.5, 0.4), (0.5, 0.5)), "p must sum to 1"),
    ("alpha", ((0.5, 0.5), (1.5, -0.5)), "q must not be negative"),
    ("alpha", ((0.5, 0.5), (1.0,)), "one vocabulary"),
    ("alpha", (np.full((2, 2), 0.5), np.full((3, 2), 0.5)), "broadcast"),
    ("tv", ((np.nan, 1.0), (0.5, 0.5)), "p must be finite"),
    ("tv", (1.0, (1.0,)), r"p must have shape \[..., V\]"),
    ("alpha", ((), ()), r"p must have shape"),
    ("alpha", ("x", (1.0,)), "p must be a number or an array"),
    ("alpha", ([[1.0], [0.5, 0.5]], (1.0,)), "p must be a number or an array"),
    ("residual", (np.eye(2), (0.5, 0.5)), "p must be one law"),
    ("rejection_sampling_alpha", ((1.0,), (0.9,)), "q must sum to 1"),
    ("lenient_alpha", (*C, 0.0), r"l must be in \(0, 1\], got 0"),
    ("lenient_law", (*C, 1.5), r"l must be in \(0, 1\], got 1.5"),
    ("lenient_law", (*C, [0.5, 0.6]), "l must be one number"),
    ("expected_tokens_by_depth", ([0.5, 2.0],), "betas must be in"),
    ("expected_tokens_by_depth", (0.5,), "betas must be a list"),
    ("expected_tokens_mixture", ([0.5], [0.9], 2), "weights must sum to 1"),
    ("expected_tokens_mixture", ([0.5], [0.5, 0.5], 2), "one entry per alpha"),
    ("mixture_by_depth", ([1.5], [1.0], 2), "alphas must be in"),
    ("mixture_by_depth", ([0.5], [1.0], [1, 2]), "gamma must be one number"),
    ("guaranteed_speedup", (0.5, -1.0), "c must be in"),
    ("roofline_ratio", (1, 1, 1, 1, 1, 0, -1), "overhead must be in"),
]


@pytest.mark.parametrize("name,args,message", BAD)
def test_bad_input_is_one_clear_sentence(
    name: str, args: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        getattr(theory, name)(*args)
    assert "\n" not in str(error.value)
