"""GLIDE and CaPE: in the loop as in training, masked, and lossless."""

from __future__ import annotations

from dataclasses import replace

import every
import heads
import pytest
import tiny
import torch
from cases import TOLERANCE, Case, Memo, truth

from specref import rules
from specref.decode import Request, rounds
from specref.draft.cape import BINS, Cape
from specref.draft.grow import Static
from specref.draft.head import HeadDrafter
from specref.draft.sprout import Sprout
from specref.draws import Seeded
from specref.heads import glide
from specref.heads.base import Text
from specref.heads.glide import Glide, block_mask
from specref.laws import Law, law, total_variation
from specref.lm.llama import Attend
from specref.tree import DETERMINISTIC, EMPTY, IID, ROOT, Tree
from specref.warp import Sampling, Warp

FEW = (3, 3, 2, 1)  # bins for a small vocabulary


def made(lm, words=None) -> Glide:
    words = torch.arange(lm.vocab_size) if words is None else words
    return heads.randomised(Glide(lm, words))


def known(lm, count: int = 12, rows: int = 2) -> Text:
    source = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, lm.vocab_size, (rows, count), generator=source)
    return heads.features(lm, tokens, (len(lm.layers) - 1,))


# --- the head -------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_loop_says_what_training_says(family):
    lm = tiny.llama(family)
    head = made(lm, torch.arange(20).flip(0))
    assert heads.rollout_gap(head, lm) < 1e-10
    assert heads.rollout_gap(head, lm, (4, 7)) < 1e-10


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_keys_are_those_of_the_targets_cache(family):
    lm = tiny.llama(family)
    text = known(lm)
    n = text.hidden.shape[1]
    cache = lm.new_cache(2, n)
    lm.forward(text.tokens[:, :-1], cache)
    cos, sin = lm.angles(torch.arange(n).expand(2, n), lm.dtype)
    k, v = made(lm).theirs(text.taps[0], cos[:, :, None], sin[:, :, None])
    torch.testing.assert_close(k, cache.k[-1], atol=1e-12, rtol=0)
    torch.testing.assert_close(v, cache.v[-1], atol=1e-12, rtol=0)


def test_what_is_trained_is_the_heads_own():
    """Every trained weight gets a gradient; the target's get none."""
    lm = tiny.llama("qwen3")
    head = Glide(lm, torch.arange(20)).double()
    text = known(lm)
    loss = sum(head.project(x).square().mean() for x in head.rollout(text, 2))
    loss.backward()
    mine = head.trained()
    assert not [n for n in mine if n.startswith(("embed", "head", "theirs"))]
    assert [n for n in mine if n.startswith("cross.")]
    for name, weight in mine.items():
        assert weight.grad is not None and weight.grad.any(), name
    assert all(w.grad is None for w in head.theirs.parameters())


def test_the_sizes_of_the_embedded_model_stay_small():
    sizes = {"hidden_size": 576, "intermediate_size": 1536}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    lm = tiny.llama(num_hidden_layers=1, **sizes)
    head = Glide(lm, torch.arange(20))
    assert sum(w.numel() for w in head.trained().values()) < 3_200_000


def sees(head: Glide, text: Text, step: int, spot: int) -> list[int]:
    """Target positions that entry ``spot`` of a step depends on."""
    tap = text.taps[0].clone().requires_grad_(True)
    out = head.rollout(replace(text, taps=(tap,)), step + 1)[step]
    slope = torch.autograd.grad(out[0, spot].square().sum(), tap)[0][0]
    return slope.abs().amax(-1).nonzero().squeeze(-1).tolist()


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_block_mask_is_what_decoding_sees(block):
    """A round from the block's start: the last committed token stands
    there, and what the head says depends on the keys before it only."""
    lm = tiny.llama()
    head, text = made(lm), known(lm, rows=1)
    n = text.hidden.shape[1]
    mask = block_mask(n, block)
    for start in range(block, n, block):
        for s in range(min(block, n - start)):
            want = mask[start + s].nonzero().squeeze(-1).tolist()
            assert sees(head, text, s, start - 1) == want
            assert want == list(range(start))
    assert torch.equal(
        mask[:block, :block], torch.ones(block, block).tril() > 0
    )
    assert not mask[:block, block:].any()


@torch.inference_mode()
def test_block_mask_is_what_the_state_sees():
    """The same for the loop: with other streams from position 6 on, a
    round that starts there says the same; from 5 on, it does not."""
    lm = tiny.llama()
    head, text = made(lm), known(lm, rows=1)

    def said(from_: int) -> torch.Tensor:
        tap = text.taps[0].clone()
        tap[:, from_:] += 1.0
        changed = replace(text, taps=(tap,))
        state = head.state(1, 40)
        out = [state.begin([heads.pairs(changed, 0, 6)])]
        for s in range(2):
            new = text.tokens[:, 7 + s : 8 + s]
            out.append(state.extend(new, torch.tensor([[s - 1]]))[:, 0])
        return torch.stack(out)

    assert block_mask(9, 6)[6:].sum(1).tolist() == [6, 6, 6]
    assert torch.equal(said(6), said(99))
    moved = (said(5) - said(99)).abs().flatten(1).amax(1)
    assert (moved > 1e-6).all()


def test_bad_arguments_are_named():
    lm = tiny.llama()
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        Glide(lm, torch.arange(4), width=0)
    with pytest.raises(ValueError, match="n and block"):
        block_mask(4, 0)
    with pytest.raises(ValueError, match="n and block"):
        block_mask(0, 4)
    with pytest.raises(ValueError, match="gamma must be at least 1, got 0"):
        Cape(0)
    for bins in ((), (2, 0)):
        with pytest.raises(ValueError, match="bins must hold"):
            Cape(2, bins)


# --- the trees ------------------------------------------------------------


class Scripted:
    """A stepper whose laws are a function of the text."""

    pending = 0

    def __init__(self, laws: dict[tuple[int, ...], list[float]]) -> None:
        self.laws, self.text = laws, [()]

    def begin(self) -> torch.Tensor:
        return torch.tensor([self.laws[()]]).log()

    def extend(self, tokens, parents) -> torch.Tensor:
        (token,), (up,) = tokens[0].tolist(), parents[0].tolist()
        assert up == self.pending - 1  # only the chain is stepped
        self.text.append((*self.text[up + 1], token))
        self.pending += 1
        return torch.tensor([[self.laws[self.text[-1]]]]).log()


LAWS = {
    (): [0.1, 0.7, 0.2, 0.0],
    (1,): [0.3, 0.25, 0.25, 0.2],
    (1, 0): [0.02, 0.03, 0.95, 0.0],
}


def grown(policy: Cape, room: int = 9, eos=frozenset()) -> Tree:
    stepper = Scripted(LAWS)
    (tree,) = policy.grow(
        stepper, [Sprout([7], room)], stepper.begin(), Sampling(), [], eos
    )
    return tree


def test_a_chain_with_more_beside_it_where_it_is_unsure():
    tree = grown(Cape(3, (4, 3, 2, 1)))
    assert tree.kind == DETERMINISTIC
    # 0.7: two; 0.3: three, ties by lower index; 0.95: the chain alone.
    assert tree.tokens == (1, 2, 0, 1, 2, 2)
    assert tree.parents == (ROOT, ROOT, 0, 0, 0, 2)
    many = grown(Cape(1, (4,)))
    assert many.tokens == (1, 2, 0)  # what the draft cannot say stays out
    short = grown(Cape(3, (4, 3, 2, 1)), room=1)
    assert short.tokens == (1, 2)
    ended = grown(Cape(3, (4, 3, 2, 1)), eos=frozenset({0}))
    assert ended.tokens == (1, 2, 0, 1, 2)


def test_bins_share_the_unit_interval():
    cape = Cape()
    assert cape.bins == BINS and cape.max_nodes == 5 * 8
    want = {0.0: 8, 0.29: 8, 0.31: 6, 0.61: 4, 0.79: 4, 0.81: 2, 1.0: 2}
    assert {c: cape.count(c) for c in want} == want


@torch.inference_mode()
def test_the_chain_is_the_heads_greedy_rollout():
    lm = tiny.llama()
    head, text = made(lm), known(lm, rows=1)
    prompt = text.tokens[0].tolist()
    drafter = HeadDrafter(head, Cape(4, FEW))
    loop = rounds(
        lm,
        drafter,
        rules.get("recursive"),
        Request([prompt], [Seeded(0)], 6, Sampling(Warp(0.0))),
    )
    tree = next(loop).trees[0]
    last = [i for i in range(len(tree)) if tree.depth(i) == 4][0]
    tokens, n = list(prompt), len(prompt)
    for s, node in enumerate(tree.path(last)):
        row = torch.tensor([tokens])
        longer = heads.features(lm, row, head.taps)
        out = head.rollout(longer, s + 1)[s][0, n - 2]
        assert tree.tokens[node] == int(head.logits(out).argmax())
        tokens.append(tree.tokens[node])


# --- laws -----------------------------------------------------------------

POLICIES = {
    "cape": lambda: Cape(3, FEW),
    "chain-iid": heads.POLICIES["chain-iid"],
    "bushy-without_replacement": heads.POLICIES["bushy-without_replacement"],
    "dynamic": heads.POLICIES["dynamic"],
}


@pytest.mark.parametrize("sampling", heads.SAMPLINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_law(policy, sampling):
    lm = heads.target()
    head = made(lm, torch.tensor([2, 0]))  # the draft cannot say token 1
    far = heads.off(
        lm,
        head,
        POLICIES[policy],
        rules.get("recursive"),
        heads.SAMPLINGS[sampling],
    )
    assert far <= TOLERANCE


@pytest.mark.parametrize("rule", ["naive", "recursive", "traversal"])
def test_law_of_cape_on_five_words_with_an_end(rule):
    lm = heads.target(vocab_size=5)
    sampling = Sampling(Warp(0.7, top_p=0.8))
    far = heads.off(
        lm,
        made(lm),
        POLICIES["cape"],
        rules.get(rule),
        sampling,
        eos=frozenset({2}),
    )
    assert far <= TOLERANCE


def batch_law(lm, head, prompts, new: int) -> Law:
    def run(draws):
        own = [draws.row(b) for b in range(len(prompts))]
        out = [() for _ in prompts]
        drafter = HeadDrafter(head, POLICIES["cape"]())
        with torch.inference_mode():
            ask = Request(prompts, own, new)
            for r in rounds(lm, drafter, rules.get("recursive"), ask):
                news = zip(out, map(tuple, r.tokens), strict=True)
                out = [old + new for old, new in news]
        return out

    return law(run, merge=True)


@pytest.mark.parametrize("prompts", [[(1, 0, 2), (2, 1)], [(0,), (1, 2, 0)]])
def test_rows_of_a_batch_are_independent(prompts):
    """Ragged rows, one without a pair in its first round."""
    lm = heads.target()
    got = batch_law(lm, made(lm), prompts, 2)
    probs = Memo(lm).probs
    case = Case("rows", probs, probs, new=2)
    a, b = (truth(case, p) for p in prompts)
    want = Law({(x, y): a[x] * b[y] for x in a for y in b})
    assert total_variation(got, want) <= TOLERANCE


def test_greedy_rows_of_a_batch():
    lm = tiny.llama()
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8]]
    got = heads.greedy_rows(
        lm,
        made(lm),
        lambda: Cape(4, FEW),
        rules.get("recursive"),
        prompts,
        12,
    )
    assert got == [every.greedy_reference(lm, p, 12) for p in prompts]


# --- broken variants, each of which must be seen ---------------------------


class Relabelled:
    """A policy whose trees are changed behind its back."""

    def __init__(self, inner, edit) -> None:
        self.inner, self.edit = inner, edit
        self.max_nodes = inner.max_nodes

    def grow(self, *args):
        return [self.edit(tree) for tree in self.inner.grow(*args)]


def same(tree: Tree) -> Tree:
    return tree


def drawn_called_top_k(tree: Tree) -> Tree:
    return Tree(tree.tokens, tree.parents, DETERMINISTIC)


def top_k_called_drawn(tree: Tree) -> Tree:
    """The largest children, judged as if drawn from an even law."""
    n = len(tree)
    q = torch.full((n, heads.V), 1 / heads.V, dtype=torch.float64)
    return Tree(tree.tokens, tree.parents, IID, q, tuple(range(n)))


def unsure_end_dropped(tree: Tree) -> Tree:
    if not len(tree) or tree.law(len(tree) - 1)[tree.tokens[-1]] >= 0.34:
        return tree
    n = len(tree) - 1
    if not n:
        return EMPTY
    return Tree(
        tree.tokens[:n], tree.parents[:n], IID, tree.q[:n], tuple(range(n))
    )


@pytest.mark.parametrize(
    "kind, edit, biased",
    [
        (IID, same, False),
        # Any proposal is a point mass once it has been made.
        (IID, drawn_called_top_k, False),
        (IID, unsure_end_dropped, True),
        (DETERMINISTIC, same, False),
        (DETERMINISTIC, top_k_called_drawn, True),
    ],
)
def test_biased_proposals_are_caught(kind, edit, biased):
    lm = heads.target()
    off = heads.off(
        lm,
        made(lm),
        lambda: Relabelled(Static(heads.CHAIN, kind), edit),
        rules.get("recursive"),
        Sampling(),
        new=3,
    )
    assert off > 1e-6 if biased else off <= TOLERANCE


def leaky(self, text, depth):
    """Step ``s`` sees the keys of its own guesses, as a plain causal mask
    over known text would let it."""
    n = text.tokens.shape[1] - 1
    where = torch.arange(n)
    out = []
    for tokens, at in glide.unroll(self, text.tokens[:, 1:], depth):
        if not out:
            k, v = self.theirs(text.taps[0], at.cos, at.sin)
        seen = where <= where[:, None] + len(out)
        see = Attend(
            at.cos[:, :, 0],
            at.sin[:, :, 0],
            seen.expand(len(tokens), n, n),
            None,
        )
        out.append(self.step(tokens, k, v, at, see))
    return out


def unrotated(self, stream, cos, sin):
    return sound_keys(self, stream, torch.ones_like(cos), 0 * sin)


def stale_rows(self, tokens, parents):
    """Every row sees as many keys as the longest one."""
    own = self.cache.length
    try:
        self.cache.length = Longest(own)
        return sound_extend(self, tokens, parents)
    finally:
        self.cache.length = list(own)


class Longest(list):
    """Lengths that become the longest one where a mask is made of them."""

    def __iter__(self):
        return iter([max(self[i] for i in range(len(self)))] * len(self))


def guesses_as_pairs(self, tokens, parents):
    """A guess's output is taken for the target's stream."""
    known_ = torch.cat((self.root[:, None], self.guesses), 1)
    pick = (parents.clamp(min=ROOT) + 1)[..., None]
    stream = known_.gather(1, pick.expand(-1, -1, known_.shape[-1]))
    out = self._step(tokens, stream, parents)
    self.guesses = torch.cat((self.guesses, out), 1)
    return self.head.logits(out)


sound_keys, sound_extend = glide.Keys.forward, glide.GlideState.extend


@pytest.mark.parametrize(
    "owner, name, broken",
    [
        (Glide, "rollout", leaky),
        (glide.GlideState, "extend", stale_rows),
        (glide.GlideState, "extend", guesses_as_pairs),
    ],
)
def test_a_wrong_sight_is_caught(owner, name, broken, monkeypatch):
    lm = tiny.llama()
    head = made(lm)
    assert heads.rollout_gap(head, lm) < 1e-10
    monkeypatch.setattr(owner, name, broken)
    assert heads.rollout_gap(head, lm) > 1e-3


def test_keys_without_their_positions_are_caught(monkeypatch):
    monkeypatch.setattr(glide.Keys, "forward", unrotated)
    with pytest.raises(AssertionError):
        test_keys_are_those_of_the_targets_cache("llama")


def on_the_wrong_branch(tree: Tree) -> Tree:
    """The chain goes on below the first sibling."""
    parents = tuple(
        p + 1 if p != ROOT and tree.parents[p + 1] == tree.parents[p] else p
        for p in tree.parents
    )
    return Tree(tree.tokens, parents, DETERMINISTIC)


def test_a_chain_on_the_wrong_branch_is_caught(monkeypatch):
    """It is lossless all the same, so the law cannot tell."""
    sound = Cape.grow
    monkeypatch.setattr(
        Cape,
        "grow",
        lambda self, *a: [on_the_wrong_branch(t) for t in sound(self, *a)],
    )
    lm = heads.target()
    far = heads.off(
        lm, made(lm), POLICIES["cape"], rules.get("recursive"), Sampling(), 3
    )
    assert far <= TOLERANCE
    with pytest.raises(AssertionError):
        test_a_chain_with_more_beside_it_where_it_is_unsure()
