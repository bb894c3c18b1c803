"""Drafters: caches that never go stale, and rules that others defined.

transformers' own candidate generators and schedules are run beside ours.
"""

from __future__ import annotations

import random

import every
import pytest
import tiny
import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    PromptLookupCandidateGenerator,
)

import specref
from specref.draft import measure
from specref.draft.base import Accepted
from specref.draft.dynamic import Dynamic, prune
from specref.draft.early_exit import EarlyExit
from specref.draft.grow import Sprout
from specref.draft.lengths import Length, schedule
from specref.draft.lookup import PromptLookup
from specref.lm import Table
from specref.tree import EMPTY, ROOT, chain
from specref.warp import Sampling, Warp

PROMPT = [5, 9, 0, 4, 1, 1]
PROMPTS = [PROMPT, [7], [2, 0, 0]]
CHAINS = {
    "speculative": {"gamma": 3},
    "block": {"gamma": 2},
    "assisted": {"gamma": 2},
    "spectr": {"k": 2, "gamma": 2},
    "rsd": {"widths": (2, 2)},
    "specinfer": {"widths": (3, 1, 1)},
    "topk_tree": {"widths": (2, 1)},
    "dynamic": {"nodes": 5, "depth": 3, "width": 2},
}


@pytest.fixture(scope="module")
def target():
    return tiny.llama()


# Caches


class Spy:
    """An `LM` whose caches can be looked at after each round."""

    def __init__(self, lm):
        self.lm, self.vocab_size, self.device = lm, lm.vocab_size, lm.device
        self.caches = []

    def new_cache(self, batch, capacity):
        self.caches.append(self.lm.new_cache(batch, capacity))
        return self.caches[-1]

    def forward(self, *args, **kwargs):
        return self.lm.forward(*args, **kwargs)


def assert_fresh(spy, rows):
    """Every committed slot holds what a prefill of the row would."""
    cache = spy.caches[-1]
    assert cache.pending == 0
    for b, row in rows.items():
        n = cache.length[b]
        assert n < len(row)  # the last token is fed in the next round
        if not n:
            continue
        fresh = spy.lm.new_cache(1, n)
        spy.lm.forward(torch.tensor([row[:n]]), fresh)
        for name in ("k", "v"):
            torch.testing.assert_close(
                getattr(cache, name)[:, b, :, :n],
                getattr(fresh, name)[:, 0, :, :n],
            )


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("perfect", [False, True])
def test_after_each_round_both_caches_equal_a_prefill(
    name, temperature, perfect, target
):
    """Chains and trees, ragged rows, rejections and full acceptances."""
    both = Spy(target), Spy(target if perfect else every.draft())
    rows, levels = [list(p) for p in PROMPTS], set()
    for r in specref.stream(
        both[0],
        PROMPTS,
        name,
        draft=both[1],
        max_new_tokens=11,
        temperature=temperature,
        eos=[20],
        **CHAINS[name],
    ):
        for row, tokens in zip(rows, r.tokens, strict=True):
            row += tokens
        with torch.inference_mode():
            going = {
                b: row
                for b, row in enumerate(rows)
                if row[-1] != 20 and len(row) < len(PROMPTS[b]) + 11
            }
            for spy in both:
                assert_fresh(spy, going)
        for b, tree in enumerate(r.trees):
            if len(tree):
                levels.add(r.accepted[b] == tree.height)
    # Full acceptance happened, and with an imperfect draft the other too.
    assert True in levels
    assert perfect or False in levels


def test_a_stale_draft_cache_would_be_seen(target):
    """The check above on a drafter that forgets to roll back."""
    spy = Spy(target)
    with torch.inference_mode():
        cache = spy.new_cache(1, 16)
        target.forward(torch.tensor([[5, 9, 0]]), cache)
        cache.keep()
        with pytest.raises(AssertionError):
            assert_fresh(spy, {0: [5, 9, 1, 4]})


def test_a_drafter_can_be_used_again(target):
    """State of one run must not leak into the next."""
    draft = every.draft()
    first = specref.generate(
        target, PROMPT, "speculative", draft=draft, max_new_tokens=12
    )
    specref.generate(
        target, [3, 3, 3], "speculative", draft=draft, max_new_tokens=5
    )
    again = specref.generate(
        target, PROMPT, "speculative", draft=draft, max_new_tokens=12
    )
    assert [r.trees for r in first.rounds] == [r.trees for r in again.rounds]


def test_a_long_prompt_is_prefilled_by_the_draft_too(target):
    prompt = [(7 * i + i // 5) % 23 for i in range(100)]
    for draft in (every.draft(), target):
        got = specref.generate(
            target, prompt, "speculative", draft=draft, max_new_tokens=10
        )
        assert got.tokens == every.greedy_reference(target, prompt, 10)
    assert got.tau == 5.0


# Prompt lookup


def test_lookup_equals_transformers_on_random_strings():
    """On 600 strings, with and without EOS.

    Intended differences: transformers drops an EOS that it finds and all
    behind it, ours keeps the EOS itself, which is a good guess; and
    transformers proposes nothing when the EOS comes first.
    """
    source = random.Random(0)
    hits = 0
    for _ in range(600):
        vocab = source.choice([2, 3, 5, 9])
        row = [source.randrange(vocab) for _ in range(source.randint(1, 24))]
        ngram, gamma = source.randint(1, 4), source.randint(1, 6)
        room = source.randint(1, 8)
        ends = source.choice([[], [1], [0, 2]])
        theirs = PromptLookupCandidateGenerator(
            eos_token_id=torch.tensor(ends) if ends else None,
            num_output_tokens=gamma,
            max_matching_ngram_size=ngram,
            max_length=len(row) + room + 1,
        )
        want = theirs.get_candidates(torch.tensor([row]))[0][0].tolist()
        want = want[len(row) :][:room]
        ours = PromptLookup(gamma, ngram)
        ours.start([row], 99, Sampling(), frozenset(ends))
        tree = ours.propose([row], [room], [None])[0]
        got = list(tree.tokens)
        if got and got[-1] in ends:
            got = got[:-1]
        assert got == want
        assert tree.is_chain
        hits += bool(want)
    assert hits > 200


def test_lookup_takes_the_longest_suffix_and_its_leftmost_place():
    find = PromptLookup(4, 3).find
    assert find([1, 2, 3, 9, 9, 2, 3, 8, 1, 2, 3]) == [9, 9, 2, 3, 8, 1, 2, 3]
    assert find([5, 3, 6, 4, 3]) == [6, 4, 3]
    assert find([1, 1, 1]) == [1]  # an overlap with the suffix itself
    assert find([1, 2, 3]) == []
    assert find([1]) == []


def test_lookup_is_cut_by_room_and_keeps_one_eos():
    ours = PromptLookup(6, 2)
    row = [1, 2, 5, 6, 0, 7, 1, 2]
    ours.start([row], 99, Sampling(), frozenset([0]))
    assert ours.propose([row], [9], [None])[0].tokens == (5, 6, 0)
    assert ours.propose([row], [1], [None])[0].tokens == (5,)
    assert ours.propose([row], [0], [None])[0] == EMPTY
    with pytest.raises(ValueError, match="ngram must be at least 1"):
        PromptLookup(3, 0)


# Draft lengths


def news(drafted, accepted):
    tree = chain([0] * drafted)
    return [Accepted(tree, tuple(range(accepted)), (0,) * (accepted + 1))]


@pytest.mark.parametrize("name", ["heuristic", "heuristic_transient"])
def test_schedules_equal_transformers(name):
    """The same acceptances give the same lengths, round after round."""
    model = tiny.hf_model()
    model.generation_config = GenerationConfig(
        num_assistant_tokens=5,
        num_assistant_tokens_schedule=name,
        assistant_confidence_threshold=0.0,
    )
    theirs = AssistedCandidateGenerator(
        torch.tensor([PROMPT]), model, GenerationConfig(max_length=99), {}
    )
    ours, source = schedule(name, 5, 10**6), random.Random(3)
    ours.start(1)
    lengths = set()
    for _ in range(200):
        gamma = ours.now[0]
        assert theirs.num_assistant_tokens == gamma
        drafted = gamma if source.random() < 0.8 else source.randint(1, gamma)
        accepted = drafted if source.random() < 0.4 else 0
        theirs.update_candidate_strategy(
            None, torch.zeros(1, drafted + 1, 1), accepted
        )
        ours.update(news(drafted, accepted))
        lengths.add(gamma)
    assert len(lengths) > 10


def test_heuristic_persists_and_transient_does_not():
    for name, later in (("heuristic", 9), ("heuristic_transient", 5)):
        length = schedule(name, 5, 20)
        length.start(1)
        length.update(news(5, 5))
        length.update(news(7, 7))
        length.start(1)
        assert length.now == [later]
    constant = schedule("constant", 5, 20)
    constant.start(2)
    constant.update([*news(5, 5), *news(5, 0)])
    assert constant.now == [5, 5]


def test_a_shared_length_goes_on_between_calls(target):
    """``schedule`` takes a `Length`; a name starts anew in each call."""
    length = Length(1, 20, transient=False)
    ask = {"draft": target, "max_new_tokens": 9, "stop_below": None}
    specref.generate(target, PROMPT, "assisted", schedule=length, **ask)
    assert length.now[0] > 1
    before = length.now[0]
    first = next(
        specref.stream(target, PROMPT, "assisted", schedule=length, **ask)
    )
    assert len(first.trees[0]) == min(before, 8)
    for _ in range(2):
        first = next(
            specref.stream(
                target, PROMPT, "assisted", schedule="heuristic", **ask
            )
        )
        assert len(first.trees[0]) == 5


def test_lengths_are_per_row_and_bounded():
    length = Length(2, 4)
    length.start(3)
    length.update([*news(2, 2), *news(2, 1), None])
    assert length.now == [4, 1, 2]
    length.update([*news(4, 4), *news(1, 0), *news(0, 0)])
    assert length.now == [4, 1, 2]
    for bad in (0, 9):
        with pytest.raises(ValueError, match=r"gamma must be in \[1, 8\]"):
            Length(bad, 8)
    with pytest.raises(ValueError, match="schedule must be one of"):
        schedule("linear", 2, 4)


def test_assisted_drafts_as_long_as_transformers(target):
    """The whole decoding beside transformers' assisted generation: the
    assistant is asked for the same number of tokens in every round."""
    model, near = tiny.hf_model(), every.near()
    near.generation_config.update(
        num_assistant_tokens=3,
        num_assistant_tokens_schedule="heuristic_transient",
        assistant_confidence_threshold=0.0,
    )
    sizes = []
    hook = model.register_forward_hook(
        lambda *a: sizes.append(a[-1].logits.shape[1]), with_kwargs=False
    )
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids,
        assistant_model=near,
        max_new_tokens=40,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
        pad_token_id=22,
    )
    hook.remove()
    got = specref.generate(
        target,
        PROMPT,
        "assisted",
        draft=every.draft(),
        gamma=3,
        stop_below=None,
        max_new_tokens=40,
    )
    assert got.tokens == out[0, 6:].tolist()
    theirs = [n - 1 for n in sizes]
    assert [len(r.trees[0]) for r in got.rounds] == theirs
    assert len(set(theirs)) > 2


# Early exit


def test_early_exit_equals_a_model_cut_by_hand():
    """The model without its last layers, norm and head as they are."""
    cut = tiny.hf_model()
    del cut.model.layers[2:]
    cut.config.num_hidden_layers = 2
    from specref.lm.weights import from_transformers

    by_hand = from_transformers(cut)
    whole = tiny.llama()
    for temperature in (0.0, 1.0):
        ask = {"max_new_tokens": 20, "gamma": 3, "temperature": temperature}
        a = specref.generate(whole, PROMPTS, "early_exit", layers=2, **ask)
        b = specref.generate(
            whole, PROMPTS, "speculative", draft=by_hand, **ask
        )
        for x, y in zip(a, b, strict=True):
            assert x.tokens == y.tokens
            for r, s in zip(x.rounds, y.rounds, strict=True):
                assert r.trees[x.row].tokens == s.trees[x.row].tokens
                assert r.accepted == s.accepted


def test_early_exit_refuses_what_it_cannot_cut(target):
    with pytest.raises(ValueError, match=r"layers must be in \[1, 2\], got 3"):
        EarlyExit(target, 3)
    with pytest.raises(ValueError, match=r"layers must be in \[1, 2\], got 0"):
        EarlyExit(target, 0)
    with pytest.raises(TypeError, match="needs a specref Llama"):
        EarlyExit(Table(lambda c: [0.5, 0.5], 2), 1)


# Dynamic trees


class Flat:
    """A stepper whose every law is the same ``[V]`` logits."""

    def __init__(self, logits):
        self.logits, self.pending = torch.tensor(logits), 0

    def extend(self, tokens, parents):
        self.pending += tokens.shape[1]
        return self.logits.expand(*tokens.shape, -1)


def grow(policy, logits, room=9, eos=frozenset()):
    stepper = Flat(logits)
    sprouts = [Sprout([0], room)]
    root = stepper.logits[None]
    return policy.grow(
        stepper, sprouts, root, Sampling(Warp(1.0)), [None], eos
    )[0]


def test_dynamic_trees_keep_parents_and_break_ties_by_lower_index():
    equal = [0.0, 0.0, 0.0]
    tree = grow(Dynamic(nodes=2, depth=2, width=2), equal)
    assert tree.tokens == (0, 1)  # of three equal tokens the first two
    assert tree.parents == (ROOT, ROOT)
    tree = grow(Dynamic(nodes=4, depth=2, width=2), equal)
    assert tree.tokens == (0, 1, 0, 1)
    assert tree.parents == (ROOT, ROOT, 0, 0)  # children of the first


def test_dynamic_trees_are_the_worthiest_nodes_with_their_parents():
    """Against a search over all nodes of the full tree."""
    logits = torch.tensor([2.0, 1.2, 0.3, -1.0])
    law = logits.softmax(-1).tolist()
    for nodes in (1, 3, 6, 9):
        tree = grow(Dynamic(nodes, depth=3, width=3), logits.tolist())
        assert len(tree) == nodes
        worth = []
        for i, parent in enumerate(tree.parents):
            above = 1.0 if parent == ROOT else worth[parent]
            worth.append(above * law[tree.tokens[i]])
        # Of the two levels that are fully seen no better node was left out.
        every_node = [law[a] for a in range(3)]
        every_node += [law[a] * law[b] for a in range(3) for b in range(3)]
        best = sorted(every_node, reverse=True)[:nodes]
        deep = [w for i, w in enumerate(worth) if tree.depth(i) < 3]
        assert min(worth) >= min(best) - 1e-12
        assert sorted(deep, reverse=True) == pytest.approx(best[: len(deep)])


def test_dynamic_trees_end_at_eos_room_and_little_confidence():
    logits = [3.0, 2.0, 0.0]
    tree = grow(Dynamic(9, 4, 2), logits, eos=frozenset([0]))
    assert all(
        tree.tokens[up] != 0 for up in tree.parents if up != ROOT
    )
    assert grow(Dynamic(9, 4, 2), logits, room=1).height == 1
    assert grow(Dynamic(9, 4, 2, stop_below=0.9), logits).height == 1
    for bad in ({"nodes": 0}, {"depth": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            Dynamic(**bad)
    with pytest.raises(ValueError, match="stop_below"):
        Dynamic(stop_below=2.0)


def test_pruning_closes_the_numbers_up():
    sprout = Sprout([0], 9)
    for token, parent in ((5, ROOT), (6, ROOT), (7, 1), (8, 2)):
        sprout.add(token, parent)
    sprout.slot = {0: 0, 1: 1, 2: 2}
    prune(sprout, [1, 2, 3])
    assert sprout.tokens == [6, 7, 8]
    assert sprout.parents == [ROOT, 0, 1]
    assert sprout.slot == {0: 1, 1: 2}


# Confidence stop


def test_the_confidence_stop_keeps_the_unsure_token():
    """Dropping it after looking would change the law of proposals."""
    unsure = Table(lambda c: [0.3, 0.4, 0.3], 3)
    sure = Table(lambda c: [0.01, 0.98, 0.01], 3)
    for draft, depth in ((unsure, 1), (sure, 5)):
        first = next(
            specref.stream(
                sure,
                [0],
                "assisted",
                draft=draft,
                gamma=5,
                stop_below=0.4000001,
                temperature=1.0,
                max_new_tokens=12,
                seed=1,
            )
        )
        assert len(first.trees[0]) == depth


# Positional acceptance


def test_acceptance_of_a_perfect_draft_is_all_in_the_first_rank(target):
    texts = [(PROMPT * 3, 4)]
    for temperature in (0.0, 1.0):
        got = measure.acceptance(
            target, target, texts, width=4, temperature=temperature
        )
        assert got == [1.0, 0.0, 0.0, 0.0]


def test_acceptance_at_rank_one_is_alpha():
    """Context-free laws: sum min(p, q), up to the draws' own average."""
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    lms = [Table(lambda c, x=x: x, 3) for x in (p, q)]
    text = [([0] * 401, 1)]
    got = measure.acceptance(*lms, text, width=3, seed=1)
    # 400 draws of min(1, p / q), deviation 0.3: 4 standard errors.
    assert got[0] == pytest.approx(specref.theory.alpha(p, q), abs=0.06)
    assert 0.98 < sum(got) <= 1.0 + 1e-4  # three tokens cover V = 3
    ranked = measure.acceptance(*lms, text, width=3, temperature=0.0)
    assert ranked == [0.0, 0.0, 1.0]  # the target's choice is q's third


def test_acceptance_counts_the_response_only(target):
    """Positions before the start do not enter."""
    draft = every.draft(0.3)
    whole = measure.acceptance(target, draft, [(PROMPT, 1)], width=3)
    tail = measure.acceptance(target, draft, [(PROMPT, 5)], width=3)
    assert whole != tail
    assert all(0.0 <= x <= 1.0 for x in whole + tail)
    assert sum(whole) <= 1.0 + 1e-6


def test_shipped_vectors_are_for_named_drafts(target):
    with pytest.raises(ValueError, match="no acceptance vector is shipped"):
        measure.shipped_acceptance(target)
