"""EAGLE-1, EAGLE-3 and MTP: in the loop as in training, and lossless."""

from __future__ import annotations

import every
import heads
import pytest
import tiny
import torch
from cases import TOLERANCE

from specref import rules
from specref.heads import pairs
from specref.heads.base import Head
from specref.heads.eagle import Eagle
from specref.heads.eagle3 import Eagle3, default_taps
from specref.heads.files import load_head, save_head
from specref.heads.mtp import MTP
from specref.tree import DETERMINISTIC

KINDS = {
    "eagle": lambda lm, words: Eagle(lm, words, layers=2),
    "eagle3": lambda lm, words: Eagle3(lm, words, taps=(0, 1, 2)),
    "mtp": MTP,
}


def made(kind: str, lm, words=None) -> Head:
    words = torch.arange(lm.vocab_size) if words is None else words
    return heads.randomised(KINDS[kind](lm, words))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_says_what_training_says(kind):
    lm = tiny.llama()
    head = made(kind, lm, torch.arange(20).flip(0))
    assert heads.rollout_gap(head, lm) < 1e-10
    assert heads.rollout_gap(head, lm, (4, 7)) < 1e-10


CASES = [
    (kind, policy, sampling)
    for kind in KINDS
    for policy in heads.POLICIES
    for sampling in heads.SAMPLINGS
]


@pytest.mark.parametrize("kind, policy, sampling", CASES)
def test_law(kind, policy, sampling):
    lm = heads.target()
    # One word is missing: the draft cannot say what the target can.
    head = made(kind, lm, torch.tensor([2, 0]))
    rule = rules.get("recursive")
    new = 3 if policy == "bushy-iid" else 4
    far = heads.off(
        lm, head, heads.POLICIES[policy], rule, heads.SAMPLINGS[sampling],
        new,
    )
    assert far <= TOLERANCE


@pytest.mark.parametrize(
    "rule, policy",
    [
        ("tokenwise", "chain-iid"),
        ("block", "chain-iid"),
        ("traversal", "bushy-without_replacement"),
        ("naive", "dynamic"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_law_of_other_rules_with_an_end(kind, rule, policy):
    lm = heads.target()
    far = heads.off(
        lm, made(kind, lm), heads.POLICIES[policy], rules.get(rule),
        heads.SAMPLINGS["T=1"], eos=frozenset({2}),
    )
    assert far <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_biased_pairs_are_refused_or_differ(kind):
    """Top-k children judged by p/q are refused by the rule itself."""
    lm = heads.target()
    policy = heads.POLICIES["bushy-topk"]
    assert policy().kind == DETERMINISTIC
    with pytest.raises(ValueError, match="deterministic"):
        heads.head_law(
            lm, made(kind, lm), policy, rules.get("tokenwise"),
            heads.SAMPLINGS["T=1"],
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["bushy-topk", "dynamic"])
def test_greedy_rows_of_a_batch(kind, policy):
    lm = tiny.llama()
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8]]
    got = heads.greedy_rows(
        lm, made(kind, lm), heads.POLICIES[policy], rules.get("recursive"),
        prompts, 12,
    )
    assert got == [every.greedy_reference(lm, p, 12) for p in prompts]


# What a wrong state would say: each must differ from the rollout.


def keeps_guesses(self, fresh):
    if self.cache.pending:  # the first guess stays as if it were verified
        self.cache.keep([[0] for _ in fresh])
    self.guesses = self.guesses[:, :0]
    size = [len(f.tokens) for f in fresh]
    out = self._feed(fresh, max(size))
    for b, n in enumerate(size):
        self.root[b] = out[b, n - 1]
    return self.head.logits(self.root)


def own_feature_late(self, tokens, parents):
    """Each node reads the root's feature instead of its parent's."""
    known = self.root[:, None].expand(-1, tokens.shape[1], -1)
    out = self._step(tokens, known, parents)
    self.guesses = torch.cat((self.guesses, out), 1)
    return self.head.logits(out)


def blind_to_parents(self, tokens, parents):
    """Siblings see each other: a chain in the place of a tree."""
    spots = parents.clamp(min=-1) + 1
    known = torch.cat((self.root[:, None], self.guesses), 1)
    pick = spots[..., None].expand(-1, -1, known.shape[-1])
    out = self._step(tokens, known.gather(1, pick), None)
    self.guesses = torch.cat((self.guesses, out), 1)
    return self.head.logits(out)


def last_slot(self, fresh):
    """The padded last entry instead of the row's own newest pair."""
    if self.cache.pending:
        self.cache.keep([[] for _ in fresh])
    self.guesses = self.guesses[:, :0]
    out = self._feed(fresh, max(len(f.tokens) for f in fresh))
    self.root[:] = out[:, -1]
    return self.head.logits(self.root)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("begin", keeps_guesses),
        ("extend", own_feature_late),
        ("extend", blind_to_parents),
        ("begin", last_slot),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_state_is_caught(kind, name, broken, monkeypatch):
    lm = tiny.llama()
    head = made(kind, lm)
    monkeypatch.setattr(pairs.PairState, name, broken)

    def gap() -> float:
        # Portions of different sizes, so that one row is padded.
        return heads.rollout_gap(head, lm, (6, 4)) if name != "begin" else (
            padded_gap(head, lm)
        )

    assert gap() > 1e-3


def padded_gap(head: Head, lm) -> float:
    """As `heads.rollout_gap`, the rows' new pairs differing in number."""
    tokens = torch.arange(24).view(2, 12) % lm.vocab_size
    text = heads.features(lm, tokens, head.taps)
    with torch.inference_mode():
        state = head.state(2, 40)
        state.begin([heads.pairs(text, b, 2) for b in range(2)])
        state.extend(torch.tensor([[0], [1]]), torch.tensor([[-1], [-1]]))
        rest = []
        for b, n in enumerate((6, 4)):
            whole = heads.pairs(text, b, n)
            taps = tuple(t[2:] for t in whole.taps)
            rest.append(
                type(whole)(whole.hidden[2:], taps, whole.tokens[2:])
            )
        said = state.begin(rest)
        roll = head.rollout(text, 1)[0]
        want = torch.stack([head.logits(roll[b, n - 1])
                            for b, n in enumerate((6, 4))])
    return float((said - want).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_state_passes_where_broken_ones_fail(kind):
    lm = tiny.llama()
    assert padded_gap(made(kind, lm), lm) < 1e-10


def test_folding_scales_changes_nothing():
    lm = tiny.llama()
    words = torch.arange(20)
    head = heads.randomised(Eagle(lm, words, scales=(7.5, 0.5)))
    text = heads.features(lm, torch.arange(10)[None] % 23)
    with torch.inference_mode():
        before = head.rollout(text, 2)
        head.fold()
        after = head.rollout(text, 2)
    assert head.scales == (1.0, 1.0)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_merging_the_mix_and_folding_the_taps_change_nothing(tmp_path):
    lm = tiny.llama()
    options = {"taps": (0, 1, 2), "mix": True, "scales": (0.5, 2.0, 3.0)}
    head = heads.randomised(Eagle3(lm, torch.arange(20), **options))
    assert "mix.weight" in head.trained() and "head.weight" not in (
        head.trained()
    )
    text = heads.features(lm, torch.arange(10)[None] % 23, head.taps)
    with torch.inference_mode():
        before = head.project(head.rollout(text, 2)[1])
    file = tmp_path / "head-x.safetensors"
    save_head(head, file, "eagle3", options)
    with torch.inference_mode():
        folded = head.project(head.rollout(text, 2)[1])
    head.merge()
    with torch.inference_mode():
        merged = head.project(head.rollout(text, 2)[1])
    for after in (folded, merged):
        torch.testing.assert_close(before, after, atol=1e-12, rtol=0)
    assert head.own_head and "head.weight" in head.trained()
    back = load_head(file, lm)
    assert back.mix is None and back.scales is None and back.own_head
    gap = (back.head.weight - head.head.weight).abs().max()
    assert gap < 0.05  # bf16


def test_truncation_keeps_the_most_frequent_words():
    lm = tiny.llama()
    head = made("mtp", lm, torch.tensor([5, 1, 9, 7]))
    out = torch.ones(1, head.width, dtype=torch.float64)
    whole = head.logits(out)
    part = head.truncate(2).logits(out)
    assert torch.isfinite(part).nonzero()[:, 1].tolist() == [1, 5]
    torch.testing.assert_close(part[:, [1, 5]], whole[:, [1, 5]])
    for count in (0, 3):
        with pytest.raises(ValueError, match="vocab must be in"):
            head.truncate(count)


def test_bad_arguments_are_named():
    lm = tiny.llama()
    with pytest.raises(ValueError, match="words"):
        MTP(lm, torch.tensor([1, 99]))
    with pytest.raises(ValueError, match="words"):
        MTP(lm, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="taps"):
        Eagle3(lm, torch.arange(4))  # three layers: no published choice
    with pytest.raises(ValueError, match="taps"):
        Eagle3(lm, torch.arange(4), taps=(0, 4))
    with pytest.raises(ValueError, match="layers"):
        Eagle(lm, torch.arange(4), layers=0)
    assert default_taps(30) == (2, 15, 27)
