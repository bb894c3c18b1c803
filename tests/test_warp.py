"""Warps: against transformers' warpers, at ties, at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from cases import plain_warp
from transformers import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specref.warp import BLOCK, Sampling, Warp

SETTINGS = [
    (t, k, p)
    for t in (0.3, 1.0, 1.7)
    for k in (None, 1, 3, 40, 100)
    for p in (None, 0.2, 0.9, 1.0)
]


def theirs(logits, temperature, top_k, top_p):
    """transformers' warpers in its own order."""
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k is not None else []
    chain += [TopPLogitsWarper(top_p)] if top_p not in (None, 1.0) else []
    for warper in chain:
        logits = warper(None, logits)
    return logits.softmax(-1)


def random_logits(rows=20, vocab=50, seed=0):
    source = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_equals_transformers(temperature, top_k, top_p):
    logits = random_logits()
    want = theirs(logits, temperature, top_k, top_p)
    got = Warp(temperature, top_k, top_p)(logits)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)
    assert torch.equal(got > 0, want > 0)


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_equals_the_definition(temperature, top_k, top_p):
    warp = Warp(temperature, top_k, top_p)
    logits = random_logits(5, 12, seed=1)
    logits[0, :4] = -torch.inf
    logits[1:] = logits[1:].round()  # ties
    for row in logits:
        want = plain_warp(row.tolist(), warp)
        assert warp(row).tolist() == pytest.approx(want, rel=1e-12, abs=0)


@pytest.mark.parametrize("size", [3 * BLOCK, 10 * BLOCK + 7])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 9.0])
@pytest.mark.parametrize("top_k", [None, 200])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999, 1 - 1e-12])
def test_long_rows_have_their_own_way(size, temperature, top_k, top_p):
    """Certain, generic and nearly flat laws, on whole and part blocks."""
    logits = random_logits(5, size, seed=2)
    logits[3, size // 2 :] = -torch.inf
    warp = Warp(temperature, top_k, top_p)
    want = theirs(logits, temperature, top_k, top_p)
    got = warp(logits.reshape(5, 1, size))[:, 0]
    assert torch.equal(got > 0, want > 0)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)
    ties = logits.round()
    for row, law in zip(ties, warp(ties), strict=True):
        want = plain_warp(row.tolist(), warp)
        assert law.tolist() == pytest.approx(want, rel=1e-12, abs=0)
        assert torch.equal(law, warp(row))


def test_nan_in_a_long_row_stays_visible():
    logits = random_logits(2, 4 * BLOCK)
    logits[0, 5] = math.nan
    got = Warp(top_p=0.9)(logits)
    assert bool(got[0].isnan().any()) and not bool(got[1].isnan().any())


def test_ties_at_the_edge_of_top_k_are_kept_as_in_transformers():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    got = Warp(top_k=2)(logits)
    assert (got > 0).tolist() == [[True, True, True, True, False]]
    assert torch.equal(got, theirs(logits, 1.0, 2, None))


def test_ties_inside_top_p_differ_from_transformers():
    """We keep the lower index, transformers the higher one: it sorts
    upwards and drops from the front.  Both keep two of the three."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    assert (Warp(top_p=0.6)(logits) > 0).tolist() == [[True, True, False]]
    other = theirs(logits, 1.0, None, 0.6) > 0
    assert other.tolist() == [[True, False, True]]


def test_top_p_keeps_the_token_that_reaches_it_and_no_more():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).double().log()
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3)):
        got = Warp(top_p=top_p)(logits)
        assert int((got > 0).sum()) == kept
        assert float(got.sum()) == pytest.approx(1.0, abs=1e-15)


def test_impossible_tokens_stay_impossible():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0])
    for warp in (Warp(), Warp(0.5, 3), Warp(2.0, None, 0.99), Warp(0.0)):
        assert (warp(logits)[[0, 2]] == 0).all()
        assert float(warp(logits).sum()) == pytest.approx(1.0, abs=1e-6)


def test_temperature_zero_is_the_first_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])
    assert Warp(0.0)(logits).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert Warp(0.0).greedy and not Warp(1e-3).greedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_a_law_that_sums_to_one(dtype):
    logits = random_logits(4, 20_000).to(dtype)
    for warp in (Warp(), Warp(0.7, 50), Warp(1.0, None, 0.9)):
        got = warp(logits)
        assert got.dtype == torch.float32
        assert (got.double().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": math.inf}, "temperature must be .* finite"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_settings_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        Warp(**options)


def test_processors_run_in_order_on_each_true_prefix():
    seen = []

    def add(ids, scores):
        seen.append(ids.tolist())
        return scores + ids.shape[1]

    def double(ids, scores):
        scores *= 2  # in place, as some of transformers' do
        return scores

    logits = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    before = logits.clone()
    sampling = Sampling(Warp(), (add, double))
    got = sampling.scores(logits, [[5], [5, 6]])
    assert seen == [[[5]], [[5, 6]]]
    assert got.tolist() == [[2.0, 4.0], [8.0, 10.0]]
    assert torch.equal(logits, before)
    assert torch.equal(
        sampling.law(logits, [[5], [5, 6]]), got.softmax(-1)
    )


def test_without_processors_prefixes_are_not_read():
    logits = random_logits(2, 4)
    assert Sampling().scores(logits, None) is logits
