"""`specref.theory` against the production code, by enumeration.

Each closed form is compared with the exact law of the decode loop, or of a
first round of it: real drafters, real rules, no second implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_theory import EXACT, laws

import specref
from specref import theory
from specref.decode import Request, rounds
from specref.draft.grow import Static
from specref.draft.model import ModelDrafter
from specref.laws import Law
from specref.lm import Table
from specref.rules import LOSSLESS
from specref.rules.kseq import leftover, solve_rho
from specref.tree import IID
from specref.warp import Sampling, Warp

Next = Callable[[tuple[int, ...]], Sequence[float]]
SEEDS = range(12)  # twice each: zeros, ties, no overlap, equal, generic


def first_round(method: str, p: Any, q: Any, **options: Any) -> Law:
    """Law of (accepted drafts, first token) of the first round.

    ``p`` and ``q`` are laws, or functions of the context.
    """
    nexts = [x if callable(x) else lambda _, x=x: x for x in (p, q)]
    prompt = options.pop("prompt", (0,))
    target, draft = (Table(x, len(x(prompt))) for x in nexts)
    options.setdefault("max_new_tokens", 12)

    def run(draws: Any) -> tuple[int, int]:
        loop = specref.stream(
            target,
            list(prompt),
            method,
            draft=draft,
            temperature=1.0,
            draws=draws,
            **options,
        )
        first = next(loop)
        return first.accepted[0], first.tokens[0][0]

    return specref.law(run)


def mean_accepted(law: Law) -> float:
    return sum(n * mass for (n, _), mass in law.items())


def first_token(law: Law, size: int) -> np.ndarray:
    out = np.zeros(size)
    for (_, token), mass in law.items():
        out[token] += mass
    return out


# --- chains


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_of_a_chain(seed: int) -> None:
    p, q = laws(seed, 3)
    alpha = theory.alpha(p, q)
    for gamma in (1, 2, 3):
        law = first_round("speculative", p, q, gamma=gamma)
        mean = mean_accepted(law)
        want = theory.expected_tokens(alpha, gamma)
        assert mean + 1 == pytest.approx(want, **EXACT)
        want = theory.token_expected_accepted(p, q, gamma)
        assert mean == pytest.approx(want, **EXACT)
        for n in range(gamma + 1):
            mass = sum(x for (m, _), x in law.items() if m == n)
            stop = 1 - alpha if n < gamma else 1.0
            assert mass == pytest.approx(alpha**n * stop, **EXACT)


def in_context(seed: int) -> tuple[Next, Next]:
    """p and q that change with every token of the context."""

    def pair(context: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        place = sum((t + 1) * 4**i for i, t in enumerate(context))
        return laws(1000 * seed + place, 3)

    return lambda c: pair(c)[0], lambda c: pair(c)[1]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_by_depth_in_context(seed: int) -> None:
    p, q = in_context(seed)
    gamma = 3
    # Reach of a depth: the mass of agreeing prefixes, token by token.
    reach, front = [1.0], {(): 1.0}
    for _ in range(gamma):
        front = {
            (*xs, x): mass * share
            for xs, mass in front.items()
            for x, share in enumerate(np.minimum(p((0, *xs)), q((0, *xs))))
        }
        reach.append(sum(front.values()))
    betas = [b / a if a else 0.0 for a, b in zip(reach, reach[1:])]
    law = first_round("speculative", p, q, gamma=gamma)
    want = theory.expected_tokens_by_depth(betas)
    assert mean_accepted(law) + 1 == pytest.approx(want, **EXACT)


def test_mixture_of_prompts() -> None:
    # The prompt decides the sort of round; it is easy, middling or hard.
    sorts, weights = [laws(s, 3) for s in (0, 6, 5)], (0.2, 0.5, 0.3)
    p, q = (lambda c, i=i: sorts[c[0]][i] for i in (0, 1))
    gamma = 3
    each = [
        1 + mean_accepted(
            first_round("speculative", p, q, gamma=gamma, prompt=(s,))
        )
        for s in range(3)
    ]
    alphas = [theory.alpha(*pair) for pair in sorts]
    got = theory.expected_tokens_mixture(alphas, weights, gamma)
    assert got == pytest.approx(np.dot(weights, each), **EXACT)
    alone = theory.expected_tokens(np.dot(weights, alphas), gamma)
    assert abs(got - alone) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_block(seed: int) -> None:
    p, q = laws(seed, 3)
    for gamma in (1, 2, 3):
        law = first_round("block", p, q, gamma=gamma)
        want = theory.block_expected_accepted(p, q, gamma)
        assert mean_accepted(law) == pytest.approx(want, **EXACT)


def test_block_golden_example_in_production() -> None:
    p, q = (1 / 3, 2 / 3), (2 / 3, 1 / 3)
    for method, ninths in (("speculative", 10), ("block", 11)):
        law = first_round(method, p, q, gamma=2)
        assert 9 * mean_accepted(law) == pytest.approx(ninths, **EXACT)


@pytest.mark.parametrize("seed", SEEDS)
def test_traversal_of_a_chain_is_block(seed: int) -> None:
    p, q = laws(seed, 3)

    def run(draws: Any) -> tuple[int]:
        drafter = ModelDrafter(
            Table(lambda _: q, 3), Static((-1, 0, 1), IID)
        )
        ask = Request([(0,)], [draws], 9, Sampling(Warp(1.0)))
        rule = LOSSLESS["traversal"]
        first = next(rounds(Table(lambda _: p, 3), drafter, rule, ask))
        return (first.accepted[0],)

    mean = sum(n * mass for (n,), mass in specref.law(run).items())
    want = theory.block_expected_accepted(p, q, 3)
    assert mean == pytest.approx(want, **EXACT)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("l", [1.0, 0.5, 0.2])
def test_lenience(seed: int, l: float) -> None:
    p, q = laws(seed)
    law = first_round("lenience", p, q, gamma=1, factor=l)
    want = theory.lenient_alpha(p, q, l)
    assert mean_accepted(law) == pytest.approx(want, **EXACT)
    want = theory.lenient_law(p, q, l)
    assert first_token(law, 4) == pytest.approx(want, **EXACT)


# --- many candidates


def closed_forms(p: np.ndarray, q: np.ndarray, k: int) -> dict[str, tuple]:
    """Method -> (its options, acceptance by the theory)."""
    top = sorted(range(len(q)), key=lambda x: (-q[x], x))
    top = [x for x in top if q[x] > 0][:k]
    wide = {"widths": (k,)}
    return {
        "spectr": ({"k": k, "gamma": 1}, theory.kseq(p, q, k)[1]),
        "specinfer": (wide, theory.recursive_rejection(p, q, k, True)),
        "rsd": (wide, theory.recursive_rejection(p, q, k, False)),
        "naive": (wide, theory.naive(p, q, k)),
        "topk_tree": (wide, theory.deterministic_topk(p, top)),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_of_k_candidates(seed: int, k: int) -> None:
    p, q = laws(seed)
    best = theory.optimal_transport(p, q, k)
    for method, (options, want) in closed_forms(p, q, k).items():
        law = first_round(method, p, q, max_new_tokens=2, **options)
        assert mean_accepted(law) == pytest.approx(want, **EXACT), method
        if method in ("spectr", "specinfer", "naive"):
            assert mean_accepted(law) <= best + 1e-12


def test_a_whole_generation_agrees() -> None:
    """Through `specref.generate`: the first of its rounds, and its law."""
    p, q = laws(0)
    target, draft = Table(lambda _: p, 4), Table(lambda _: q, 4)

    def run(draws: Any) -> tuple[int, ...]:
        report = specref.generate(
            target,
            [0],
            "spectr",
            draft=draft,
            k=2,
            gamma=1,
            temperature=1.0,
            max_new_tokens=2,
            draws=draws,
        )
        return report.rounds[0].accepted[0], *report.tokens

    law = specref.law(run)
    mean = sum(x[0] * mass for x, mass in law.items())
    assert mean == pytest.approx(theory.kseq(p, q, 2)[1], **EXACT)
    out = np.zeros((4, 4))
    for (_, *tokens), mass in law.items():
        out[tuple(tokens)] += mass
    assert out == pytest.approx(np.outer(p, p), **EXACT)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rule_solves_the_same_rho(seed: int) -> None:
    p, q = laws(seed)
    for k in (1, 2, 5):
        rho, rate = theory.kseq(p, q, k)
        mine = solve_rho(torch.tensor(p), torch.tensor(q), k)
        beta = np.minimum(q, p / mine).sum()
        assert 1 - (1 - beta) ** k == pytest.approx(rate, **EXACT)
        if 1e-3 < rate < 1 - 1e-3:  # else every rho is as good
            assert mine == pytest.approx(rho, rel=0, abs=1e-9)
            rest = leftover(torch.tensor(p), torch.tensor(q), mine, k)
            want = theory.kseq_residual(p, q, k)
            assert rest.numpy() == pytest.approx(want, rel=0, abs=1e-8)


# --- trees


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 6, 7])
@pytest.mark.parametrize("nodes,depth", [(2, None), (4, None), (5, 2)])
def test_sequoia_value_is_what_the_tree_yields(
    seed: int, nodes: int, depth: int | None
) -> None:
    p, q = laws(seed, 3)
    some = [theory.recursive_rejection(p, q, k, False) for k in (1, 2, 3)]
    accept = np.maximum(np.diff([0.0, *some]), 0.0)
    levels = None if depth is None else depth + 1
    value, parents = theory.sequoia(accept, nodes + 1, levels)
    # Children that q cannot draw are worth 0 and are not drawn.
    law = first_round(
        "sequoia", p, q, nodes=nodes, depth=depth, accept=accept.tolist()
    )
    assert mean_accepted(law) + 1 == pytest.approx(value, **EXACT)
    chain = theory.expected_tokens(theory.alpha(p, q), len(parents) - 1)
    if depth is None:
        assert value >= chain - 1e-12
