"""Code that must not care where tensors live, checked without a GPU.

Whole decoding runs happen on the pretended device of `far`: a tensor made
on the CPU by accident, or a ``.cpu()`` that only works there, is an error.
`tests/test_lm.py` has the forward on "meta" and the graph without breaks.
"""

from __future__ import annotations

import every
import pytest
import tiny
import torch
import toy_vocab
from far import FAR, Far, FarDevice, send

import specref
from specref.api import default_method
from specref.lm import Llama
from specref.registry import methods

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 1, 4]
EXTRA = {
    "early_exit": {"layers": 2},
    "sequoia": {"accept": (0.6, 0.2, 0.1), "nodes": 6, "depth": 3},
}
COPIES = ("int8", "int4")  # CPU kernels only


def near_and_far() -> tuple[Llama, Llama]:
    return tiny.llama(), send(tiny.llama())


def decode(lm: Llama, method: str, temperature: float, **extra):
    options = dict(EXTRA.get(method, {}))
    build = next(m for m in methods() if m.name == method)
    if "draft" in build.options:
        draft = tiny.llama(seed=1, num_hidden_layers=1)
        options["draft"] = draft if lm.device.type == "cpu" else send(draft)
    if "tokenizer" in build.options:
        options |= toy_vocab.pair23()
    if "head" in build.options:
        options |= every.headed_options(method, build.options)
        if lm.device.type != "cpu":
            send(options["head"])
    return specref.generate(
        lm,
        PROMPT,
        method,
        temperature=temperature,
        max_new_tokens=7,
        **options,
        **extra,
    )


# The pretended device itself


def test_the_pretended_device_computes_and_refuses_mixtures():
    with FarDevice() as device:
        a = torch.arange(6.0, device=FAR).view(2, 3)
        b = torch.tensor([[1.0], [2.0]], device=FAR)
        assert isinstance(a, Far)
        assert a.device == FAR
        assert device.reads == 0
        assert (a * b).sum().item() == 3.0 + 2 * 12.0
        assert (a + torch.tensor(1.0)).tolist()[0] == [1.0, 2.0, 3.0]
        assert device.reads == 2
        a[0, torch.tensor([1, 2])] = 7.0  # near indices: as CUDA allows
        assert a.cpu().tolist()[0] == [0.0, 7.0, 7.0]
        with pytest.raises(RuntimeError, match="mixes devices"):
            a + torch.ones(3)
        with pytest.raises(RuntimeError, match="mixes devices"):
            torch.arange(4)[torch.tensor([1], device=FAR)]
        with pytest.raises(RuntimeError, match="mixes devices"):
            a.gather(1, torch.tensor([[0], [1]]))


def test_an_accident_in_the_forward_is_noticed(monkeypatch):
    """A cache that makes its slots on the CPU fails here."""
    from specref.lm import rotary as room

    def careless(config, device):
        return rotary(config, "cpu")

    rotary = room.rotary
    monkeypatch.setattr(room, "rotary", careless)
    lm = send(tiny.llama())
    with FarDevice(), pytest.raises(RuntimeError, match="mixes devices"):
        decode(lm, "autoregressive", 0.0)


# Decoding


@pytest.mark.parametrize("method", [m.name for m in methods()])
def test_every_method_says_the_same_on_another_device(method):
    near, far = near_and_far()
    for temperature in (0.0, 0.8):
        if method in COPIES:
            with FarDevice(), pytest.raises(ValueError, match="CPU kernels"):
                decode(far, method, temperature)
            continue
        want = decode(near, method, temperature)
        with FarDevice():
            got = decode(far, method, temperature)
        assert got.tokens == want.tokens
        assert len(got.rounds) == len(want.rounds)


def test_a_batch_with_top_k_and_top_p_says_the_same():
    near, far = near_and_far()
    prompts = [PROMPT, [2, 0], [7]]
    options = {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "seed": 5}
    for method in ("autoregressive", "prompt_lookup"):
        want = specref.generate(
            near, prompts, method, max_new_tokens=6, **options
        )
        with FarDevice():
            got = specref.generate(
                far, prompts, method, max_new_tokens=6, **options
            )
        assert [r.tokens for r in got] == [r.tokens for r in want]


def test_auto_is_a_method_that_runs_on_the_device():
    near, far = near_and_far()
    assert default_method(far) not in COPIES
    want = specref.generate(near, PROMPT, "autoregressive", max_new_tokens=6)
    with FarDevice():
        got = specref.generate(far, PROMPT, max_new_tokens=6)
    assert got.tokens == want.tokens


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral-window"])
def test_every_kind_of_layer_decodes_on_another_device(family):
    near, far = tiny.llama(family), send(tiny.llama(family))
    want = decode(near, "topk_tree", 0.0)
    with FarDevice():
        got = decode(far, "topk_tree", 0.0)
    assert got.tokens == want.tokens


# Waits


@pytest.mark.parametrize("tree", [False, True])
def test_a_forward_reads_nothing_back(tree):
    """No wait between the start of a forward and its logits; ``keep``
    with a path may read the tree's parents once."""
    lm = send(tiny.llama())
    with torch.inference_mode(), FarDevice() as device:
        cache = lm.new_cache(2, 32)
        tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], device=FAR)
        parents = None
        if tree:
            parents = torch.tensor([[-1, 0, 0], [-1, -1, 1]], device=FAR)
        out = lm.forward(tokens, cache, parents)
        assert isinstance(out.logits, Far)
        assert device.reads == 0
        cache.keep([[0], [0]])
        assert device.reads <= int(tree)


def test_greedy_decoding_waits_a_fixed_number_of_times():
    """Reads per token of the plain loop do not grow with the text."""
    lm = send(tiny.llama())
    counts = []
    for n in (4, 8, 12):
        with FarDevice() as device:
            specref.generate(
                lm, PROMPT, "autoregressive", max_new_tokens=n
            )
        counts.append(device.reads)
    assert counts[2] - counts[1] == counts[1] - counts[0]
    assert (counts[1] - counts[0]) / 4 <= 2  # a check for NaN, a token


# Shapes for graphs


def test_static_caches_keep_every_shape():
    """Same shapes in every round, so that a captured graph stays valid."""
    lm = tiny.llama()
    with torch.inference_mode():
        cache = lm.new_cache(1, 32, static=True)
        place, seen = cache.k.data_ptr(), set()
        for start in (0, 3, 6):
            tokens = torch.tensor([[1, 2, 3]])
            x, cos, sin, allowed = lm.begin(tokens, cache, None)
            seen.add((x.shape, cos.shape, sin.shape, allowed.shape))
            lm.core(x, cos, sin, allowed, cache)
            cache.close(3)
            cache.keep()
            assert cache.length == [start + 3]
        assert cache.k.data_ptr() == place
    assert len(seen) == 1


@pytest.mark.parametrize("static", [False, True])
def test_the_layers_compile_whole_and_say_the_same(static):
    import torch._dynamo as dynamo

    lm = tiny.llama("qwen3")
    with torch.inference_mode():
        dynamo.reset()
        core = torch.compile(lm.core, backend="eager", fullgraph=True)
        cache = lm.new_cache(1, 16, static=static)
        parents = torch.tensor([[-1, 0, 0, 1]])
        parts = lm.begin(torch.tensor([[1, 2, 3, 4]]), cache, parents)
        got, _ = core(*parts, cache)
        want = lm.forward(
            torch.tensor([[1, 2, 3, 4]]), lm.new_cache(1, 16), parents
        )
        torch.testing.assert_close(got, want.hidden)
