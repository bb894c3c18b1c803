"""The real model: every lossless method gives transformers' own tokens.

The reference is ``generate`` of transformers on the same weights in
float32.  By default each method decodes 64 tokens of one prompt of each
kind, and the `BEST` do so on all 20 prompts.  The complete sweep, 20 prompts
x 64 tokens x all methods, is

    python -m pytest -m slow tests/test_real.py

Ties.  A forward over several tokens sums in another order than a forward
over one, so float32 logits differ in their last bits, and where the two
best logits are nearer to each other than that, neither choice is wrong.
So a first difference is looked at in float64: it is accepted, and reported
as a warning, only when both tokens are the two best and their logits are
nearer than ``TIE``; from there on the output is compared with transformers
again, started from the text with the other choice.  Anything else fails.

``SPECREF_TEST_DRAFT`` names another draft than the shipped ``middle``; two
threads run unless ``OMP_NUM_THREADS`` says otherwise.
"""

from __future__ import annotations

import inspect
import os
import warnings
from functools import cache

import every
import pytest
import torch

import specref
from specref.prompts import KINDS, eval_prompts
from specref.registry import method, methods

DRAFT = os.environ.get("SPECREF_TEST_DRAFT", "middle")
TIE = 1e-3  # logits; float32 forwards differ by about 1e-4 at most
LONG, SHORT, PROMPTS = 64, 16, 20

LOSSLESS = [m.name for m in methods() if m.lossless and m.ready]
# A copy's chain, a trained draft's chain, its tree.
BEST = ["int4", "assisted", "sequoia"]


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The tiny models' tests run faster on one."""
    before = torch.get_num_threads()
    free = min(2, os.cpu_count() or 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", free)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def peer(real):
    """transformers on the same weights."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        real.folder, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def reference(real, peer):
    """``reference(ids, n)``: transformers' greedy tokens, computed once."""

    @cache
    def greedy(ids: tuple[int, ...], n: int) -> tuple[int, ...]:
        row = torch.tensor([ids])
        out = peer.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=n,
            do_sample=False,
        )
        return tuple(out[0, len(ids) :].tolist())

    def first(ids: list[int], n: int) -> list[int]:
        # The long run holds the short one.
        return list(greedy(tuple(ids), LONG)[:n])

    first.again = lambda ids, n: list(greedy(tuple(ids), n))
    first.eos = set(real.lm.eos)
    return first


@pytest.fixture(scope="module")
def exact(real):
    """The target in float64, made when a tie must be judged."""

    @cache
    def model():
        from specref.lm.drafts import clone

        return clone(real.lm, torch.float64)

    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        lm = model()
        row = torch.tensor([ids])
        return lm.forward(row, lm.new_cache(1, len(ids))).logits[0, -1]

    return logits


def ids_of(real, prompt) -> list[int]:
    return real.encode(prompt.prompt)


def options(name: str) -> dict:
    """The method's own defaults, but for the draft under test."""
    out = {}
    takes = inspect.signature(method(name).build).parameters
    default = getattr(takes.get("draft"), "default", None)
    if default == "middle":
        out["draft"] = DRAFT
    if "accept" in takes and DRAFT != "middle":
        out["accept"] = every.ACCEPT
    return out


def judge(exact, reference, ids, got, n, label, ties, want=None):
    """Compare with the reference's ``n`` tokens; look at a first
    difference as the page above says."""
    want = reference(ids, n) if want is None else want
    if got == want:
        return
    both = zip(got, want, strict=False)
    short = min(len(got), len(want))
    at = next((i for i, (a, b) in enumerate(both) if a != b), short)
    assert at < short, f"{label}: {len(got)} tokens instead of {len(want)}"
    value, index = exact([*ids, *want[:at]]).topk(2)
    gap = float(value[0] - value[1])
    pair = {got[at], want[at]}
    assert pair == set(index.tolist()) and gap < TIE, (
        f"{label}: token {at} is {got[at]} instead of {want[at]}; the two "
        f"best are {index.tolist()}, {gap:.2e} apart"
    )
    ties.append(f"{label}: tie at token {at}, {gap:.1e} logits apart")
    text, left = [*ids, *got[: at + 1]], n - at - 1
    if not left or got[at] in reference.eos:
        assert len(got) == at + 1
        return
    rest = reference.again(text, left)
    judge(exact, reference, text, got[at + 1 :], left, label, ties, rest)


def check(real, reference, exact, name, prompt, n):
    """One method on one prompt."""
    ids, ties = ids_of(real, prompt), []
    report = specref.generate(
        real, ids, name, max_new_tokens=n, **options(name)
    )
    label = f"{name}, {prompt.id}"
    judge(exact, reference, ids, report.tokens, n, label, ties)
    assert report.text == real.decode(report.tokens)
    assert sum(len(r.tokens[0]) for r in report.rounds) == len(report.tokens)
    warn(ties)
    return len(ties)


@torch.inference_mode()
def test_logits_equal_transformers(real, peer):
    """Of a whole prompt at once, before any choice is made."""
    ids = torch.tensor([ids_of(real, eval_prompts()[1])])
    ours = real.lm.forward(ids, real.lm.new_cache(1, ids.shape[1])).logits
    assert torch.allclose(ours, peer(ids).logits, atol=TIE, rtol=0)


def warn(ties: list[str]) -> None:
    for line in ties:
        warnings.warn(line, stacklevel=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_greedy_tokens_equal_transformers(
    name, kind, real, reference, exact
):
    """Each method, on each kind of prompt."""
    check(real, reference, exact, name, eval_prompts(kind)[0], LONG)


@pytest.mark.parametrize("name", BEST)
def test_the_best_equal_transformers_on_every_prompt(
    name, real, reference, exact
):
    """The prompts that the test above leaves out."""
    prompts = eval_prompts()[len(KINDS) : PROMPTS]
    ties = sum(check(real, reference, exact, name, p, LONG) for p in prompts)
    assert ties <= 2  # they are rare or something is wrong


@pytest.mark.parametrize("name", ["int4", "rsd", "prompt_lookup"])
def test_rows_of_a_batch_equal_their_solo_runs(
    name, real, reference, exact
):
    """Four prompts of different lengths, with and without a tree."""
    rows = [ids_of(real, p) for p in eval_prompts()[: len(KINDS)]]
    assert len({len(r) for r in rows}) > 1
    many = specref.generate(
        real, rows, name, max_new_tokens=12, **options(name)
    )
    ties: list[str] = []
    for ids, got in zip(rows, many, strict=True):
        judge(exact, reference, ids, got.tokens, 12, name, ties)
    warn(ties)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSLESS)
def test_greedy_tokens_equal_transformers_everywhere(
    name, real, reference, exact
):
    """The complete sweep; ties are rare or something is wrong."""
    prompts = eval_prompts()[:PROMPTS]
    assert {p.kind for p in prompts} == set(KINDS)
    ties = sum(
        check(real, reference, exact, name, p, LONG) for p in prompts
    )
    assert ties <= 2


def test_a_wrong_token_is_noticed(real, reference, exact):
    """The comparison itself, on outputs that are not the model's."""
    ids = ids_of(real, eval_prompts()[0])
    want = reference(ids, SHORT)
    best = exact([*ids, *want[:5]]).topk(2)
    assert float(best.values[0] - best.values[1]) > TIE
    for wrong in (
        [*want[:5], int(best.indices[1]), *want[6:]],
        [*want[:5], 0, *want[6:]],
        want[:-1],
        [*want, 7],
    ):
        with pytest.raises(AssertionError, match="instead of"):
            judge(exact, reference, ids, wrong, SHORT, "mutant", [])


def test_a_tie_is_reported_and_what_follows_is_still_compared():
    """The comparison on made-up laws: 2 and 5 are the best everywhere."""

    class Reference:
        eos = frozenset()

        def __call__(self, ids, n):
            return [1, 2, 3]

        def again(self, ids, n):
            assert (ids, n) == ([9, 1, 5], 1)
            return [7]

    def exact_with(gap):
        def exact(ids):
            logits = torch.zeros(12, dtype=torch.float64)
            logits[2], logits[5] = 4.0, 4.0 - gap
            return logits

        return exact

    def run(got, gap):
        ties = []
        judge(exact_with(gap), Reference(), [9], got, 3, "made up", ties)
        return ties

    assert run([1, 2, 3], 1.0) == []
    assert run([1, 5, 7], 1e-4) == [
        "made up: tie at token 1, 1.0e-04 logits apart"
    ]
    for got, gap in (
        ([1, 5, 7], 2e-3),  # too far apart
        ([1, 6, 7], 1e-4),  # not one of the two best
        ([1, 5, 8], 1e-4),  # wrong after the tie
        ([1, 5], 1e-4),  # short after the tie
    ):
        with pytest.raises(AssertionError):
            run(got, gap)


def test_custom_generate_on_a_padded_batch(real, peer):
    """transformers itself, with its tokenizer's left padding."""
    texts = [p.prompt for p in eval_prompts()[:2]]
    chats = [
        real.tokenizer.apply_chat_template(
            [{"role": "user", "content": t}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for t in texts
    ]
    inputs = real.tokenizer(
        chats, return_tensors="pt", padding=True, padding_side="left"
    )
    ask = {"max_new_tokens": 10, "do_sample": False}
    want = peer.generate(**inputs, **ask)
    got = peer.generate(
        **inputs, custom_generate=specref.custom_generate, **ask
    )
    assert torch.equal(got, want)


def test_the_text_is_text(real):
    """A chat prompt in, readable text out, without special tokens."""
    got = specref.generate(
        real, "Why is the sky blue?", "int8", max_new_tokens=24
    )
    assert len(got.text.split()) > 8
    assert got.text.isprintable() or "\n" in got.text
    assert "<|" not in got.text
    assert got.tau > 1.0
    again = specref.generate(
        real, "Why is the sky blue?", "int8", max_new_tokens=24, stop=["."]
    )
    assert got.text.startswith(again.text)
    assert again.text.count(".") == 1


def test_a_sampled_run_is_reproducible(real):
    """Same seed, same text; and the text is not the greedy one."""
    ask = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    a, b = (
        specref.generate(real, "Tell me a story.", "int4", **ask)
        for _ in range(2)
    )
    assert a.tokens == b.tokens
    ask["temperature"] = 0.0
    greedy = specref.generate(real, "Tell me a story.", "int4", **ask)
    assert greedy.tokens != a.tokens
