"""`generate` and `stream` as users meet them: inputs, ends, errors."""

from __future__ import annotations

import every
import numpy as np
import pytest
import tiny
import torch

import specref
from specref import api
from specref.draft.base import Drafter
from specref.lm import HF, Table

PROMPT = [5, 9, 0, 4, 1, 1]


@pytest.fixture(scope="module")
def target():
    return tiny.llama(max_position_embeddings=200)


@pytest.fixture(scope="module")
def reference(target):
    return every.greedy_reference(target, PROMPT, 24)


class Letters:
    """A tokenizer of 23 tokens, some of two letters, one special."""

    chat_template = None
    words = [*"abcdefghijklmnop", "qu", "st", "\n", " ", "é", "xy", "<end>"]

    def __call__(self, text, add_special_tokens=False):
        class Out:
            input_ids = [self.words.index(c) for c in text]

        return Out

    def decode(self, ids, skip_special_tokens=False):
        return "".join(
            self.words[i] for i in ids if i != 22 or not skip_special_tokens
        )


class Named:
    """What `specref.load` returns, as far as the API asks."""

    def __init__(self, lm):
        self.lm, self.tokenizer = lm, Letters()

    def encode(self, text, chat=True):
        return self.tokenizer(text).input_ids


# Inputs


def test_every_form_of_a_prompt_means_the_same(target, reference):
    forms = [
        PROMPT,
        tuple(PROMPT),
        torch.tensor(PROMPT),
        np.array(PROMPT),
        [np.int64(t) for t in PROMPT],
        list(torch.tensor(PROMPT)),
    ]
    for form in forms:
        got = specref.generate(
            target, form, "autoregressive", max_new_tokens=6
        )
        assert got.tokens == reference[:6]
        assert got.text is None
    batches = [
        [PROMPT, PROMPT],
        torch.tensor([PROMPT, PROMPT]),
        np.array([PROMPT, PROMPT]),
        [torch.tensor(PROMPT), PROMPT],
    ]
    for batch in batches:
        got = specref.generate(
            target, batch, "autoregressive", max_new_tokens=6
        )
        assert [r.tokens for r in got] == [reference[:6]] * 2
    one = specref.generate(
        target, [PROMPT], "autoregressive", max_new_tokens=2
    )
    assert isinstance(one, list)  # a list of one prompt is a batch


def test_text_in_and_text_out(target):
    lm = Named(target)
    ids = lm.encode("fjaebb")
    want = specref.generate(target, ids, "int8", max_new_tokens=9).tokens
    got = specref.generate(lm, "fjaebb", max_new_tokens=9)
    assert got.tokens == want
    assert got.text == lm.tokenizer.decode(want, skip_special_tokens=True)
    two = specref.generate(lm, ["fjaebb", [5, 9]], max_new_tokens=9)
    assert two[0].tokens == want


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"vocab_size": 32, "intermediate_size": 64}, "int4"),
        ({"vocab_size": 32}, "int8"),  # inputs that are no 32
        ({"intermediate_size": 64}, "int8"),  # outputs that are no 16
    ],
)
def test_auto_takes_the_fewest_bits_that_the_layers_allow(sizes, name):
    lm = tiny.llama(**sizes)
    assert api.default_method(lm) == name
    ask = {"max_new_tokens": 6}
    got = specref.generate(lm, PROMPT, **ask).tokens
    assert got == specref.generate(lm, PROMPT, "autoregressive", **ask).tokens
    if name == "int8":
        with pytest.raises(ValueError, match="int4 needs inputs in groups"):
            specref.generate(lm, PROMPT, "int4", **ask)


def test_auto_is_lossless_and_suits_the_target(target, reference):
    assert api.default_method(target) == "int8"
    hf = HF(tiny.hf_model())
    assert api.default_method(hf) == "prompt_lookup"
    for lm in (target, hf, hf.model):
        got = specref.generate(lm, PROMPT, max_new_tokens=12)
        assert got.tokens == reference[:12]
    drafted = specref.generate(
        target, PROMPT, draft=every.draft(), gamma=2, max_new_tokens=12
    )
    assert drafted.tokens == reference[:12]
    assert max(len(r.trees[0]) for r in drafted.rounds) == 2
    with torch.device("meta"):
        from specref.lm import Llama

        elsewhere = Llama(target.config)
    assert api.default_method(elsewhere) == "prompt_lookup"


# Ends


def test_eos_defaults_to_the_models_own(target, reference):
    model = tiny.llama()
    model.eos = (reference[3],)
    first = reference.index(reference[3]) + 1
    second = reference[1]
    for more, want in (
        ({}, reference[:first]),
        ({"eos": []}, reference[:12]),
        ({"eos": second}, reference[: reference.index(second) + 1]),
        ({"eos": [reference[0], 22]}, reference[:1]),
    ):
        got = specref.generate(
            model, PROMPT, "prompt_lookup", max_new_tokens=12, **more
        )
        assert got.tokens == want


@pytest.mark.parametrize("method", ["autoregressive", "speculative"])
def test_stop_texts_end_the_row_where_they_are_complete(
    method, target, reference
):
    """Every pair of neighbours as a stop text: it spans two tokens, and
    with the perfect draft it lies anywhere in an accepted block."""
    lm, words = Named(target), Letters.words
    options = {"draft": target} if method == "speculative" else {}
    whole = Letters().decode(reference)
    for k in range(12):
        stop = words[reference[k]] + words[reference[k + 1]]
        got = specref.generate(
            lm, PROMPT, method, stop=["zz", stop], max_new_tokens=24, **options
        )
        assert got.tokens == reference[: len(got.tokens)]
        shown = Letters().decode(got.tokens)
        assert stop in shown
        assert stop not in Letters().decode(got.tokens[:-1])
        assert whole.startswith(shown)


def test_a_stop_text_that_never_comes_changes_nothing(target, reference):
    got = specref.generate(
        Named(target), PROMPT, "int8", stop="zzz", max_new_tokens=24
    )
    assert got.tokens == reference


def test_a_long_stop_text_made_of_many_tokens(target, reference):
    lm = Named(target)
    stop = Letters().decode(reference[2:20])
    got = specref.generate(
        lm, PROMPT, "speculative", draft=target, stop=stop, max_new_tokens=24
    )
    assert got.tokens == reference[:20]


def test_a_stop_function_in_a_batch_sees_its_own_row(target):
    prompts, asked = [PROMPT, [7, 7], [3]], []

    def stop(new):
        asked.append(tuple(new))
        return len(new) >= 3 and new[-1] % 2 == 0

    many = specref.generate(
        target,
        prompts,
        "speculative",
        draft=every.draft(),
        stop=stop,
        max_new_tokens=12,
    )
    for prompt, got in zip(prompts, many, strict=True):
        want = every.greedy_reference(target, prompt, 12)
        ends = [i for i, t in enumerate(want) if i >= 2 and t % 2 == 0]
        assert got.tokens == want[: ends[0] + 1 if ends else 12]
        for i in range(1, len(got.tokens) + 1):
            assert tuple(got.tokens[:i]) in asked


# Interruption


class Interrupting(Drafter):
    """Ctrl-C in the middle of a proposal."""

    max_nodes = 3

    def __init__(self, inner, after):
        self.inner, self.after = inner, after

    def start(self, *args):
        self.inner.start(*args)

    def propose(self, *args):
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return self.inner.propose(*args)

    def commit(self, news):
        self.inner.commit(news)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_ctrl_c_keeps_what_was_generated(after, target, reference):
    job = api.prepare(
        target, PROMPT, "speculative", draft=target, gamma=3, max_new_tokens=24
    )
    job.drafter = Interrupting(job.drafter, after)
    report = api.finish(job)[0]
    assert report.interrupted
    assert report.tokens == reference[: 4 * after]
    assert len(report.rounds) == after
    assert report.seconds > 0


def test_ctrl_c_in_what_shows_the_tokens(target, reference):
    shown = []

    def show(tokens):
        shown.append(list(tokens))
        if len(shown) == 2:
            raise KeyboardInterrupt

    job = api.prepare(Named(target), PROMPT, "autoregressive")
    report = api.finish(job, show)[0]
    assert report.interrupted
    assert report.tokens == reference[:2] == sum(shown, [])
    assert report.text == Letters().decode(reference[:2])


def test_a_finished_run_is_not_interrupted(target):
    got = specref.generate(target, PROMPT, "int8", max_new_tokens=3)
    assert got.interrupted is False


# Reports


def test_a_report_counts(target):
    got = specref.generate(
        target, PROMPT, "speculative", draft=every.draft(), max_new_tokens=20
    )
    assert got.tau == 20 / len(got.rounds)
    assert got.tokens_per_s == pytest.approx(20 / got.seconds)
    inside = sum(r.draft_s + r.verify_s + r.commit_s for r in got.rounds)
    assert 0 < inside < got.seconds
    # By hand: rounds that reached a depth, and those that accepted it.
    for i, beta in enumerate(got.acceptance_by_depth(), 1):
        tried = [
            r
            for r in got.rounds
            if r.trees[0].height >= i and r.accepted[0] >= i - 1
        ]
        taken = [r for r in tried if r.accepted[0] >= i]
        assert beta == (len(taken) / len(tried) if tried else 0.0)


# Errors


BAD = [
    ([], {}, "prompt must have at least one token, got none"),
    ([[1], []], {}, "prompt must have at least one token, got none"),
    ([23], {}, "prompt holds token 23, outside the target's vocabulary of 23"),
    ([4, -1], {}, "prompt holds token -1"),
    ([[1], [2, 99]], {}, "prompt holds token 99"),
    ("text", {}, "target has no tokenizer"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens must be .*, got 0"),
    ([1], {"max_new_tokens": -3}, "max_new_tokens must be .*, got -3"),
    ([1], {"max_new_tokens": 2.5}, "max_new_tokens must be .*, got 2.5"),
    (
        [1] * 120,
        {"max_new_tokens": 81},
        "prompt of 120 tokens plus max_new_tokens 81 exceeds .* 200 pos",
    ),
    ([1], {"method": "nonsense"}, "unknown method 'nonsense': give one of"),
    ([1], {"gamma": 0}, "gamma must be at least 1, got 0"),
    ([1], {"gamma": -2}, "gamma must be at least 1, got -2"),
    ([1], {"gamma": 2.0}, "gamma must be at least 1, got 2.0"),
    ([1], {"width": 3}, "method 'prompt_lookup' takes no option 'width'"),
    ([1], {"temperature": -1.0}, "temperature must be at least 0"),
    ([1], {"temperature": float("nan")}, "temperature must be"),
    ([1], {"top_k": 0}, "top_k must be at least 1, got 0"),
    ([1], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ([1], {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ([1], {"seed": -1}, "seed"),
    ([1], {"stop": "x"}, "stop is text but the target has no tokenizer"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), BAD)
@pytest.mark.parametrize("call", [specref.generate, specref.stream])
def test_bad_arguments_are_named(prompt, options, message, call, target):
    """`stream` raises at the call, not at its first round."""
    options = {"method": "prompt_lookup", **options}
    with pytest.raises(ValueError, match=message):
        call(target, prompt, **options)


def test_bad_types_are_named(target):
    for prompt in ([1.5, 2], [[1], 2], [None], {"a": 1}):
        with pytest.raises((TypeError, ValueError), match="prompt must be"):
            specref.generate(target, prompt, "prompt_lookup")
    with pytest.raises(TypeError, match="target must be what specref.load"):
        specref.generate(torch.nn.Linear(2, 2), [1])
    with pytest.raises(TypeError, match="target must be what specref.load"):
        specref.generate("smollm2-135m", [1])


def test_an_empty_text_and_an_empty_stop(target):
    with pytest.raises(ValueError, match="prompt must have at least one"):
        specref.generate(Named(target), "")
    with pytest.raises(ValueError, match="stop must not hold an empty text"):
        specref.generate(Named(target), "a", stop=["x", ""])


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, o in every.calls(0).items()
        if "draft" in o and "tokenizer" not in o
    ],
)
def test_another_vocabulary_is_refused(name, target):
    other = tiny.llama(vocab_size=24)
    options = every.calls(other)[name]
    with pytest.raises(
        ValueError,
        match="draft vocabulary 24 differs from target vocabulary 23",
    ):
        specref.generate(target, PROMPT, name, **options)


def test_bad_drafts(target):
    with pytest.raises(ValueError, match="unknown draft 'tiny'"):
        specref.generate(target, PROMPT, "speculative", draft="tiny")
    with pytest.raises(ValueError, match="does not exist"):
        specref.generate(
            target, PROMPT, "speculative", draft="/nowhere/a.safetensors"
        )
    with pytest.raises(TypeError, match="quantised copy needs a specref"):
        specref.generate(tiny.hf_model(), PROMPT, "int8", max_new_tokens=9)
    with pytest.raises(TypeError, match="early exit needs a specref Llama"):
        specref.generate(
            tiny.hf_model(), PROMPT, "early_exit", max_new_tokens=9
        )


def test_a_draft_of_fewer_positions_is_refused_and_the_last_one_used(target):
    short = tiny.llama(max_position_embeddings=16)
    ask = {"draft": short, "gamma": 4}
    with pytest.raises(ValueError, match="draft has 16 positions"):
        specref.generate(
            target, PROMPT, "speculative", max_new_tokens=11, **ask
        )
    got = specref.generate(
        target, PROMPT, "speculative", max_new_tokens=10, **ask
    )
    assert got.tokens == every.greedy_reference(target, PROMPT, 10)


def test_the_last_position_of_the_target_is_used(target):
    prompt = [(3 * i) % 23 for i in range(192)]
    for name in ("speculative", "rsd"):
        got = specref.generate(
            target, prompt, name, draft=target, max_new_tokens=8
        )
        assert got.tokens == every.greedy_reference(target, prompt, 8)


@pytest.mark.parametrize("method", ["typical", "lenience"])
def test_lossy_methods_run_but_are_marked(method, target):
    options = every.calls(every.draft(), lossless=False)[method]
    got = specref.generate(
        target, PROMPT, method, max_new_tokens=9, temperature=1.0, **options
    )
    assert len(got.tokens) == 9
    assert not {m.name: m for m in specref.methods()}[method].lossless


def test_tables_are_targets_too():
    lm = Table(lambda context: [0.1, 0.7, 0.2], 3)
    got = specref.generate(lm, [0], max_new_tokens=5)
    assert got.tokens == [1] * 5


def test_names_load_lazily():
    """`specref.custom_generate` does not cost an import of transformers."""
    import subprocess
    import sys

    code = (
        "import sys, specref\n"
        "assert 'torch' not in sys.modules\n"
        "assert callable(specref.custom_generate)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
