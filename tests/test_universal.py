"""Drafts with another tokenizer: laws, mutants, caches, batches."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import every
import pytest
import tiny
import torch
from cases import COOL, TOLERANCE, Case, Context, mixed, truth
from safetensors.torch import save_file
from toy_vocab import bpe, pair23

import specref
from specref.decode import Request, rounds
from specref.draft.step import TextStepper
from specref.draft.tli import SharedDrafter
from specref.draws import Draws
from specref.laws import Law, law, total_variation
from specref.lm import Table
from specref.lm.drafts import WEIGHTS
from specref.lm.pairs import load_own, pair, save_own, tokenizer_file
from specref.lm.vocab import Vocab, shared, vocab_of
from specref.registry import method
from specref.rules.base import Rule, Verdict
from specref.train.data import Corpus, Row
from specref.train.other import Other, OtherTrainer, evaluate
from specref.train.other_texts import encode_again, first_tokens, lessons
from specref.tree import KINDS
from specref.warp import Sampling, Warp

NAMES = ("universal", "tli")


# --- laws -----------------------------------------------------------------


def case(name: str, p: int, q: int, vocab: int = 3, **more: Any) -> Case:
    """Context-dependent laws; q is over the draft's own tokens (4)."""
    target, draft = mixed(p, vocab)[0], mixed(q, 4)[1]
    return Case(name, target, draft, vocab, **more)


# Target tokens; draft tokens.  Either lacks some of the other's, and the
# draft's cut the same text in other places.
TINY = (["a", "b", "ab"], ["b", "a", "ba", "aab"])
LONG = (["a", "b", "c", "ab", "abc"], ["c", "ab", "ca", "b"])
ENDED = (["b", "a", "ba"], ["a", "b", "aa"])

CASES = (
    (case("T=1", 23, 5), TINY),
    (case("other laws", 31, 8, prompt=(2, 0, 1)), TINY),
    (case("T=0.7", 26, 6, sampling=Sampling(Warp(0.7))), TINY),
    (case("T=0.7 top-k top-p", 27, 6, sampling=Sampling(COOL)), TINY),
    (case("T=1 top-p", 28, 9, sampling=Sampling(Warp(1.0, None, 0.8))), TINY),
    (case("T=0", 29, 7, sampling=Sampling(Warp(0.0))), TINY),
    (case("long", 41, 11, 5, new=3, prompt=(3, 2)), LONG),
)


def vocabularies(tokens: tuple, end: str = "") -> dict[str, Any]:
    """Options with both tokenizers; ``end`` gives each a token to end."""
    special = [end] if end else []
    return {
        "tokenizer": bpe(tokens[0], special),
        "draft_tokenizer": bpe(tokens[1], special and ["</s>"]),
    }


def method_law(
    name: str, case: Case, options: dict[str, Any], merge: bool = True
) -> Law:
    """Law of `specref.generate` on tables."""
    target, draft = Table(case.p, case.vocab), Table(case.q, 4)
    draft.eos = options.get("ends", ())
    options = {k: v for k, v in options.items() if k != "ends"}
    warp = case.sampling.warp

    def run(draws: Draws) -> specref.Report:
        return specref.generate(
            target,
            case.prompt,
            name,
            draft=draft,
            temperature=warp.temperature,
            top_k=warp.top_k,
            top_p=warp.top_p,
            processors=case.sampling.processors,
            max_new_tokens=case.new,
            eos=tuple(case.eos),
            draws=draws,
            **options,
        )

    return law(run, merge=merge)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case, tokens", CASES, ids=lambda x: str(x)[:20])
def test_law(name, case, tokens):
    options = vocabularies(tokens) | {"gamma": 3}
    got = method_law(name, case, options)
    assert total_variation(got, truth(case)) <= TOLERANCE


ENDS = case("eos", 44, 3, 4, eos=frozenset({3}), prompt=(2, 1))


@pytest.mark.parametrize("name", NAMES)
def test_law_with_ends_of_other_names(name):
    """Token 3 ends both texts, ``<end>`` here and ``</s>`` there."""
    options = vocabularies(ENDED, "<end>") | {"gamma": 3, "ends": (3,)}
    got = method_law(name, ENDS, options)
    assert total_variation(got, truth(ENDS)) <= TOLERANCE
    assert any(len(t) < ENDS.new for t in got)


@pytest.mark.parametrize("name", NAMES)
def test_merged_branches_have_the_same_law(name):
    case, tokens = CASES[0]
    options = vocabularies(tokens) | {"gamma": 2}
    whole = method_law(name, case.short(3), options, merge=False)
    merged = method_law(name, case.short(3), options)
    assert total_variation(whole, merged) <= TOLERANCE
    assert merged.branches != whole.branches  # they were merged


PAIR = [(0, 2), (1,)]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_independent(name):
    """Ragged prompts; one row ends (token 3) before the other."""
    options = vocabularies(ENDED, "<end>") | {"gamma": 2}
    target, draft = Table(ENDS.p, 4), Table(ENDS.q, 4)

    def run(draws: Draws) -> list[tuple[int, ...]]:
        drafter, rule = method(name).parts(target, draft=draft, **options)
        own = [draws.row(b) for b in range(2)]
        ask = Request(PAIR, own, 2, Sampling(), ENDS.eos)
        with torch.inference_mode():
            out = [(), ()]
            for r in rounds(target, drafter, rule, ask):
                both = zip(out, r.tokens, strict=True)
                out = [o + tuple(t) for o, t in both]
        return out

    short = ENDS.short(2)
    one, two = (truth(short, prompt) for prompt in PAIR)
    want = Law(
        {(a, b): x * y for a, x in one.items() for b, y in two.items()}
    )
    got = law(run, merge=True)
    assert total_variation(got, want) <= TOLERANCE


# --- mutants --------------------------------------------------------------


class Raw(Warp):
    """The draft's probabilities as they are: no renormalisation."""

    def __call__(self, logits):
        return logits.exp()


class Unnormalised(SharedDrafter):
    """Draws from q restricted, but reports q itself."""

    def propose(self, *args):
        self.sampling = Sampling(Raw())
        return super().propose(*args)


class WrongIds(SharedDrafter):
    """Reports the laws of the two shared tokens under each other's ids."""

    def propose(self, *args):
        trees = super().propose(*args)
        swap = [1, 0, 2]
        return [
            t if t.q is None else replace(t, q=t.q[:, swap]) for t in trees
        ]


class Dropped(SharedDrafter):
    """Takes back a drawn token that the draft thinks unlikely."""

    def propose(self, *args):
        trees = super().propose(*args)
        out = []
        for t in trees:
            n = next(
                (
                    i
                    for i, x in enumerate(t.tokens)
                    if t.q[t.law_of[i], x] < 0.4
                ),
                len(t),
            )
            cut = (t.tokens[:n], t.parents[:n], t.kind, t.q, t.law_of[:n])
            out.append(type(t)(*cut))
        return out


def mutant_law(case: Case, tokens: tuple, kind: type) -> float:
    target, draft = Table(case.p, case.vocab), Table(case.q, 4)
    options = vocabularies(tokens) | {"gamma": 2, "draft": draft}

    def run(draws: Draws) -> list[int]:
        drafter, rule = method("tli").parts(target, **options)
        drafter.__class__ = kind
        ask = Request([case.prompt], [draws], case.new, case.sampling)
        with torch.inference_mode():
            loop = rounds(target, drafter, rule, ask)
            return [t for r in loop for t in r.tokens[0]]

    return total_variation(law(run, merge=True), truth(case))


@pytest.mark.parametrize("kind", [Unnormalised, WrongIds, Dropped])
def test_a_broken_intersection_is_caught(kind):
    case, tokens = CASES[0]
    assert mutant_law(case.short(3), tokens, SharedDrafter) <= TOLERANCE
    assert mutant_law(case.short(3), tokens, kind) > 1e-3


def test_a_rule_that_trusts_the_text_is_caught():
    """Keeping the re-encoded text without a draw of the target."""
    case, tokens = CASES[0]
    target, draft = Table(case.p, 3), Table(case.q, 4)
    options = vocabularies(tokens) | {"gamma": 2, "draft": draft}
    naive = method("universal").parts(target, **options)[1]

    def trusting(tree, p, draws):
        best = naive.decide(tree, p, draws)
        if best.path or not len(tree):
            return best
        return Verdict((0,), int(draws.categorical(p[1])))

    rule = Rule("trusting", trusting, True, frozenset(KINDS), "")

    def run(draws: Draws) -> list[int]:
        drafter = method("universal").parts(target, **options)[0]
        ask = Request([case.prompt], [draws], 3, case.sampling)
        with torch.inference_mode():
            loop = rounds(target, drafter, rule, ask)
            return [t for r in loop for t in r.tokens[0]]

    got = law(run, merge=True)
    assert total_variation(got, truth(case.short(3))) > 1e-3


# --- proposals are as good as they can be ---------------------------------

WORDS = "the cat sat on the mat and the cat ran at the rat; "
COARSE = ["th", "the", " c", "at", " s", " o", "n ", " m", "an", "d ", " r"]
COARSE += [" cat", " sat", "ran", " th", " the"]
FINE = ["he", "he ", "ca", "t ", "sa", "on", "ma", "nd", " a", "ra", "; "]


def letters(more: list[str]) -> Vocab:
    return vocab_of(bpe([*sorted(set(WORDS)), *more]))


def writer(own: Vocab, canonical: bool) -> Table:
    """A model that writes `WORDS` for ever: in its tokenizer's own cuts,
    or in the longest tokens from wherever it stands."""
    text = (WORDS * 6).encode()

    @functools.cache
    def after(at: int) -> int:
        if canonical:
            return own.proceed(text[:at], text[at : at + 30])[0]
        return own.spell(text[at : at + 30])[0]

    def law_after(context: Context) -> list[float]:
        token = after(len(own.decode(context)))
        return [float(i == token) for i in range(len(own))]

    return Table(law_after, len(own))


def written(shift: int = 0) -> specref.api.Report:
    """UAG on two writers of one text; ``shift`` breaks the alignment."""

    class Shifted(Vocab):
        def proceed(self, before: bytes, new: bytes) -> list[int]:
            good = super().proceed(before, new)
            return good[shift:]

    source, into = letters(COARSE), letters(FINE)
    broken = Shifted(source.pieces, source.text)
    return specref.generate(
        writer(source, True),
        source.encode(WORDS[:20].encode()),
        "universal",
        draft=writer(into, False),
        tokenizer=broken,
        draft_tokenizer=into,
        gamma=9,
        max_new_tokens=40,
    )


def test_the_same_text_in_other_tokens_is_accepted():
    """All but the last token of a proposal, whose text may be cut."""
    source = letters(COARSE)
    report = written()
    text = source.decode(report.tokens)
    assert (WORDS * 6).encode()[20:].startswith(text)
    for r in report.rounds[:-1]:
        assert r.accepted[0] >= len(r.trees[0]) - 1 > 0
    assert report.tau > 3


def test_an_alignment_off_by_one_is_caught():
    assert written(1).tau < 1.5


def permuted(seed: int = 0) -> dict[str, Any]:
    """A target of 20 letters, and itself with other ids as a draft."""
    names = [chr(97 + i) for i in range(20)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    target = tiny.llama(vocab_size=20)
    draft = tiny.llama(vocab_size=20)
    with torch.no_grad():
        draft.embed.weight.copy_(target.embed.weight[order])
        draft.head.weight.copy_(target.head.weight[order])
    return {
        "target": target,
        "draft": draft,
        "tokenizer": bpe(names),
        "draft_tokenizer": bpe([names[i] for i in order]),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_draft_under_other_ids_is_always_accepted(name):
    temperature = 0.0 if name == "universal" else 1.0
    got = specref.generate(
        **permuted(),
        prompt=[3, 1, 4, 1, 5],
        method=name,
        gamma=4,
        stop_below=None,
        temperature=temperature,
        max_new_tokens=30,
        seed=3,
    )
    assert [r.accepted[0] for r in got.rounds] == [4] * 6
    assert got.tau == 5


def test_a_wrong_map_is_caught_by_acceptance():
    """The law is right whatever the map; acceptance is not."""
    options = permuted()
    options["draft_tokenizer"] = options["tokenizer"]
    got = specref.generate(
        **options,
        prompt=[3, 1, 4, 1, 5],
        method="tli",
        gamma=4,
        max_new_tokens=30,
    )
    assert got.tau < 2


# --- real modules, caches, batches ----------------------------------------

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 15], [9], [3, 20, 3]]


@pytest.fixture(scope="module")
def target():
    return tiny.llama()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eos", [None, 7])
def test_greedy_batches_equal_plain_decoding(name, eos, target):
    options = pair23() | {"draft": every.draft(), "gamma": 4}
    ask = {"max_new_tokens": 24, "eos": () if eos is None else eos}
    got = specref.generate(target, PROMPTS, name, **options, **ask)
    for prompt, report in zip(PROMPTS, got, strict=True):
        want = every.greedy_reference(target, prompt, 24)
        if eos in want:
            want = want[: want.index(eos) + 1]
        assert report.tokens == want
        assert any(len(r.trees[report.row]) for r in report.rounds)


@pytest.mark.parametrize("name", NAMES)
def test_seeded_rows_equal_their_solo_runs(name, target):
    options = pair23() | {"draft": every.draft(), "gamma": 3}
    ask = {"max_new_tokens": 12, "temperature": 0.8}
    batch = specref.generate(target, PROMPTS, name, seed=4, **options, **ask)
    for b, prompt in enumerate(PROMPTS):
        draws = specref.Seeded(4, b)
        solo = specref.generate(
            target, prompt, name, draws=draws, **options, **ask
        )
        assert solo.tokens == batch[b].tokens


class Watched(TextStepper):
    """Compares the logits of every round with those of a fresh cache."""

    checks, old = 0, 0

    def begin(self, live):
        before = self.inner
        out = super().begin(live)
        for b, on in enumerate(live):
            if on:
                ids = torch.tensor([self.readers[b].ids])
                cache = self.lm.new_cache(1, ids.shape[1])
                fresh = self.lm.forward(ids, cache).logits[0, -1]
                torch.testing.assert_close(out[b], fresh)
                Watched.checks += 1
        Watched.old += self.inner is not before
        return out


@pytest.mark.parametrize("name", NAMES)
def test_the_draft_reads_the_committed_text(name, target, monkeypatch):
    """After every rollback, in a batch whose caches must grow twice."""
    monkeypatch.setattr(f"specref.draft.{name}.TextStepper", Watched)
    Watched.checks = Watched.old = 0
    options = pair23() | {"draft": every.draft(0.2), "gamma": 3}
    specref.generate(
        target,
        PROMPTS,
        name,
        max_new_tokens=60,
        temperature=1.0,
        **options,
    )
    assert Watched.checks > 60 and Watched.old >= 1


def test_trees_of_shared_tokens(target):
    """TLI's drafter takes any policy and rule: here a tree drawn without
    replacement, judged by recursive rejection."""
    from specref.draft.grow import Static
    from specref.rules import get

    options = pair23() | {"draft": every.draft()}
    drafter = method("tli").parts(target, **options)[0]
    drafter.policy = Static((-1, -1, 0, 0), "without_replacement")
    ask = Request(PROMPTS, [specref.Seeded(0)] * 3, 12, Sampling(Warp(0.0)))
    out = [[] for _ in PROMPTS]
    with torch.inference_mode():
        for r in rounds(target, drafter, get("recursive"), ask):
            out = [o + t for o, t in zip(out, r.tokens, strict=True)]
    for prompt, tokens in zip(PROMPTS, out, strict=True):
        assert tokens == every.greedy_reference(target, prompt, 12)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_longer_than_the_draft_goes_on_without_it(name, target):
    short = tiny.llama(max_position_embeddings=16)
    options = pair23() | {"draft": short, "gamma": 2}
    got = specref.generate(
        target, PROMPTS[1], name, max_new_tokens=40, **options
    )
    assert got.tokens == every.greedy_reference(target, PROMPTS[1], 40)
    assert not len(got.rounds[-2].trees[0]) and len(got.rounds[0].trees[0])
    with pytest.raises(ValueError, match="draft has 16 positions, a prompt"):
        specref.generate(
            target, [1] * 30, name, max_new_tokens=9, **options
        )


def test_padding_is_never_drafted(target):
    """The draft has 4 ids and the target 3 that no tokenizer knows; the
    draft prefers its own."""
    draft = tiny.llama(vocab_size=27)
    with torch.no_grad():
        draft.head.weight[23:] = 20 * draft.head.weight[:4]
    wide = tiny.llama(vocab_size=26)
    options = pair23() | {"draft": draft, "gamma": 4, "temperature": 2.0}
    for name in NAMES:
        got = specref.generate(
            wide, PROMPTS[0], name, max_new_tokens=40, **options
        )
        drafted = [x for r in got.rounds for x in r.trees[0].tokens]
        assert max(drafted, default=0) < 23


# --- errors ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_errors(name, target):
    draft, both = every.draft(), pair23()
    ask = {"max_new_tokens": 4}

    def run(**options):
        return specref.generate(target, [1], name, **ask, **options)

    with pytest.raises(ValueError, match="tokenizer must be the target's"):
        run(draft=draft)
    with pytest.raises(ValueError, match="draft_tokenizer must be given"):
        run(draft=draft, tokenizer=both["tokenizer"])
    big = bpe([chr(97 + i) for i in range(24)])
    with pytest.raises(ValueError, match="tokenizer has 24 tokens, the targ"):
        run(draft=draft, tokenizer=big, draft_tokenizer=big)
    with pytest.raises(ValueError, match="draft_tokenizer has 24 tokens"):
        run(draft=draft, tokenizer=both["tokenizer"], draft_tokenizer=big)
    with pytest.raises(TypeError, match="tokenizer must be a fast tokenizer"):
        run(draft=draft, tokenizer="gpt2")
    with pytest.raises(ValueError, match="gamma must be at least 1, got 0"):
        run(draft=draft, gamma=0, **both)
    if name == "tli":
        greek = bpe(["α", "β"])
        with pytest.raises(ValueError, match="must share a token with the"):
            run(draft=draft, draft_tokenizer=greek, tokenizer=big_of(23))


def big_of(count: int) -> Any:
    return bpe([chr(97 + i) for i in range(count)])


# --- the draft that travels with the library ------------------------------


shipped = pytest.mark.skipif(
    not (WEIGHTS / "draft-other.safetensors").exists(),
    reason="no such draft is shipped: train it with `specref train other`",
)


@shipped
@pytest.mark.parametrize("name", NAMES)
def test_the_real_pair_writes_what_the_target_writes(name, real):
    for prompt in ("What is a prime number?", "Describe Zürich in 日本語."):
        plain = specref.generate(
            real, prompt, "autoregressive", max_new_tokens=24
        )
        got = specref.generate(real, prompt, name, max_new_tokens=24)
        assert got.tokens == plain.tokens
        assert sum(len(r.trees[0]) for r in got.rounds) > 8


@shipped
def test_the_real_maps_agree_on_every_byte(real):
    both = pair(real.lm, "other", real.tokenizer)
    sizes = (real.lm.vocab_size, both.lm.vocab_size)
    ends = (real.lm.eos, both.lm.eos)
    same = shared(both.source, both.into, sizes, ends)
    assert len(same) > 4_000
    for i, j in same.items():
        assert both.source.piece(i) == both.into.piece(j)
        assert real.tokenizer.decode([i]).encode() == both.into.piece(
            j
        ) or not _is_text(both.into.piece(j))
    assert same[real.lm.eos[0]] in both.lm.eos


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_drafts_with_the_targets_own_tokenizer(real):
    """A name that shares the tokenizer needs no second one."""
    plain = specref.generate(
        real, "Hello!", "autoregressive", max_new_tokens=12
    )
    for name in NAMES:
        got = specref.generate(
            real, "Hello!", name, draft="small", max_new_tokens=12
        )
        assert got.tokens == plain.tokens


# --- files and training ---------------------------------------------------


def saved(folder: Path) -> Path:
    """A tiny draft of its own tokenizer, written as training does."""
    file = folder / "draft-mine.safetensors"
    model = tiny.llama("llama-tied").float()
    model.eos = (3, 5)
    save_own(model, pair23()["draft_tokenizer"], file, {"about": 1})
    return file


def test_a_file_is_read_as_it_was_written(tmp_path):
    file = saved(tmp_path)
    model, into = load_own(file)
    assert model.eos == (3, 5) and len(into) == 23
    want = tiny.llama("llama-tied").embed.weight.bfloat16().float()
    assert torch.equal(model.embed.weight, want)
    options = {"draft": file, "tokenizer": pair23()["tokenizer"]}
    target = tiny.llama()
    got = specref.generate(
        target, [1, 2], "universal", max_new_tokens=9, **options
    )
    assert got.tokens == every.greedy_reference(target, [1, 2], 9)


def test_broken_files_are_refused(tmp_path):
    file = saved(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="is truncated or altered"):
        load_own(file)
    file.write_bytes(whole)
    tokenizer_file(file).unlink()
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        load_own(file)
    tokenizer_file(file).write_text("{}")
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="holds no draft of its own tok"):
        load_own(file)


SMALL = Other(
    vocab=270, width=16, layers=1, heads=2, kv_heads=1, middle=24, top=4
)
SMALL = replace(SMALL, visits=400, batch=40, positions=64, drop=0.2)


def answers(count: int = 12) -> tuple[Any, Corpus]:
    """Answered prompts of a tiny target, with its features."""
    target, rng = tiny.llama().float(), torch.Generator().manual_seed(0)
    rows = []
    for n in range(count):
        tokens = torch.randint(23, (9 + n % 3,), generator=rng)
        out = target.forward(tokens[None], logits=False).hidden[0]
        rows.append(Row(tokens, out[:-1].detach(), 4))
    return target, Corpus(rows)


def test_lessons_meet_where_both_begin_a_token():
    target, corpus = answers()
    both = pair23()
    source, into = map(vocab_of, both.values())
    first = first_tokens(source, into, 23)
    laws = list(lessons(target, corpus, first, 4))
    again = encode_again(corpus, source, into, laws, 0.8, 64)
    met = 0
    for row, new in zip(corpus.rows, again.rows, strict=True):
        tokens, mine = row.tokens.tolist(), new.tokens.tolist()
        assert into.decode(mine) == source.decode(tokens)
        for i in range(new.answer, len(mine)):
            ids, prob = new.hidden[i - 1].chunk(2)
            assert abs(float(prob.sum()) - 1) < 1e-6
            assert ids[-1] == mine[i]
            text = into.decode(mine[new.answer : i])
            here = [
                j
                for j in range(4, len(tokens))
                if source.decode(tokens[4:j]) == text
            ]
            assert bool(here) == (float(prob[-1]) < 1)
            if here:
                met += 1
                # Independently: the target's law, its tokens by the first
                # draft token of what they spell.
                logits = target.head(row.hidden[here[0] - 1])
                best = logits.topk(4)
                for k in range(3):
                    piece = source.piece(int(best.indices[k]))
                    assert into.encode(piece)[0] == ids[k]
                    share = best.values.softmax(-1)[k]
                    assert abs(float(0.8 * share - prob[k])) < 1e-6
    assert met > 20


def test_training_resumes_exactly_and_learns(tmp_path):
    target, corpus = answers()
    source = vocab_of(pair23()["tokenizer"])

    def trainer(name: str) -> OtherTrainer:
        return OtherTrainer(SMALL, target, source, corpus, tmp_path / name)

    whole = trainer("whole")
    before = evaluate(whole.model, whole.corpus)
    whole.run()
    first = trainer("halves")
    first.run(4)
    first.save()
    rest = trainer("halves")
    assert rest.step == 4
    rest.run()
    for a, b in zip(whole.weights, rest.weights, strict=True):
        assert torch.equal(a, b)
    after = evaluate(whole.model, whole.corpus)
    assert after["hard"] < before["hard"] - 0.1
