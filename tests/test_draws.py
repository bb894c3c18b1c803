"""Draws: reproducible, independent, never an impossible outcome."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import GENERIC, truth

import specref
from specref.draws import (
    Boundary,
    Enumerate,
    Recorded,
    Recorder,
    Seeded,
    inverse_cdf,
)
from specref.lm import Table

LAW = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
PINNED = {
    (0, 0): [0.011546754286331562, 0.24154919656271812, 0.11142585551493822],
    (7, 2): [0.36654848046680033, 0.39989196903035706, 0.8479983815736046],
}
SOURCES = [Seeded(0), Recorded([0] * 9), Enumerate()]


# --- seeded ---------------------------------------------------------------


def test_philox_values_are_pinned():
    """Changing these changes every sampled output of the library."""
    assert Seeded(0).uniform((3,)).tolist() == PINNED[0, 0]
    assert Seeded(7, 2).uniform((3,)).tolist() == PINNED[7, 2]


def test_uniforms_are_the_top_53_bits():
    raw = np.random.Philox(key=np.array([3, 1], np.uint64)).random_raw(100)
    want = [(int(x) >> 11) / 2**53 for x in raw]
    assert Seeded(3, 1).uniform((100,)).tolist() == want
    assert all(0.0 <= x < 1.0 for x in want)


def test_shape_does_not_matter():
    assert torch.equal(
        Seeded(1).uniform((2, 3)).flatten(), Seeded(1).uniform((6,))
    )
    assert Seeded(1).uniform(()).shape == ()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_thread_count_does_not_matter(threads):
    law = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = Seeded(5).categorical(law.expand(4, -1)).tolist()
    finally:
        torch.set_num_threads(before)
    assert got == Seeded(5).categorical(law.expand(4, -1)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_does_not_matter(dtype):
    """A law that both types hold exactly gives the same tokens."""
    law = torch.tensor([0.5, 0.25, 0.0, 0.25]).expand(200, -1)
    same = Seeded(2).categorical(law.double()).tolist()
    assert Seeded(2).categorical(law.to(dtype)).tolist() == same
    coin = torch.full((200,), 0.375)
    same = Seeded(2).bernoulli(coin.double()).tolist()
    assert Seeded(2).bernoulli(coin.to(dtype)).tolist() == same


def test_rows_have_streams_of_their_own():
    base = Seeded(4)
    rows = [base.row(b).uniform((1000,)) for b in range(3)]
    solo = [Seeded(4, b).uniform((1000,)) for b in range(3)]
    for row, alone in zip(rows, solo, strict=True):
        assert torch.equal(row, alone)
    both = torch.corrcoef(torch.stack(rows)) - torch.eye(3)
    assert both.abs().max() < 4 / math.sqrt(1000)  # four deviations
    assert not set(rows[0].tolist()) & set(rows[1].tolist())


@pytest.mark.parametrize("seed, stream", [(-1, 0), (0, -1), (2**64, 0)])
def test_seed_outside_its_range(seed, stream):
    with pytest.raises(ValueError, match="seed and stream must be"):
        Seeded(seed, stream)


# --- inversion ------------------------------------------------------------

EDGES = [
    [0.0, 1.0, 0.0],
    [1.0, 0.0, 0.0],
    [0.0, 0.0, 1.0],
    [0.1] * 10 + [0.0] * 3,
    [0.0, 1e-300, 1.0, 0.0],
    [1e-17, 1.0, 1e-17, 0.0],
    [1 / 3] * 3 + [0.0],
    [0.0, 5e-324, 0.0],
]


@pytest.mark.parametrize("law", EDGES)
def test_no_outcome_of_probability_zero(law):
    prob = torch.tensor(law, dtype=torch.float64)
    steps = prob.cumsum(0) / prob.sum()
    near = [f(x) for x in steps.tolist() for f in (below, above, float)]
    marks = [u for u in (0.0, 5e-324, 0.5, 1 - 2**-53, *near) if 0 <= u < 1]
    for u in marks:
        pick = inverse_cdf(prob, torch.tensor(u, dtype=torch.float64))
        assert prob[pick] > 0, u


def below(x: float) -> float:
    return math.nextafter(x, 0.0)


def above(x: float) -> float:
    return math.nextafter(x, 2.0)


def test_inversion_by_hand():
    marks = torch.tensor([0.0, 0.49, 0.5, 0.79, 0.8, 0.99]).double()
    got = inverse_cdf(LAW.expand(6, -1), marks).tolist()
    assert got == [0, 0, 2, 2, 3, 3]
    assert inverse_cdf(4 * LAW.expand(6, -1), marks).tolist() == got


def test_frequencies():
    """100,000 draws; chi-square with 2 degrees of freedom below 13.8,
    which a sound generator exceeds with probability 0.001."""
    n = 100_000
    got = Seeded(11).categorical(LAW.expand(n, -1)).bincount(minlength=4)
    assert got[1] == 0
    want = LAW[LAW > 0] * n
    assert float(((got[LAW > 0] - want) ** 2 / want).sum()) < 13.8


# --- what is refused ------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("draws", SOURCES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize(
    "law", [[NAN, 1.0], [INF, 1.0], [-0.1, 1.1], [0.0, 0.0], [NAN, NAN]]
)
def test_what_is_no_law(draws, law):
    with pytest.raises(ValueError, match="^prob must"):
        draws.categorical(torch.tensor(law))


@pytest.mark.parametrize("draws", SOURCES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("prob", [NAN, -0.1, 1.1, INF])
def test_what_is_no_coin(draws, prob):
    with pytest.raises(ValueError, match="^prob must"):
        draws.bernoulli(torch.tensor([0.5, prob]))


# --- tapes ----------------------------------------------------------------


def program(draws) -> list[int]:
    coins = draws.bernoulli(torch.tensor([0.3, 0.6, 0.9])).tolist()
    picks = draws.categorical(LAW.expand(2, 3, -1)).flatten().tolist()
    draws.checkpoint(("here",))
    return [*map(int, coins), *picks]


def test_tape_round_trip():
    recorder = Recorder(Seeded(8))
    out = program(recorder)
    assert recorder.tape == out == program(Seeded(8))
    assert program(Recorded(recorder.tape)) == out


def test_tape_of_a_batch():
    """Rows keep their streams under the recorder, and share its tape."""
    target, draft = Table(GENERIC.p, 3), Table(GENERIC.q, 3)
    options = {"draft": draft, "gamma": 2, "temperature": 1.0}
    options |= {"max_new_tokens": 8}
    prompts = [[1], [2, 0]]

    def decode(draws):
        reports = specref.generate(
            target, prompts, "speculative", draws=draws, **options
        )
        return [r.tokens for r in reports]

    recorder = Recorder(Seeded(3))
    out = decode(recorder)
    assert out == decode(Seeded(3))
    assert decode(Recorded(recorder.tape)) == out


def test_tape_that_ends_early():
    with pytest.raises(ValueError, match="tape has 2 outcomes"):
        program(Recorded([0, 1]))


@pytest.mark.parametrize("outcome", [1, 4, -1])
def test_tape_with_an_impossible_outcome(outcome):
    with pytest.raises(ValueError, match=f"outcome 0 is {outcome}"):
        Recorded([outcome]).categorical(LAW)


# --- enumeration of one branch --------------------------------------------


def test_a_branch_says_what_it_took_and_what_is_left():
    draws = Enumerate([1])
    assert draws.bernoulli(torch.tensor(0.25)).item() is True
    assert draws.categorical(2 * LAW).item() == 0
    assert draws.taken == [1, 0]
    assert draws.probs == [0.25, 0.5]
    assert draws.open == [[], [2, 3]]
    assert draws.row(5) is draws


def test_a_branch_stops_at_its_checkpoint():
    draws = Enumerate(skip=1)
    draws.checkpoint(("one",))
    with pytest.raises(Boundary) as stop:
        draws.checkpoint(("two",))
    assert stop.value.key == ("two",)
    Enumerate().checkpoint(("never",))


def test_a_branch_with_too_many_draws():
    draws = Enumerate(max_draws=3)
    with pytest.raises(RuntimeError, match="more than 3 draws"):
        draws.categorical(LAW.expand(4, -1))


def test_a_replay_that_is_none():
    with pytest.raises(RuntimeError, match="deterministic given its draws"):
        Enumerate([1]).categorical(LAW)


def test_shapes_are_kept():
    for draws in (Seeded(0), Enumerate(), Recorded([0] * 99)):
        assert draws.bernoulli(torch.zeros(2, 3)).shape == (2, 3)
        assert draws.categorical(LAW.expand(2, 3, -1)).shape == (2, 3)
        assert draws.categorical(LAW).dtype == torch.long


def test_joint_sample_of_a_whole_decoder():
    """2,000 runs at temperature 1; chi-square over all outputs of two
    tokens (8 degrees of freedom) below 26.1: confidence 0.999."""
    case, n = GENERIC.short(2), 2_000
    target, draft = Table(case.p, 3), Table(case.q, 3)
    # One batch of many rows: row b is the run on stream b.
    reports = specref.generate(
        target,
        [case.prompt] * n,
        "speculative",
        draft=draft,
        gamma=1,
        temperature=1.0,
        max_new_tokens=2,
        seed=1,
    )
    counts: dict[tuple, int] = {}
    for r in reports:
        counts[tuple(r.tokens)] = counts.get(tuple(r.tokens), 0) + 1
    law = truth(case)
    assert len(law) == 9 and set(counts) <= set(law)
    score = sum(
        (counts.get(x, 0) - n * p) ** 2 / (n * p) for x, p in law.items()
    )
    assert score < 26.1
