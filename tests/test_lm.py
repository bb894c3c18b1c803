"""The `LM` contract, held by every backend; `Llama` against transformers.

The contract is what the loop relies on: a tree forward equals one forward
per path, ``keep`` equals computing again, rows do not see each other.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import tiny
import torch

from specref.lm import HF, Llama, Table
from specref.tree import DEAD, ROOT, ancestors

V = 23
# transformers computes norms (and eager softmax) in float32 whatever the
# dtype: hence not 1e-12.  A wrong mask or position moves logits by O(1).
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-5)
#        0
#      / | \
#     1  2  3      two trees below the last committed token
#    /|  |
#   4 5  6
#   |
#   7
TREE = [ROOT, 0, 0, 0, 1, 1, 2, 4]
TOKENS = [3, 0, 11, 0, 22, 5, 7, 1]
OTHER = [ROOT, ROOT, 1, 1, 0, DEAD, DEAD, DEAD]
PROMPTS = [[5, 9, 0, 4, 1, 1], [0, 2]]


def table() -> Table:
    def law(context: tuple[int, ...]) -> list[float]:
        raw = [
            1.5 + math.sin(1.0 + i * (1 + sum(context)) + 3 * len(context))
            for i in range(V)
        ]
        return [x / sum(raw) for x in raw]

    return Table(law, V)


BACKENDS = {
    "table": table,
    "llama": tiny.llama,
    "llama-bias": lambda: tiny.llama("qwen2"),
    "llama-norm": lambda: tiny.llama("qwen3"),
    "llama-window": lambda: tiny.llama("mistral-window"),
    "llama-static": lambda: static(tiny.llama()),
    "llama-static-window": lambda: static(tiny.llama("mistral-window")),
    "hf-llama": lambda: HF(tiny.hf_model("llama3")),
    "hf-eager": lambda: HF(eager(tiny.hf_model())),
    "hf-qwen2": lambda: HF(tiny.hf_model("qwen2")),
    "hf-qwen3": lambda: HF(tiny.hf_model("qwen3")),
    "hf-mistral": lambda: HF(tiny.hf_model("mistral-window")),
    "hf-mixed": lambda: HF(mixed()),
    "hf-gpt2": lambda: HF(gpt2()),
}


def static(model: Llama) -> Llama:
    """The same model with caches of fixed shapes."""

    class Static(Llama):
        def new_cache(self, batch, capacity):
            return Llama.new_cache(self, batch, capacity, static=True)

    model.__class__ = Static
    return model


def eager(model):
    model.set_attn_implementation("eager")
    return model


def mixed():
    """Full and sliding layers in one model."""
    return tiny.hf_model(
        "qwen2",
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        layer_types=[
            "full_attention",
            "sliding_attention",
            "sliding_attention",
        ],
    )


def gpt2():
    """Learned absolute positions and other layer names."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64
    )
    return tiny.randomise(transformers.GPT2LMHeadModel(config), 0)


@pytest.fixture(params=BACKENDS)
def lm(request):
    with torch.inference_mode():
        yield BACKENDS[request.param]()


def feed(lm, rows):
    """A cache with the rows committed (padded behind, kept short)."""
    cache = lm.new_cache(len(rows), 64)
    width = max(map(len, rows))
    pad = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    lm.forward(pad, cache)
    cache.keep([range(len(row)) for row in rows])
    return cache


def solo(lm, context):
    """``[V]``: logits after ``context``, from nothing."""
    cache = lm.new_cache(1, 64)
    return lm.forward(torch.tensor([context]), cache).logits[0, -1]


def path(parents, node):
    out = []
    while node != ROOT:
        out.append(node)
        node = parents[node]
    return out[::-1]


def check_tree(lm, logits, context, tokens, parents, skip=0):
    for node, parent in enumerate(parents):
        if parent == DEAD or node < skip:
            continue
        below = [tokens[i] for i in path(parents, node)]
        close(
            logits[node - skip], solo(lm, [*context, *below])
        )


def test_a_tree_equals_its_paths(lm):
    cache = feed(lm, PROMPTS[:1])
    out = lm.forward(torch.tensor([TOKENS]), cache, torch.tensor([TREE]))
    assert out.logits.shape == (1, len(TREE), V)
    check_tree(lm, out.logits[0], PROMPTS[0], TOKENS, TREE)


def test_a_tree_below_nothing(lm):
    cache = lm.new_cache(1, 64)
    out = lm.forward(torch.tensor([TOKENS]), cache, torch.tensor([TREE]))
    check_tree(lm, out.logits[0], [], TOKENS, TREE)
    cache.keep([[0, 2]])
    assert cache.length == [2]
    out = lm.forward(torch.tensor([[8]]), cache)
    close(
        out.logits[0, 0], solo(lm, [TOKENS[0], TOKENS[2], 8])
    )


def test_a_tree_grown_by_levels_equals_one_forward(lm):
    cache = feed(lm, PROMPTS[:1])
    got = []
    for low, high in ((0, 1), (1, 4), (4, 7), (7, 8)):
        out = lm.forward(
            torch.tensor([TOKENS[low:high]]),
            cache,
            torch.tensor([TREE[low:high]]),
        )
        got += list(out.logits[0])
    assert cache.pending == len(TREE)
    check_tree(lm, got, PROMPTS[0], TOKENS, TREE)
    cache.keep([[0, 1, 4, 7]])
    out = lm.forward(torch.tensor([[2, 6]]), cache)
    want = [*PROMPTS[0], *(TOKENS[i] for i in (0, 1, 4, 7)), 2, 6]
    close(out.logits[0, 1], solo(lm, want))


def test_a_chain_grown_by_steps_and_a_branch_off_it(lm):
    cache = feed(lm, PROMPTS[:1])
    for token in (4, 8):
        out = lm.forward(torch.tensor([[token]]), cache)
    close(
        out.logits[0, 0], solo(lm, [*PROMPTS[0], 4, 8])
    )
    out = lm.forward(torch.tensor([[6]]), cache, torch.tensor([[0]]))
    close(
        out.logits[0, 0], solo(lm, [*PROMPTS[0], 4, 6])
    )
    cache.keep([[0, 2]])
    out = lm.forward(torch.tensor([[1]]), cache)
    close(
        out.logits[0, 0], solo(lm, [*PROMPTS[0], 4, 6, 1])
    )


def test_keep_equals_recompute_in_ragged_rows(lm):
    cache = feed(lm, PROMPTS)
    contexts = [list(p) for p in PROMPTS]
    trees = [TREE, OTHER]
    for kept in ([[0, 2, 6], [1]], [[0], [1, 3]], [[], [0, 4]], [[0, 3], []]):
        out = lm.forward(
            torch.tensor([TOKENS, TOKENS]), cache, torch.tensor(trees)
        )
        for b in range(2):
            check_tree(lm, out.logits[b], contexts[b], TOKENS, trees[b])
            contexts[b] += [TOKENS[i] for i in kept[b]]
        cache.keep(kept)
        assert cache.length == [len(c) for c in contexts]
    out = lm.forward(torch.tensor([[6, 2], [2, 0]]), cache)
    for b, end in enumerate(([6, 2], [2, 0])):
        close(
            out.logits[b, 1], solo(lm, [*contexts[b], *end])
        )


def test_rows_do_not_see_each_other(lm):
    alone = lm.forward(
        torch.tensor([TOKENS]), feed(lm, PROMPTS[:1]), torch.tensor([TREE])
    )
    for neighbour in ([7, 7, 7, 7, 7, 7, 7, 7, 7], [1]):
        cache = feed(lm, [PROMPTS[0], neighbour])
        both = lm.forward(
            torch.tensor([TOKENS, [9] * 8]), cache, torch.tensor([TREE, OTHER])
        )
        close(both.logits[0], alone.logits[0])


def test_a_row_may_stay_empty(lm):
    cache = feed(lm, [[], PROMPTS[0]])
    assert cache.length == [0, len(PROMPTS[0])]
    out = lm.forward(torch.tensor([[4, 5], [6, 7]]), cache)
    close(out.logits[0, 1], solo(lm, [4, 5]))
    close(
        out.logits[1, 1], solo(lm, [*PROMPTS[0], 6, 7])
    )


def test_truncate_forgets_the_end_and_the_pending(lm):
    cache = feed(lm, PROMPTS)
    lm.forward(torch.tensor([[1], [2]]), cache)
    cache.truncate([3, 2])
    assert cache.length == [3, 2]
    assert cache.pending == 0
    out = lm.forward(torch.tensor([[8], [8]]), cache)
    for b, n in enumerate((3, 2)):
        close(
            out.logits[b, 0], solo(lm, [*PROMPTS[b][:n], 8])
        )
    with pytest.raises(ValueError, match=r"length\[0\] must be in"):
        cache.truncate([9, 2])
    with pytest.raises(ValueError, match="one entry per row"):
        cache.truncate([1])


def test_logits_can_be_skipped(lm):
    cache = lm.new_cache(1, 8)
    out = lm.forward(torch.tensor([[1, 2]]), cache, logits=False)
    assert out.logits is None


def test_capacity_is_an_error_that_changes_nothing(lm):
    cache = lm.new_cache(2, 8)
    lm.forward(torch.tensor([[1] * 5] * 2), cache)
    cache.keep([range(5), range(2)])
    with pytest.raises(ValueError, match="capacity 8 exceeded: row 0"):
        lm.forward(torch.tensor([[1] * 4] * 2), cache)
    assert cache.pending == 0
    out = lm.forward(torch.tensor([[3], [3]]), cache)
    close(out.logits[1, 0], solo(lm, [1, 1, 3]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([[0, 8], [0]], "pending nodes in"),
        ([[-1], [0]], "pending nodes in"),
        ([[1, 0], [0]], "parent to child"),
        ([[1], [0]], "parent to child"),  # not from the first level
        ([[0, 4], [0]], "parent to child"),  # skips a level
        ([[0], [5]], "parent to child"),  # padding
        ([[0]], "one entry per row"),
        (None, "path must be given"),
    ],
)
def test_what_is_no_path_is_refused(lm, path, message):
    cache = feed(lm, PROMPTS)
    lm.forward(torch.tensor([TOKENS] * 2), cache, torch.tensor([TREE, OTHER]))
    with pytest.raises(ValueError, match=message):
        cache.keep(path)


def test_bad_shapes_and_parents_are_refused(lm):
    cache = feed(lm, PROMPTS)
    one = torch.tensor([[1], [1]])
    with pytest.raises(ValueError, match="parents must have the shape"):
        lm.forward(one, cache, torch.tensor([[-1, 0]] * 2))
    with pytest.raises(ValueError, match="parents must be earlier"):
        lm.forward(one, cache, torch.tensor([[0], [-1]]))
    with pytest.raises(ValueError, match=r"tokens must be \[2, n\]"):
        lm.forward(one[:1], feed(lm, PROMPTS))
    with pytest.raises(ValueError, match="must be at least 1"):
        lm.new_cache(0, 8)


# Llama against transformers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_llama_equals_transformers(family):
    theirs = tiny.hf_model(family)
    ours = tiny.llama(family)
    ids = torch.arange(2 * 40).reshape(2, 40) * 7 % V
    with torch.inference_mode():
        want = theirs(ids, output_hidden_states=True)
        got = ours(ids, taps=(0, 1, 3))
        cache = ours.new_cache(2, 40)
        ours(ids[:, :30], cache)
        cache.keep()
        late = ours(ids[:, 30:], cache)
    # Their norms work in float32, whatever the dtype.
    close(got.logits, want.logits)
    close(late.logits, got.logits[:, 30:])
    for tap, i in zip(got.taps, (0, 1), strict=False):
        close(tap, want.hidden_states[i])
    close(got.hidden, want.hidden_states[-1])


def test_taps_of_both_backends_agree():
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    ours, theirs = tiny.llama(), HF(tiny.hf_model())
    with torch.inference_mode():
        a = ours(ids, ours.new_cache(1, 8), taps=(3, 0, 2))
        b = theirs(ids, theirs.new_cache(1, 8), taps=(3, 0, 2))
    for x, y in zip(a.taps, b.taps, strict=True):
        close(x, y)
    close(a.hidden, b.hidden)
    close(ours.norm(a.taps[0]), a.hidden)


def test_early_exit_is_the_model_without_its_last_layers():
    full, ids = tiny.hf_model(), torch.tensor([[3, 1, 4, 1, 5]])
    ours = tiny.llama()
    del full.model.layers[2]
    full.config.num_hidden_layers = 2
    with torch.inference_mode():
        got = ours(ids, ours.new_cache(1, 8), layers=2).logits
        close(got, full(ids).logits)


def test_a_reduced_head_gives_the_rest_no_mass():
    model = Llama(tiny.llama().config, torch.tensor([2, 5, 7]))
    out = model(torch.tensor([[1, 2]])).logits
    assert out.shape == (1, 2, V)
    assert out[0, 0].isfinite().nonzero().flatten().tolist() == [2, 5, 7]


def test_a_sliding_window_far_behind_the_prompt():
    """Three windows past the start, committing tree paths all the way."""
    lm, context = tiny.llama("mistral-window"), [1, 2, 3]
    with torch.inference_mode():
        cache = feed(lm, [context])
        for _ in range(6):
            lm.forward(torch.tensor([TOKENS]), cache, torch.tensor([TREE]))
            cache.keep([[0, 2, 6]])
            context += [TOKENS[i] for i in (0, 2, 6)]
        out = lm.forward(torch.tensor([[9]]), cache)
        close(out.logits[0, 0], solo(lm, [*context, 9]))


def test_a_changed_mask_is_noticed():
    """The contract test sees a tree run as a chain (a mask that never
    reaches the layers is a known bug of several implementations)."""
    lm = tiny.llama()
    with torch.inference_mode():
        out = lm.forward(torch.tensor([TOKENS]), feed(lm, PROMPTS[:1]))
        with pytest.raises(AssertionError):
            check_tree(lm, out.logits[0], PROMPTS[0], TOKENS, TREE)


# Devices


@pytest.mark.parametrize("tree", [False, True])
def test_the_forward_runs_on_any_device(tree):
    """No tensor is made on the CPU by accident: everything on "meta"."""
    with torch.device("meta"):
        model = Llama(tiny.llama("qwen3").config)
    cache = model.new_cache(2, 64)
    parents = torch.tensor([TREE, OTHER]).to("meta") if tree else None
    tokens = torch.tensor([TOKENS] * 2).to("meta")
    cache.length = [3, 5]
    out = model(tokens, cache, parents, taps=(1,))
    assert out.logits.device.type == "meta"
    assert out.taps[0].shape == (2, 8, 32)


def test_layers_compile_without_graph_breaks():
    import torch._dynamo as dynamo

    model = tiny.llama()
    cache = model.new_cache(1, 32)
    dynamo.reset()
    with torch.inference_mode():
        report = dynamo.explain(model.core)(
            *model.begin(torch.tensor([[1, 2, 3]]), cache, None), cache
        )
    assert report.graph_break_count == 0
    assert report.graph_count == 1


# HF only


def test_padded_vocabularies_are_cut_and_widened():
    model = tiny.hf_model()
    with torch.inference_mode():
        ids = torch.tensor([[1, 2]])
        full = solo(HF(model), [1, 2])
        cut = HF(model, vocab_size=20)
        wide = HF(model, vocab_size=30)
        close(solo(cut, [1, 2]), full[:20])
        got = solo(wide, [1, 2])
        assert got.shape == (30,)
        assert bool((got[23:] == -torch.inf).all())
        close(got[:23], full)
        out = wide(torch.tensor([[29]]), wide.new_cache(1, 4))
        assert out.logits.isfinite().any()
        assert ids.shape == (1, 2)


def test_half_precision_logits_are_widened():
    lm = HF(tiny.hf_model().bfloat16())
    assert solo(lm, [1, 2]).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_left_padding_is_invisible(family):
    lm = HF(tiny.hf_model(family))
    with torch.inference_mode():
        cache = lm.new_cache(2, 64, pad=[0, 4])
        rows = torch.tensor([PROMPTS[0], [0] * 4 + PROMPTS[1]])
        lm.forward(rows, cache)
        cache.keep()
        out = lm.forward(
            torch.tensor([TOKENS, TOKENS]), cache, torch.tensor([TREE, TREE])
        )
        for b in range(2):
            check_tree(lm, out.logits[b], PROMPTS[b], TOKENS, TREE)


def test_models_that_cannot_roll_back_are_refused():
    import transformers

    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=V, hidden_size=8, num_hidden_layers=1
        )
    )
    with pytest.raises(ValueError, match="recurrent state"):
        HF(mamba)
    hybrid = tiny.hf_model()
    hybrid.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        HF(hybrid)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(
            vocab_size=V, hidden_size=8, n_layer=1, n_head=2
        )
    )
    with pytest.raises(ValueError, match="position_ids"):
        HF(bloom)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
        )
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        HF(t5)
    with pytest.raises(TypeError, match="causal language model"):
        HF(torch.nn.Linear(2, 2))


def test_flash_attention_and_dropout_are_refused():
    model = tiny.hf_model(attention_dropout=0.1)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        HF(model)
    model.eval()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        HF(model)


def test_hf_prints_no_warning(caplog, recwarn):
    lm = HF(tiny.hf_model())
    with torch.inference_mode():
        lm.forward(torch.tensor([[1, 2]]), lm.new_cache(1, 8))
    assert not caplog.records
    assert not [w for w in recwarn if "transformers" in str(w.filename)]


def test_ancestors_is_the_reference_relation():
    """The mask builder itself, against the definition."""
    sees = ancestors(torch.tensor([TREE, OTHER]))
    for b, parents in enumerate((TREE, OTHER)):
        for node, parent in enumerate(parents):
            want = {node} if parent == DEAD else set(path(parents, node))
            got = set(sees[b, node].nonzero().flatten().tolist())
            assert got == want
