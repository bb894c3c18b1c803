"""The decode loop: limits, ends, streams, counts, processors, batches.

Greedy runs are compared with `every.greedy_reference`, which shares no code
with the loop: one forward over everything per token, without a tree.
"""

from __future__ import annotations

import math

import every
import pytest
import tiny
import torch

import specref
from specref import rules
from specref.decode import Request, rounds
from specref.draft.grow import Static
from specref.draft.model import ModelDrafter
from specref.draft.none import NoDraft
from specref.draft.scripted import Scripted
from specref.draft.shapes import chain as chain_shape
from specref.lm import Table
from specref.tree import EMPTY, IID, chain

PROMPT = [5, 9, 0, 4, 1, 1]
PROMPTS = [PROMPT, [7], [2, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
GAMMA = 3


@pytest.fixture(scope="module")
def target():
    return tiny.llama()


@pytest.fixture(scope="module")
def draft():
    return every.draft()


@pytest.fixture(scope="module")
def reference(target):
    return every.greedy_reference(target, PROMPT, 40)


def names(lossless: bool = True) -> list[str]:
    # int4 kernels need wider layers than these: tests/test_real.py.
    return [m for m in every.calls(None, lossless) if m != "int4"]


def run(target, prompt, name, draft, **more):
    options = every.calls(draft)[name]
    return specref.generate(target, prompt, name, **options, **more)


def table(seed: int, vocab: int = 4) -> Table:
    """Laws that depend on the whole context, no two alike."""

    def law(context):
        mix = sum((i + 2) * (t + 1) for i, t in enumerate(context)) + seed
        raw = [1.3 + math.sin(mix * 1.7 + 2.1 * v) for v in range(vocab)]
        return [x / sum(raw) for x in raw]

    return Table(law, vocab)


# Limits


@pytest.mark.parametrize("name", names())
def test_exactly_max_new_tokens(name, target, draft, reference):
    """Every limit from 1 to 12: greedy tokens are the reference's."""
    for n in range(1, 13):
        got = run(target, PROMPT, name, draft, max_new_tokens=n)
        assert got.tokens == reference[:n]


@pytest.mark.parametrize("name", names())
def test_exactly_max_new_tokens_sampled(name, target, draft):
    for n in (1, 2, 5, 6, 7):
        got = run(
            target, PROMPT, name, draft, max_new_tokens=n, temperature=1.0
        )
        assert len(got.tokens) == n


@pytest.mark.parametrize("name", names())
def test_a_prompt_of_one_token_and_token_zero(name, target, draft):
    for prompt in ([0], [3], [0, 0, 0]):
        got = run(target, prompt, name, draft, max_new_tokens=10)
        assert got.tokens == every.greedy_reference(target, prompt, 10)


def test_token_zero_is_emitted_and_accepted_like_any_other(
    target, draft, reference
):
    assert 0 in reference  # else the tests above would not see it
    seen = run(target, PROMPT, "speculative", draft, max_new_tokens=40)
    taken = [
        r.trees[0].tokens[i] for r in seen.rounds for i in range(r.accepted[0])
    ]
    assert seen.tokens == reference
    perfect = run(target, PROMPT, "speculative", target, max_new_tokens=40)
    taken += [
        r.trees[0].tokens[i]
        for r in perfect.rounds
        for i in range(r.accepted[0])
    ]
    assert 0 in taken


# End of sequence


def scripted(continuation, past, gamma=GAMMA):
    """Proposes what the target will say, right or wrong, beyond any end."""

    def script(row, room, draws):
        at = len(row) - past
        return chain(continuation[at : at + min(room, gamma)] or [0])

    return Scripted(script, gamma)


def decode(lm, drafter, prompt, rule="naive", **ask):
    """The rounds of a run of one row."""
    ask.setdefault("max_new_tokens", 16)
    source = ask.pop("draws", specref.Seeded(0))
    sampling = specref.warp.Sampling(
        specref.Warp(ask.pop("temperature", 0.0)), ask.pop("processors", ())
    )
    request = Request([prompt], [source], sampling=sampling, **ask)
    with torch.inference_mode():
        return list(rounds(lm, drafter, rules.get(rule), request))


def emitted(done, row=0):
    return [t for r in done for t in r.tokens[row]]


def until(tokens, ends):
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def test_eos_anywhere_in_an_accepted_draft_or_as_the_bonus(
    target, reference
):
    """An ordinary greedy token is declared EOS, at each place in a round.

    The script goes on beyond it, so that the rule accepts tokens that the
    loop must not emit.
    """
    places = set()
    for gamma in (1, 2, 3):
        for end in sorted(set(reference[:20])):
            done = decode(
                target,
                scripted(reference, len(PROMPT), gamma),
                PROMPT,
                eos=frozenset([end]),
                max_new_tokens=30,
            )
            assert emitted(done) == until(reference[:30], {end})
            if done[-1].accepted[0] == gamma:
                places.add((gamma, len(done[-1].tokens[0])))
    # First in the draft, in its middle, last, and the bonus behind it.
    assert {(3, 1), (3, 2), (3, 3)} <= places
    assert any(place == gamma + 1 for gamma, place in places)


def test_eos_as_the_correction(target, reference):
    wrong = [(t + 1) % 23 for t in reference]
    drafter = scripted(wrong, len(PROMPT))
    end = reference[4]
    done = decode(target, drafter, PROMPT, eos=frozenset([end]))
    assert emitted(done) == until(reference, {end})
    assert [r.accepted[0] for r in done] == [0] * len(done)


@pytest.mark.parametrize("name", names())
def test_eos_in_every_method(name, target, draft, reference):
    for k in (0, 3, 6, 9):
        ends = {reference[k], reference[k + 1]}
        for model in (draft, target):
            got = run(
                target,
                PROMPT,
                name,
                model,
                max_new_tokens=30,
                eos=sorted(ends),
            )
            assert got.tokens == until(reference[:30], ends)


@pytest.mark.parametrize("name", names())
def test_a_sampled_run_ends_with_its_first_eos(name, target, draft):
    for seed in range(3):
        ask = {"max_new_tokens": 20, "temperature": 1.0, "seed": seed}
        got = run(target, PROMPT, name, draft, eos=[2, 14], **ask)
        assert got.tokens == until(got.tokens, {2, 14})
        if len(got.tokens) < 20:
            assert got.tokens[-1] in (2, 14)


def test_nothing_is_streamed_after_the_end(target, reference):
    drafter = scripted(reference, len(PROMPT))
    end = reference[1]  # inside the first draft
    done = decode(target, drafter, PROMPT, eos=frozenset([end]))
    assert len(done) == 1
    assert done[0].tokens == [until(reference, {end})]


# Stop functions


def test_a_stop_function_sees_every_token_once_and_ends_there(
    target, reference
):
    """It stops inside an accepted block, on a pair that spans two tokens
    (and, for odd places, two rounds)."""
    for k in range(1, 12):
        pair, seen = reference[k - 1 : k + 1], []

        def stop(new, pair=pair, seen=seen):
            seen.append(list(new))
            return new[-2:] == pair

        drafter = scripted(reference, len(PROMPT))
        done = decode(target, drafter, PROMPT, stop=stop, max_new_tokens=20)
        got = emitted(done)
        assert got[-2:] == pair
        assert seen == [got[:i] for i in range(1, len(got) + 1)]
        assert got == reference[: len(got)]


# Counts


@pytest.mark.parametrize("name", names())
def test_rounds_say_what_happened(name, target, draft):
    for temperature in (0.0, 1.0):
        counted = every.Counting(target)
        if name in ("int8", "early_exit"):
            counted = target  # these want a Llama
        got = run(
            counted,
            PROMPT,
            name,
            draft,
            max_new_tokens=21,
            temperature=temperature,
        )
        assert sum(len(r.tokens[0]) for r in got.rounds) == 21
        assert got.tau == 21 / len(got.rounds)
        if counted is not target:
            assert counted.calls == len(got.rounds)
            assert counted.prefills == 1
        for r in got.rounds:
            assert min(r.draft_s, r.verify_s, r.commit_s) >= 0.0
            assert 0 <= r.accepted[0] <= r.trees[0].height
            # The path is in the tree, and one token comes on top.
            at = {-1}
            for token in r.tokens[0][: r.accepted[0]]:
                tree = r.trees[0]
                at = {
                    i
                    for i, up in enumerate(tree.parents)
                    if up in at and tree.tokens[i] == token
                }
                assert at
            if r is not got.rounds[-1]:
                assert len(r.tokens[0]) == r.accepted[0] + 1


def test_streaming_yields_the_tokens_of_generate(target, draft):
    ask = {"draft": draft, "max_new_tokens": 20, "temperature": 0.9}
    whole = specref.generate(target, PROMPT, "rsd", **ask)
    parts = list(specref.stream(target, PROMPT, "rsd", **ask))
    assert emitted(parts) == whole.tokens
    assert [r.accepted for r in parts] == [r.accepted for r in whole.rounds]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_perfect_draft_is_accepted_whole(target, temperature):
    """Draft = target: every round but the last gives gamma + 1 tokens."""
    for name in ("speculative", "block"):
        for gamma in (1, 2, 4):
            got = specref.generate(
                target,
                PROMPT,
                name,
                draft=target,
                gamma=gamma,
                max_new_tokens=5 * (gamma + 1),
                temperature=temperature,
            )
            assert got.tau == gamma + 1
            assert [r.accepted[0] for r in got.rounds] == [gamma] * 5
            assert got.acceptance_by_depth() == [1.0] * gamma


def test_a_hopeless_draft_costs_only_calls(target, reference):
    wrong = [(t + 1) % 23 for t in reference]
    done = decode(target, scripted(wrong, len(PROMPT)), PROMPT)
    assert len(done) == 16
    assert emitted(done) == reference[:16]


# Batches


# A bfloat16 copy may round a row of a batch in another way than a row
# alone, and other proposals use other draws: greedily, tokens are the same.
@pytest.mark.parametrize(
    ("name", "temperature"),
    [(n, 0.0) for n in names()] + [(n, 0.8) for n in names() if n != "int8"],
)
def test_each_row_of_a_batch_equals_its_solo_run(
    name, temperature, target, draft
):
    """Ragged prompts, ends at different rounds; row b uses stream b."""
    ask = {"max_new_tokens": 11, "temperature": temperature, "eos": [20, 3]}
    many = run(target, PROMPTS, name, draft, seed=7, **ask)
    lengths = set()
    for b, prompt in enumerate(PROMPTS):
        solo = run(
            target, prompt, name, draft, draws=specref.Seeded(7, b), **ask
        )
        assert many[b].tokens == solo.tokens
        assert many[b].row == b
        if name != "int8":
            assert len(many[b].rounds) == len(solo.rounds)
            assert many[b].tau == solo.tau
        lengths.add(len(solo.tokens))
    if not temperature:
        assert len(lengths) > 1  # rows did end at different times


def test_rows_that_ended_get_empty_trees_and_no_tokens(target, draft):
    done = list(
        specref.stream(
            target,
            PROMPTS,
            "speculative",
            draft=draft,
            max_new_tokens=14,
            eos=[20, 3],
        )
    )
    over = [False] * len(PROMPTS)
    for r in done:
        for b, tokens in enumerate(r.tokens):
            if over[b]:
                assert tokens == []
                assert not len(r.trees[b])
                assert r.accepted[b] == 0
            over[b] |= not tokens or tokens[-1] in (20, 3)
    assert sum(over) > 1


# Processors


def repetition_penalty(ids, scores):
    out = scores.clone()
    for token in set(ids[0].tolist()):
        x = out[0, token]
        out[0, token] = x / 2.0 if x > 0 else x * 2.0
    return out


class Witness:
    """A stateful processor.  It records the prefixes it is asked about and
    makes a law that only the true prefix can give."""

    def __init__(self):
        self.asked = []

    def __call__(self, ids, scores):
        row = ids[0].tolist()
        self.asked.append(tuple(row))
        ban = (sum(row) + 3 * len(row)) % scores.shape[-1]
        out = scores.clone()
        out[0, ban] = -torch.inf
        return out


def processed_reference(lm, processors, count):
    row = list(PROMPT)
    with torch.inference_mode():
        for _ in range(count):
            cache = lm.new_cache(1, len(row))
            scores = lm.forward(torch.tensor([row]), cache).logits[:, -1]
            for process in processors:
                scores = process(torch.tensor([row]), scores)
            row.append(int(scores.argmax()))
    return row[len(PROMPT) :]


@pytest.mark.parametrize("name", names())
def test_processors_see_true_prefixes(name, target, draft):
    witness = Witness()
    want = processed_reference(target, [repetition_penalty, Witness()], 15)
    got = run(
        target,
        PROMPT,
        name,
        draft,
        max_new_tokens=15,
        processors=[repetition_penalty, witness],
    )
    assert got.tokens == want
    assert want != every.greedy_reference(target, PROMPT, 15)
    full = tuple(PROMPT + want)
    asked = set(witness.asked)
    # It was asked about every committed prefix (and drafts besides) and
    # each prefix goes on from the prompt.
    assert {full[: len(PROMPT) + i] for i in range(15)} <= asked
    assert all(p[: len(PROMPT)] == tuple(PROMPT) for p in asked)


def test_processors_change_the_draft_law_too(target):
    """A perfect draft stays perfect under processors."""
    got = specref.generate(
        target,
        PROMPT,
        "speculative",
        draft=target,
        gamma=3,
        max_new_tokens=16,
        temperature=1.0,
        processors=[repetition_penalty, Witness()],
    )
    assert got.tau == 4.0


# Seeds


@pytest.mark.parametrize("name", names())
def test_same_seed_same_tokens_other_seed_other_tokens(name, target, draft):
    ask = {"max_new_tokens": 12, "temperature": 1.0}
    runs = [
        run(target, PROMPT, name, draft, seed=seed, **ask).tokens
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


# Bad states


class Poisoned:
    """A target whose logits turn bad at some length."""

    def __init__(self, lm, value, after):
        self.lm, self.value, self.after = lm, value, after
        self.vocab_size, self.device = lm.vocab_size, lm.device

    def new_cache(self, batch, capacity):
        return self.lm.new_cache(batch, capacity)

    def forward(self, tokens, cache, parents=None, taps=(), logits=True):
        out = self.lm.forward(tokens, cache, parents, taps, logits)
        if logits and cache.length[0] >= self.after:
            out.logits[:, 0, 3] = self.value
        return out


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_an_error_that_says_where(target, value, temperature):
    with pytest.raises(ValueError, match="target logits of row 0 are NaN"):
        decode(
            Poisoned(target, value, len(PROMPT) + 4),
            NoDraft(),
            PROMPT,
            temperature=temperature,
        )


def test_tokens_before_bad_logits_were_streamed(target, reference):
    bad = Poisoned(target, math.nan, len(PROMPT) + 4)
    got = []
    with pytest.raises(ValueError, match=f"after {len(PROMPT) + 5} tokens"):
        for r in specref.stream(bad, PROMPT, "autoregressive"):
            got += r.tokens[0]
    assert got == reference[:5]


def test_minus_infinity_is_no_error(target, reference):
    """A target may forbid tokens."""
    done = decode(
        Poisoned(target, -math.inf, 0), NoDraft(), PROMPT, max_new_tokens=8
    )
    assert 3 not in emitted(done)


def test_a_biased_pair_of_rule_and_drafter_is_refused():
    def script(row, room, draws):
        return chain([0, 1][:room])

    with pytest.raises(ValueError, match="biased for a proposal of kind"):
        decode(
            table(1), Scripted(script, 2), [1], "tokenwise", temperature=1.0
        )


def test_a_script_that_exceeds_its_word_is_refused():
    def script(row, room, draws):
        return chain([0, 1, 2])

    with pytest.raises(ValueError, match="at most 2 nodes"):
        decode(table(1), Scripted(script, 2), [1])
    with pytest.raises(ValueError, match="2 levels here"):
        decode(table(1), Scripted(script, 9), [1], max_new_tokens=3)


def test_an_empty_proposal_is_plain_decoding():
    lm = table(3)
    done = decode(
        lm, Scripted(lambda row, room, draws: EMPTY, 4), [1, 2], "tokenwise"
    )
    assert emitted(done) == every.greedy_reference(lm, [1, 2], 16)
    assert len(done) == 16


def test_a_cache_that_is_too_small_is_an_error(target):
    """A drafter that lies about its size is caught by the cache."""

    class Lying(Scripted):
        max_nodes = 0

        def propose(self, rows, room, draws):
            return [chain([1] * 9)]

    with pytest.raises(ValueError, match="capacity 9 exceeded"):
        decode(target, Lying(None, 0), PROMPT, max_new_tokens=2)


# Laws through the loop (the rooms' own tests take many more)


def test_the_law_of_a_run_is_the_targets():
    """A smoke test of the whole loop: the laws are in tests/test_laws."""
    p, q = table(1, 3), table(2, 3)
    want = {}
    for a in range(3):
        for b in range(3):
            for c in range(3):
                want[a, b, c] = float(
                    p.law([1])[a] * p.law([1, a])[b] * p.law([1, a, b])[c]
                )

    def sample(draws):
        drafter = ModelDrafter(q, Static(chain_shape(2), IID))
        done = decode(
            p,
            drafter,
            [1],
            "tokenwise",
            temperature=1.0,
            draws=draws,
            max_new_tokens=3,
        )
        return emitted(done)

    got = specref.law(sample)
    assert specref.total_variation(got, want) < 1e-12
