"""`custom_generate` inside transformers' own ``generate``.

Greedy results are compared with ``generate`` without it, entry by entry;
sampled ones with the exact law of the target, by enumeration.
"""

from __future__ import annotations

import collections

import every
import pytest
import tiny
import torch
import transformers
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import specref
from specref.lm import HF

IDS = torch.tensor(
    [[5, 9, 0, 4, 1, 1], [0, 0, 0, 0, 7, 2], [0, 3, 3, 8, 8, 3]]
)
MASK = torch.tensor([[1] * 6, [0] * 4 + [1] * 2, [0] + [1] * 5])
V = 23


@pytest.fixture(scope="module")
def model():
    return tiny.hf_model()


@pytest.fixture(scope="module")
def draft():
    return every.near()


def ask(**more):
    """Arguments of a greedy batch; transformers prints no warning."""
    base = {
        "attention_mask": MASK,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    return {**base, **more}


def both(model, ids=IDS, method="speculative", draft=None, **more):
    """What transformers gives, and what we give."""
    plain = model.generate(ids, **ask(**more))
    ours = {"custom_generate": specref.custom_generate}
    ours["specref_method"] = method
    if draft is not None:
        ours["draft"] = draft
    return plain, model.generate(ids, **ask(**more), **ours)


def methods() -> list[str]:
    return list(every.calls(None, copies=False))


# Greedy


@pytest.mark.parametrize("name", methods())
def test_a_padded_batch_equals_generate(name, model, draft):
    options = dict(every.calls(draft, copies=False)[name])
    options.pop("draft", None)
    got = model.generate(
        IDS,
        custom_generate=specref.custom_generate,
        specref_method=name,
        draft=draft if "draft" in every.calls(draft)[name] else None,
        specref_options=options,
        **ask(),
    )
    assert torch.equal(got, model.generate(IDS, **ask()))


@pytest.mark.parametrize("family", ["mistral-window", "qwen2", "llama3"])
def test_other_families(family):
    model, near = tiny.hf_model(family), every.near(family=family)
    a, b = both(model, draft=near, max_new_tokens=20)
    assert torch.equal(a, b)


def test_absolute_positions():
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    gpt2 = tiny.randomise(transformers.GPT2LMHeadModel(config), 0)
    kw = {"eos_token_id": None, "bos_token_id": None}
    a, b = both(gpt2, method="prompt_lookup", max_new_tokens=20, **kw)
    assert torch.equal(a, b)


@pytest.mark.parametrize("n", range(1, 10))
def test_exact_lengths(n, model, draft):
    a, b = both(model, draft=draft, max_new_tokens=n)
    assert b.shape[1] == 6 + n
    assert torch.equal(a, b)
    a, b = both(model, draft=draft, max_new_tokens=None, max_length=6 + n)
    assert torch.equal(a, b)


def test_max_length_counts_the_padded_prompt_as_generate_does(model):
    ids, mask = IDS[1:2], MASK[1:2]
    a, b = both(
        model,
        ids,
        "auto",
        attention_mask=mask,
        max_new_tokens=None,
        max_length=9,
    )
    assert torch.equal(a, b)


def test_eos_lists_and_pad_fill(model, draft):
    plain = model.generate(IDS, **ask(max_new_tokens=16))
    ends = [int(plain[0, 9]), int(plain[1, 13])]
    a, b = both(
        model,
        draft=draft,
        eos_token_id=ends,
        max_new_tokens=16,
        pad_token_id=22,
    )
    assert torch.equal(a, b)
    assert (b[:, 6:] == 22).any()  # a row was filled


def test_eos_ends_every_row_early(model, draft):
    ends = list(range(0, V, 2))
    a, b = both(
        model,
        draft=draft,
        eos_token_id=ends,
        max_new_tokens=40,
        pad_token_id=1,
    )
    assert b.shape[1] < 46
    assert torch.equal(a, b)


def test_one_row_without_a_mask_or_a_batch_of_equal_lengths(model, draft):
    ids = torch.tensor([[5, 9, 3, 4], [1, 1, 2, 2]])
    for rows in (ids, ids[:1], ids[1:, :1]):
        a, b = both(model, rows, draft=draft, attention_mask=None)
        assert torch.equal(a, b)


def test_a_mask_that_hides_the_middle(model, draft):
    """What transformers guesses when the pad token is part of a prompt."""
    ids = torch.tensor([[5, 0, 0, 4, 1, 1]])
    a, b = both(model, ids, draft=draft, attention_mask=None)
    c, d = both(
        model,
        ids,
        draft=draft,
        attention_mask=torch.tensor([[1, 0, 0, 1, 1, 1]]),
    )
    assert torch.equal(a, b)
    assert torch.equal(c, d)
    assert torch.equal(a, c)


PROCESSED = {
    "repetition": {"repetition_penalty": 1.7},
    "no_repeat": {"no_repeat_ngram_size": 2},
    "min_new": {"min_new_tokens": 7, "eos_token_id": list(range(20))},
    "min_length": {"min_length": 9, "eos_token_id": list(range(20))},
    "bad_words": {"bad_words_ids": [[4], [14, 14]]},
    "begin": {"begin_suppress_tokens": [4, 2, 9]},
    "forced_eos": {"forced_eos_token_id": 5},
    "bias": {"sequence_bias": [[[2, 14], 6.0], [[20], -9.0]]},
    "encoder": {"encoder_repetition_penalty": 2.0},
    "encoder_ngram": {"encoder_no_repeat_ngram_size": 1},
    "decay": {
        "exponential_decay_length_penalty": (2, 2.0),
        "eos_token_id": [11],
    },
    "all": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("kind", PROCESSED)
def test_processors_of_the_config(kind, model, draft):
    a, b = both(model, draft=draft, **PROCESSED[kind])
    assert torch.equal(a, b)
    assert not torch.equal(a, model.generate(IDS, **ask()))


def test_a_prefix_function_gets_its_own_rows_number(model, draft):
    seen = collections.defaultdict(set)

    def allowed(batch, ids):
        seen[batch].add(tuple(ids[:6].tolist()))
        return [(int(ids[-1]) + i * (batch + 2)) % V for i in range(1, 4)]

    a, b = both(model, draft=draft, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(a, b)
    assert seen == {b: {tuple(IDS[b].tolist())} for b in range(3)}


class Stateful:
    """Keeps what it has seen; its ban is a function of the true prefix."""

    def __init__(self):
        self.seen = set()

    def __call__(self, ids, scores):
        for b, row in enumerate(ids.tolist()):
            self.seen.add(tuple(row))
            scores[b, (sum(row) + len(row)) % V] = -torch.inf
        return scores


def test_users_processors_once_per_position_with_the_true_prefix(
    model, draft
):
    theirs, ours = Stateful(), Stateful()
    a = model.generate(IDS, logits_processor=[theirs], **ask())
    b = model.generate(
        IDS,
        logits_processor=LogitsProcessorList([ours]),
        custom_generate=specref.custom_generate,
        draft=draft,
        **ask(),
    )
    assert torch.equal(a, b)
    prompts = {tuple(row) for row in IDS.tolist()}
    assert theirs.seen <= ours.seen  # and drafts besides
    assert {p[:6] for p in ours.seen} == prompts


def test_equal_prompts_and_prompts_within_prompts(model, draft):
    ids = torch.tensor([[0, 0, 5], [0, 5, 5], [5, 5, 5], [0, 0, 5]])
    mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    a, b = both(
        model,
        ids,
        draft=draft,
        attention_mask=mask,
        repetition_penalty=1.5,
        max_new_tokens=15,
    )
    assert torch.equal(a, b)


# Outputs


@pytest.mark.parametrize("method", ["speculative", "specinfer", "topk_tree"])
def test_scores_and_logits_have_one_entry_per_token(method, model, draft):
    ends = [int(model.generate(IDS, **ask())[1, 9])]
    a, b = both(
        model,
        method=method,
        draft=draft,
        repetition_penalty=1.3,
        eos_token_id=ends,
        max_new_tokens=11,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert type(a) is type(b)
    assert torch.equal(a.sequences, b.sequences)
    for name in ("scores", "logits"):
        theirs, ours = getattr(a, name), getattr(b, name)
        assert len(theirs) == len(ours) == b.sequences.shape[1] - 6
        over = torch.zeros(3, dtype=torch.bool)
        for i, (x, y) in enumerate(zip(theirs, ours, strict=True)):
            assert y.shape == (3, V)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y[~over], x[~over], atol=1e-4, rtol=0)
            assert not y[over].any()  # zeros where a row had ended
            over |= b.sequences[:, 6 + i] == ends[0]
        assert over.any()


def test_a_dict_without_scores(model, draft):
    a, b = both(model, draft=draft, return_dict_in_generate=True)
    assert torch.equal(a.sequences, b.sequences)
    assert b.scores is None
    assert b.logits is None


def test_compute_transition_scores_works(model, draft):
    _, out = both(
        model,
        draft=draft,
        return_dict_in_generate=True,
        output_scores=True,
    )
    got = model.compute_transition_scores(
        out.sequences, out.scores, normalize_logits=True
    )
    assert got.shape == (3, 12)
    assert bool((got <= 0).all())


# Sampling


WARPERS = [
    {"temperature": 0.6},
    {"temperature": 1.4, "top_k": 4},
    {"top_p": 0.7},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("warp", WARPERS)
def test_warpers_are_applied_exactly_once(warp, model, draft):
    """The scores say which law was sampled: they equal those of
    transformers' processors on the same prefixes."""
    options = {"top_k": 0, "do_sample": True, **warp}
    out = model.generate(
        IDS,
        custom_generate=specref.custom_generate,
        draft=draft,
        seed=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **ask(**options),
    )
    config = transformers.GenerationConfig(**ask(**options))
    model._prepare_special_tokens(config)
    warpers = model._get_logits_processor(config, 6)
    assert len(warpers) == len(warp)
    for raw, scores in zip(out.logits, out.scores, strict=True):
        torch.testing.assert_close(scores, warpers(None, raw.clone()))


@pytest.mark.parametrize("name", ["speculative", "rsd", "prompt_lookup"])
def test_the_sampled_law_is_the_targets(name, model, draft):
    """The exact law of ``generate`` itself, by enumeration.

    Logits are float32, hence not 1e-12.  The second half shows that a
    temperature applied twice, or never, would not pass.
    """
    ids = torch.tensor([[5, 9, 5, 4, 5]])

    def run(draws):
        out = model.generate(
            ids,
            custom_generate=specref.custom_generate,
            specref_method=name,
            draft=None if name == "prompt_lookup" else draft,
            seed=draws,
            max_new_tokens=2,
            pad_token_id=22,
            do_sample=True,
            temperature=2.5,
            top_k=3,
        )
        return out[0, 5:].tolist()

    got = specref.law(run)
    assert specref.total_variation(got, pair_law(model, ids, 2.5, 3)) < 1e-5
    for wrong in (1.0, 2.5**2):
        other = pair_law(model, ids, wrong, 3)
        assert specref.total_variation(got, other) > 0.01


def pair_law(model, ids, temperature, k):
    out = {}
    for a, pa in one_law(model, ids, temperature, k).items():
        row = torch.cat((ids, torch.tensor([[a]])), 1)
        for b, pb in one_law(model, row, temperature, k).items():
            out[a, b] = pa * pb
    return out


def one_law(model, ids, temperature, k):
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    value, index = logits.topk(k)
    law = (value / temperature).softmax(-1)
    return dict(zip(index.tolist(), law.tolist(), strict=True))


def test_seeds(model, draft):
    def once(**more):
        return model.generate(
            IDS,
            custom_generate=specref.custom_generate,
            draft=draft,
            **ask(do_sample=True, top_k=0, **more),
        )

    assert torch.equal(once(seed=1), once(seed=1))
    assert not torch.equal(once(seed=1), once(seed=2))
    # Without a seed, transformers' own way of seeding rules.
    transformers.set_seed(4)
    first = once()
    assert not torch.equal(first, once())
    transformers.set_seed(4)
    assert torch.equal(first, once())


def test_a_sampled_row_of_a_batch_equals_its_solo_run(model, draft):
    """Row 0 has the seed's own stream in both."""
    kw = {"do_sample": True, "top_k": 7, "seed": 5, "draft": draft}
    kw["custom_generate"] = specref.custom_generate
    kw["repetition_penalty"] = 1.2
    many = model.generate(IDS, **ask(**kw))
    kw["attention_mask"] = MASK[:1]
    solo = model.generate(IDS[:1], **ask(**kw))
    assert torch.equal(many[:1], solo)


def test_several_sequences_of_one_prompt(model, draft):
    out = model.generate(
        IDS[:1],
        custom_generate=specref.custom_generate,
        draft=draft,
        num_return_sequences=3,
        seed=0,
        **ask(attention_mask=None, do_sample=True, top_k=0, pad_token_id=22),
    )
    assert out.shape == (3, 18)
    assert len({tuple(row) for row in out.tolist()}) == 3


# Streamers


class Collect:
    def __init__(self):
        self.got, self.ends = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        self.got.append(value.tolist())

    def end(self):
        self.ends += 1


def test_a_streamer_gets_the_prompt_then_blocks_then_the_end(model, draft):
    streamer = Collect()
    out = model.generate(
        IDS[:1],
        streamer=streamer,
        custom_generate=specref.custom_generate,
        draft=draft,
        **ask(attention_mask=None, pad_token_id=22),
    )
    assert streamer.ends == 1
    assert streamer.got[0] == IDS[:1].tolist()
    blocks = streamer.got[1:]
    assert sum(blocks, []) == out[0, 6:].tolist()
    assert max(map(len, blocks)) > 1  # a block per round, not per token


def test_a_batch_streams_the_columns_that_generate_streams(model, draft):
    plain = model.generate(IDS, **ask())
    ends = [int(plain[0, 9])]
    theirs, ours = Collect(), Collect()
    model.generate(IDS, streamer=theirs, **ask(eos_token_id=ends))
    model.generate(
        IDS,
        streamer=ours,
        custom_generate=specref.custom_generate,
        draft=draft,
        **ask(eos_token_id=ends),
    )
    assert ours.got == theirs.got
    assert ours.ends == 1


class Letters:
    """A tokenizer, as far as a streamer asks."""

    def decode(self, ids, **_):
        ids = [ids] if isinstance(ids, int) else ids
        return "".join("abcdefghijklmnopqrstuvw"[i] for i in ids)


def test_text_streamers_work(model, draft, capsys):
    kw = ask(attention_mask=None, pad_token_id=22, draft=draft)
    kw["custom_generate"] = specref.custom_generate
    plain = model.generate(IDS[:1], **kw)
    text = Letters().decode(plain[0, 6:].tolist())
    streamer = transformers.TextStreamer(Letters(), skip_prompt=True)
    model.generate(IDS[:1], streamer=streamer, **kw)
    assert capsys.readouterr().out == text + "\n"
    later = transformers.TextIteratorStreamer(Letters(), skip_prompt=True)
    model.generate(IDS[:1], streamer=later, **kw)
    assert "".join(later) == text


# Stopping criteria


class Pair(StoppingCriteria):
    """Stops rows whose last two tokens are a pair; notes all it is asked."""

    def __init__(self, pair):
        self.pair, self.asked = pair, []

    def __call__(self, ids, scores, **kwargs):
        self.asked += [tuple(row) for row in ids.tolist()]
        ends = [row[-2:] == self.pair for row in ids.tolist()]
        return torch.tensor(ends)


@pytest.mark.parametrize("k", range(7, 13))
def test_criteria_see_full_ids_after_every_token(k, model, draft):
    ids, kw = IDS[:1], ask(attention_mask=None, pad_token_id=22)
    plain = model.generate(ids, **kw)[0].tolist()
    pair = plain[k - 1 : k + 1]
    theirs, ours = Pair(pair), Pair(pair)
    a = model.generate(ids, stopping_criteria=[theirs], **kw)
    b = model.generate(
        ids,
        stopping_criteria=StoppingCriteriaList([ours]),
        custom_generate=specref.custom_generate,
        draft=draft,
        **kw,
    )
    assert torch.equal(a, b)
    assert theirs.asked == ours.asked


def test_a_criterion_may_end_one_row_of_a_batch(model, draft):
    plain = model.generate(IDS, **ask())
    pair = plain[1, 8:10].tolist()
    # With some EOS, transformers fills rows that ended with padding.
    a, b = (
        model.generate(
            IDS,
            stopping_criteria=[Pair(pair)],
            **extra,
            **ask(eos_token_id=[21], pad_token_id=22),
        )
        for extra in (
            {},
            {"custom_generate": specref.custom_generate, "draft": draft},
        )
    )
    assert (a[1, 10:] == 22).all()
    assert torch.equal(a, b)


def test_criteria_get_scores_when_they_are_asked_for(model, draft):
    class Sees(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            got.append(len(scores))
            return torch.tensor([len(scores) == 4])

    got = []
    out = model.generate(
        IDS[:1],
        stopping_criteria=[Sees()],
        custom_generate=specref.custom_generate,
        draft=draft,
        return_dict_in_generate=True,
        output_scores=True,
        **ask(attention_mask=None, pad_token_id=22),
    )
    assert got == [1, 2, 3, 4]
    assert out.sequences.shape[1] == 10


# Drafts


def test_an_assistant_model_is_the_draft(model, draft):
    calls = []
    hook = draft.register_forward_hook(lambda *_: calls.append(1))
    ids = IDS[:1]
    got = model.generate(
        ids,
        assistant_model=draft,
        custom_generate=specref.custom_generate,
        **ask(attention_mask=None, pad_token_id=22),
    )
    hook.remove()
    assert calls
    want = model.generate(ids, **ask(attention_mask=None, pad_token_id=22))
    assert torch.equal(got, want)


def test_our_own_decoder_drafts_for_a_transformers_model(model):
    a, b = both(model, draft=every.draft())
    assert torch.equal(a, b)


def test_generate_of_specref_takes_two_transformers_models(model, draft):
    prompt = IDS[0].tolist()
    want = model.generate(IDS[:1], **ask(attention_mask=None, pad_token_id=22))
    got = specref.generate(
        model, prompt, "speculative", draft=draft, max_new_tokens=12
    )
    assert got.tokens == want[0, 6:].tolist()
    assert got.tau > 1.0
    rows = specref.generate(
        model,
        [prompt, [7, 2]],
        "rsd",
        draft=draft,
        max_new_tokens=12,
        temperature=0.8,
    )
    assert [len(r.tokens) for r in rows] == [12, 12]


def test_vocabularies_that_differ_in_padding(model):
    """The target's head is wider than the draft's: say so, or widen."""
    narrow = every.near(vocab_size=20)
    with pytest.raises(ValueError, match="draft vocabulary 20 differs"):
        both(model, draft=narrow)
    a, b = both(model, draft=HF(narrow, vocab_size=V))
    assert torch.equal(a, b)
    wide = every.near(vocab_size=31)
    a, b = both(model, draft=HF(wide, vocab_size=V))
    assert torch.equal(a, b)
    prompt = IDS[0].tolist()
    for name in ("speculative", "rsd", "topk_tree", "block"):
        for temperature in (0.0, 1.0):
            got = specref.generate(
                model,
                prompt,
                name,
                draft=HF(wide, vocab_size=V),
                max_new_tokens=12,
                temperature=temperature,
            )
            assert max(got.tokens) < V


def test_a_prompt_beyond_a_narrow_drafts_vocabulary(model):
    ids = torch.tensor([[22, 21, 5, 22]])
    narrow = HF(every.near(vocab_size=20), vocab_size=V)
    a, b = both(model, ids, draft=narrow, attention_mask=None)
    assert torch.equal(a, b)


# Errors


REFUSED = [
    ({"num_beams": 2}, "got beam_search"),
    ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
    (
        {"return_dict_in_generate": True, "output_attentions": True},
        "output_attentions is not supported",
    ),
    (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states is not supported",
    ),
    ({"guidance_scale": 1.5}, "guidance_scale is not supported"),
    ({"specref_method": "nonsense"}, "unknown method 'nonsense'"),
    ({"specref_options": {"width": 3}}, "takes no option 'width'"),
    ({"gamma": 0}, "gamma must be at least 1, got 0"),
    (
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]] * 3)},
        "row 0 hides its last token",
    ),
    ({"pad_token_id": None}, "pad_token_id must be set for a batch"),
    (
        {"position_ids": torch.arange(6).expand(3, 6) + 1},
        "position_ids must count",
    ),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSED)
def test_what_is_not_handled_is_refused(bad, message, model):
    if "output_attentions" in bad:
        model = tiny.hf_model()
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=message):
        model.generate(
            IDS, custom_generate=specref.custom_generate, **ask(**bad)
        )


def test_a_filled_cache_and_embeddings_are_refused(model):
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(IDS[:1, :3], cache=cache)
    kw = ask(attention_mask=None, pad_token_id=22)
    kw["custom_generate"] = specref.custom_generate
    with pytest.raises(ValueError, match="must be empty or left out"):
        model.generate(IDS[:1], cache=cache, **kw)
    embeds = model.get_input_embeddings()(IDS[:1]).detach()
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        model.generate(IDS[:1], inputs_embeds=embeds, **kw)


def test_it_says_how_it_is_called(model):
    with pytest.raises(ValueError, match="called by model.generate"):
        specref.custom_generate(model, IDS)


def test_the_models_state_is_left_alone(model, draft):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.generation_config.to_dict()
    _, out = both(model, draft=draft, return_dict_in_generate=True)
    assert not out.sequences.is_inference()
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )
    assert model.generation_config.to_dict() == config
