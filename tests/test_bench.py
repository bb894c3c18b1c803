"""Counting, pricing and predicting; the studies on a small scale."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from specref import bench, chain, timing
from specref.api import generate
from specref.lm.export import to_transformers
from specref.meter import CostCurve, Metered
from specref.prompts import Prompt


@pytest.fixture(scope="module")
def target():
    lm = tiny.llama("llama", vocab_size=64).float()
    return SimpleNamespace(
        lm=lm,
        tokenizer=None,
        encode=lambda text, chat=True: [len(text) % 7, 3, 5, 8, 2],
    )


PROMPTS = [
    Prompt(f"p{i}", kind, "here", "CC0-1.0", "x" * i)
    for i, kind in enumerate(("chat", "code", "chat", "code"))
]


def test_meter_counts_tokens_per_pass():
    lm = Metered(tiny.llama())
    cache = lm.new_cache(1, 16)
    for n in (3, 1, 1):
        lm.forward(torch.zeros(1, n, dtype=torch.long), cache)
        cache.keep()
    assert lm.passes == {3: 1, 1: 2}
    assert lm.seconds > 0 and lm.vocab_size == 23


def test_curve_interpolates_and_extends():
    curve = CostCurve({1: 10.0, 3: 20.0, 5: 40.0})
    assert curve(1) == 10 and curve(2) == 15 and curve(4) == 30
    assert curve(7) == 60
    assert curve.total({1: 2, 2: 1}) == 35
    with pytest.raises(ValueError, match="at least two sizes"):
        CostCurve({1: 1.0})


def test_prediction_of_a_chain_is_walltime_with_growing_verification():
    verify = {1: 2.0, 2: 2.2, 3: 2.5}
    got = bench.predict([0.8, 0.5], 2, verify, 0.3)
    tokens = 1 + 0.8 + 0.8 * 0.5
    assert math.isclose(got, tokens * 2.0 / (2 * 0.3 + 2.5))


def test_spread_is_the_median_with_quartiles():
    spread = timing.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.median, spread.q1, spread.q3) == (3.0, 2.0, 4.0)
    assert spread.wild and not timing.Spread(1.0, 0.9, 1.1).wild
    assert timing.Spread.of([7.0]).q3 == 7.0


def test_a_wild_baseline_is_refused():
    tally = bench.Tally()
    for seconds in (1.0, 1.0, 3.0, 9.0):
        tally.reports.append(
            SimpleNamespace(tokens_per_s=1 / seconds)
        )
    with pytest.raises(bench.WildSpread, match="machine is busy"):
        bench.check_quiet(tally)


def test_forecast_is_exact_when_forwards_cost_what_the_curve_says(target):
    """Two equal models: a chain of gamma costs gamma + 1 passes and gives
    gamma + 1 tokens."""
    curves = timing.Curves(sizes=(1, 2, 8), repeats=1)
    flat = CostCurve({1: 1.0, 64: 1.0})
    curves.known[id(target.lm)] = target.lm, flat
    ids = [1, 2, 3]
    own = bench.metered(
        target, ids, "autoregressive", curves, max_new_tokens=12
    )
    assert own.cost == 12 + 1  # and the prompt
    run = bench.metered(
        target, ids, "speculative", curves, draft=target.lm, gamma=3,
        max_new_tokens=12,
    )
    assert run.report.tokens == own.report.tokens
    # Three rounds of four tokens: a prefill, 3 target and 9 draft passes.
    assert run.cost == 1 + 3 + 9
    assert 0.0 < run.overhead < 1.0


def test_rows_have_every_kind_and_say_what_is_lossless(target, monkeypatch):
    monkeypatch.setattr(timing, "WILD", 1e9)
    plan = {
        "autoregressive": ("autoregressive", {}),
        "copy": ("speculative", {"draft": target.lm, "gamma": 2}),
        "loose": ("lenience", {"draft": target.lm, "gamma": 2}),
    }
    curves = timing.Curves(sizes=(1, 2, 8), repeats=1)
    peers = {"peer": lambda ids: generate(
        target, ids, "autoregressive", max_new_tokens=8).tokens}
    tallies = bench.run_all(
        target, plan, PROMPTS, peers=peers, max_new_tokens=8, curves=curves
    )
    table = bench.rows(tallies, plan, "peer")
    assert {(r["method"], r["kind"]) for r in table} == {
        (m, k) for m in plan for k in ("all", "chat", "code")
    }
    for row in table:
        assert row["lossless"] == (row["method"] != "loose")
        assert row["identical_to_greedy"]
        assert row["tokens_per_s"] > 0 and row["predicted"] > 0
    best = next(r for r in table if r["method"] == "copy")
    assert best["tau"] > 2.5


def test_chain_study(target):
    out = chain.study(target, PROMPTS[:2], target.lm, 3, 12)
    assert [r["gamma"] for r in out["rows"]] == [1, 2, 3]
    assert out["acceptance_by_depth"] == [1.0, 1.0, 1.0]
    for row in out["rows"]:
        assert row["ratio"] == pytest.approx(
            row["measured"] / row["predicted"], rel=1e-2
        )


def test_export_has_the_same_logits():
    lm = tiny.llama("llama3")
    ids = torch.tensor([[3, 0, 7, 7, 1]])
    with torch.inference_mode():
        want = lm.forward(ids).logits
        got = to_transformers(lm)(ids).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="plain Llama layers"):
        to_transformers(tiny.llama("qwen2"))


def test_export_of_a_reduced_vocabulary(target):
    from dataclasses import replace

    from specref.lm.drafts import skeleton

    words = torch.tensor([0, 5, 9, 63])
    config = replace(target.lm.config, num_hidden_layers=1)
    draft = skeleton(config, words, target.lm)
    draft.layers[0].load_state_dict(target.lm.layers[0].state_dict())
    draft.norm.load_state_dict(target.lm.norm.state_dict())
    ids = torch.tensor([[3, 0, 7]])
    with torch.inference_mode():
        want = draft.forward(ids).logits
        got = to_transformers(draft)(ids).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert int((got[0, 0] == -torch.inf).sum()) == 60
