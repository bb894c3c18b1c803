"""Medusa, Hydra and Hydra++: states, laws, mutants, trees.

Laws are enumerated on real tiny modules in float64; the target's forwards
are remembered by context.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import TOLERANCE, Case, Memo, truth
from every import greedy_reference
from tiny import llama, randomise

from specref.decode import Request, rounds
from specref.draft import known_shapes, shapes
from specref.draft.dynamic import Dynamic
from specref.draft.grow import Static
from specref.draft.head import HeadDrafter
from specref.draft.measured_tree import greedy_tree, head_accuracy, worth
from specref.draws import Draws, Seeded
from specref.heads.base import Pairs, Text
from specref.heads.blocks import DepthState, ResBlock
from specref.heads.hydra import Hydra, HydraState
from specref.heads.medusa import Medusa, MedusaState
from specref.laws import Law, law, total_variation
from specref.lm.base import Output
from specref.rules import LOSSLESS, Rule, typical
from specref.tree import (
    DEAD,
    DETERMINISTIC,
    IID,
    ROOT,
    WITHOUT_REPLACEMENT,
    Tree,
    ancestors,
    pack,
)
from specref.warp import Sampling, Warp

SCALES = (7.5, 0.5)
FORMS = {
    "medusa": (Medusa, {}),
    "medusa-mixed": (
        Medusa,
        {"blocks": 2, "mix": True, "scales": SCALES},
    ),
    "medusa-own": (Medusa, {"own_head": True, "head_bias": True}),
    "hydra": (Hydra, {}),
    "hydra-mixed": (
        Hydra,
        {"blocks": 2, "skip": False, "mix": True, "scales": SCALES},
    ),
    "hydra-own": (Hydra, {"own_head": True}),
    "hydra++": (Hydra, {"prefix": True}),
    "hydra++norm": (Hydra, {"prefix": True, "prefix_norm": True}),
}
PLAIN = ("medusa", "hydra", "hydra++")


def make(name: str, target, words: int = 20, seed: int = 3, **more):
    """A head of that form with random weights; the target keeps its own."""
    kind, options = FORMS[name]
    before = {n: w.clone() for n, w in target.named_parameters()}
    head = kind(target, torch.arange(words), **{**options, **more})
    randomise(head, seed)
    with torch.no_grad():
        for n, w in target.named_parameters():
            w.copy_(before[n])
        if not head.own_head:
            head.head.weight.copy_(target.head.weight[head.words])
    return head.requires_grad_(False)


@pytest.fixture(scope="module")
def target():
    return llama()


@pytest.fixture(scope="module")
def text(target):
    """Texts with features ``[2, 12]``."""
    with torch.inference_mode():
        tokens = Seeded(5).uniform((2, 13)).mul(23).long()
        out = target.forward(tokens, logits=False)
        return Text(tokens, out.hidden[:, :-1])


def pairs(text: Text, b: int, start: int, end: int) -> Pairs:
    said = text.tokens[b, start + 1 : end + 1].tolist()
    return Pairs(text.hidden[b, start:end], (), tuple(said))


NONE = Pairs(torch.empty(0), (), ())


# --- the head -------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_state_says_what_the_rollout_says(name, target, text):
    """Pairs come in pieces, of other sizes in each row."""
    head = make(name, target)
    with torch.inference_mode():
        rolled = head.rollout(text, 3)
        state = head.state(2, 60)
        at = [0, 0]
        for sizes in ((4, 2), (1, 3), (2, 0), (0, 1), (2, 3)):
            fresh = [
                pairs(text, b, at[b], at[b] + n) if n else NONE
                for b, n in enumerate(sizes)
            ]
            at = [a + n for a, n in zip(at, sizes, strict=True)]
            said = [state.begin(fresh)]
            for s in range(2):
                # The true token, and beside it one that was not said.
                true = [text.tokens[b, at[b] + 1 + s] for b in range(2)]
                tokens = torch.tensor(
                    [[int(t), (int(t) + 1) % 20] for t in true]
                )
                up = ROOT if s == 0 else 2 * (s - 1)
                out = state.extend(tokens, torch.full((2, 2), up))
                said.append(out[:, 0])
            for s, logits in enumerate(said):
                for b in range(2):
                    want = head.logits(rolled[s][b, at[b] - 1], s)
                    torch.testing.assert_close(
                        logits[b], want, atol=1e-10, rtol=0
                    )
            assert state.pending == 4


@pytest.mark.parametrize("name", PLAIN)
def test_nodes_of_different_depth_at_once(name, target, text):
    """Level by level, or all at once with padding: the same logits."""
    head = make(name, target)
    with torch.inference_mode():
        fresh = [pairs(text, b, 0, 5) for b in range(2)]
        one, two = head.state(2, 40), head.state(2, 40)
        one.begin(fresh), two.begin(fresh)
        top = one.extend(
            torch.tensor([[3, 7], [4, 0]]), torch.full((2, 2), -1)
        )
        low = one.extend(
            torch.tensor([[5, 2], [6, 1]]), torch.tensor([[1, 0], [0, 1]])
        )
        two.extend(torch.tensor([[3, 7], [4, 0]]), torch.full((2, 2), -1))
        mixed = two.extend(
            torch.tensor([[5, 3, 2], [6, 0, 1]]),
            torch.tensor([[1, -1, 0], [0, DEAD, 1]]),
        )
    torch.testing.assert_close(mixed[0, 0], low[0, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed[0, 2], low[0, 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed[0, 1], top[0, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed[1, 2], low[1, 1], atol=1e-12, rtol=0)


def test_medusa_does_not_see_the_path_and_hydra_does(target, text):
    for name in PLAIN:
        head = make(name, target)
        with torch.inference_mode():
            state = head.state(1, 40)
            state.begin([pairs(text, 0, 0, 5)])
            out = state.extend(torch.tensor([[3, 7]]), torch.full((1, 2), -1))
        assert torch.equal(out[0, 0], out[0, 1]) is (name == "medusa")


@pytest.mark.parametrize("name", FORMS)
def test_a_new_head_says_what_the_target_says(name, target, text):
    """Blocks start as the identity: every depth repeats the target's law
    (of a token earlier), as the papers initialise them."""
    kind, options = FORMS[name]
    if "norm" in name:  # a norm is no identity
        return
    head = kind(target, torch.arange(20), **options).double()
    with torch.inference_mode():
        for s, out in enumerate(head.rollout(text, 3)):
            want = target.head(text.hidden)[..., :20]
            torch.testing.assert_close(
                head.project(out, s), want, atol=1e-12, rtol=0
            )


@pytest.mark.parametrize("name", ["medusa-mixed", "hydra-mixed"])
def test_folding_changes_nothing(name, target, text):
    head = make(name, target)
    with torch.inference_mode():
        before = head.rollout(text, 3)
        head.fold()
        after = head.rollout(text, 3)
    assert all(
        m.scale is None for m in head.modules() if isinstance(m, ResBlock)
    )
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_what_is_trained(target):
    d, v = 32, 20
    square, bias = d * d, d
    sizes = {
        "medusa": 3 * (square + bias),
        "medusa-mixed": 3 * (2 * (square + bias) + square),
        "medusa-own": 3 * (square + bias) + 3 * (v * d + v),
        "hydra": sum(2 * ((i + 1) * square + bias) for i in (1, 2, 3)),
        "hydra-mixed": sum(
            ((i + 1) * square + bias) + (square + bias) + square
            for i in (1, 2, 3)
        ),
    }
    for name, size in sizes.items():
        kind, options = FORMS[name]
        own = kind(target, torch.arange(v), **options).trained()
        assert sum(w.numel() for w in own.values()) == size, name
        assert not any(n.startswith(("embed", "head.")) for n in own)


def test_the_prefix_alone_is_trained_on_the_heads_of_another(target, text):
    base = make("hydra", target)
    plus = Hydra(
        target, base.words, prefix=True, base=base, scales=SCALES
    ).double()
    assert {n.split(".")[0] for n in plus.trained()} == {"prefix"}
    assert not any(
        w.requires_grad
        for n, w in plus.named_parameters()
        if n.startswith("blocks")
    )
    with torch.inference_mode():  # the layer starts as the identity, and
        # the heads were copied into float32
        for a, b in zip(
            base.rollout(text, 3), plus.rollout(text, 3), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Medusa, {"heads": 0}, "heads must be at least 1"),
        (Medusa, {"blocks": 0}, "blocks must be at least 1"),
        (Hydra, {"blocks": 0}, "blocks must be at least 1"),
        (Medusa, {"mix": True, "own_head": True}, "mix must be False"),
        (Hydra, {"base": "hydra"}, "base needs prefix=True"),
    ],
)
def test_bad_options(kind, options, message, target):
    with pytest.raises(ValueError, match=message):
        kind(target, torch.arange(5), **options)


def test_a_base_that_does_not_fit(target):
    base, words = make("hydra", target), torch.arange(20)
    more = {"prefix": True, "base": base}
    for change, message in (
        ({"words": words.flip(0)}, "they must be the same"),
        ({"blocks": 2}, "same options"),
        ({"mix": True}, "same options"),
    ):
        change = {"words": words, **change}
        with pytest.raises(ValueError, match=message):
            Hydra(target, **change, **more)
    with pytest.raises(ValueError, match="without a prefix"):
        Hydra(target, words, prefix=True, base=make("medusa", target))


def test_no_head_for_that_depth(target, text):
    head = make("hydra", target)
    with pytest.raises(ValueError, match="depth must be at most 3"):
        head.rollout(text, 4)


@pytest.mark.parametrize("name", ["medusa", "medusa-own", "hydra-own"])
def test_fewer_words(name, target, text):
    head = make(name, target)
    with torch.inference_mode():
        full = [head.logits(r, s) for s, r in enumerate(head.rollout(text, 3))]
        head.truncate(7)
        for s, out in enumerate(head.rollout(text, 3)):
            some = head.logits(out, s)
            torch.testing.assert_close(
                some[..., :7], full[s][..., :7], atol=1e-12, rtol=0
            )
            assert bool((some[..., 7:] == -torch.inf).all())


# --- in the loop ----------------------------------------------------------

POLICIES = {
    "static": lambda: Static(shapes.branching((2, 2, 1)), DETERMINISTIC),
    "sampled": lambda: Static(shapes.branching((2, 1, 1)), IID),
    "dynamic": lambda: Dynamic(8, 4, 3),
}


def decode(target, drafter, prompts, sampling, count=12, eos=(), seed=0):
    """Each row's tokens, and the rounds."""
    ask = Request(
        prompts,
        [Seeded(seed + b) for b in range(len(prompts))],
        count,
        sampling,
        frozenset(eos),
    )
    out, seen = [[] for _ in prompts], []
    with torch.inference_mode():
        for r in rounds(target, drafter, LOSSLESS["recursive"], ask):
            seen.append(r)
            for row, new in zip(out, r.tokens, strict=True):
                row += new
    return out, seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FORMS)
def test_greedy_tokens_are_the_targets(name, policy, target):
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [4]]
    drafter = HeadDrafter(make(name, target), POLICIES[policy]())
    got, seen = decode(target, drafter, prompts, Sampling(Warp(0.0)))
    assert got == [greedy_reference(target, p, 12) for p in prompts]
    assert max(t.height for r in seen for t in r.trees) == 3


@pytest.mark.parametrize("name", PLAIN)
def test_rows_do_not_disturb_each_other(name, target):
    """Prompts and ends differ; a row alone draws the same tokens."""
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [4], [11, 0]]
    head, warm = make(name, target), Sampling(Warp(1.0))
    drafter = HeadDrafter(head, POLICIES["sampled"]())
    together, _ = decode(target, drafter, prompts, warm, eos=(0, 6, 13))
    assert len(set(map(len, together))) > 1
    for b, prompt in enumerate(prompts):
        alone, _ = decode(
            target, drafter, [prompt], warm, eos=(0, 6, 13), seed=b
        )
        assert alone[0] == together[b]


# --- laws -----------------------------------------------------------------


class Features(Memo):
    """A real module by context, its features with its logits."""

    def __init__(self, lm) -> None:
        super().__init__(lm)
        self.device, self.deep = lm.device, {}

    def law(self, context) -> torch.Tensor:
        key = tuple(context)
        if key not in self._memo:
            out = self.lm.forward(
                torch.tensor([key]), self.lm.new_cache(1, len(key))
            )
            self.deep[key] = out.hidden[0, -1]
            self._memo[key] = out.logits[0, -1]
        return self._memo[key]

    def forward(self, tokens, cache, *rest, **options) -> Output:
        base = cache.pending
        out = super().forward(tokens, cache, *rest, **options)
        zero = torch.zeros(self.lm.config.hidden_size, dtype=torch.float64)
        hidden = [
            torch.stack([self.deep.get(n, zero) for n in row[base:]])
            for row in cache.nodes
        ]
        return Output(out.logits, torch.stack(hidden))


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def little():
    """Vocabularies 3 and 4, and heads that cannot say the last token."""
    out = {}
    for vocab in (3, 4):
        lm = llama(**SMALL, vocab_size=vocab, seed=7)
        seen = Features(lm)
        words = vocab - (vocab == 4)
        heads = {n: make(n, lm, words, seed=1) for n in PLAIN}
        # Louder heads: laws that differ from the target's and by path.
        for head in heads.values():
            head.head.weight.mul_(2.0)
        out[vocab] = seen, heads
    return out


WARPS = {
    "T=0": Warp(0.0),
    "T=1": Warp(1.0),
    "T=0.7": Warp(0.7, top_p=0.9),
    "T=1.3": Warp(1.3, top_k=2),
}


def case_of(seen: Features, warp: str, vocab: int, new: int = 4) -> Case:
    return Case(
        warp,
        seen.probs,
        seen.probs,
        vocab,
        (1, 0, 2),
        new,
        frozenset({1}) if vocab == 4 else frozenset(),
        Sampling(WARPS[warp]),
    )


def head_law(seen: Features, drafter_of, rule: Rule, case: Case) -> Law:
    """Law of the production loop with a head."""

    def run(draws: Draws) -> list[int]:
        ask = Request(
            [case.prompt], [draws], case.new, case.sampling, case.eos
        )
        with torch.inference_mode():
            loop = rounds(seen, drafter_of(), rule, ask)
            return [t for r in loop for t in r.tokens[0]]

    return law(run, merge=True)


VOCABS = {"T=0": (4,), "T=1": (3, 4), "T=0.7": (4,), "T=1.3": (3,)}
LOPSIDED = (-1, -1, 0, 2)
TREES = {
    "top": lambda: Static(shapes.branching((2, 2, 1)), DETERMINISTIC),
    "iid": lambda: Static(LOPSIDED, IID),
    "distinct": lambda: Static((-1, -1, 0, 0, 2), WITHOUT_REPLACEMENT),
    "chain": lambda: Static((-1, 0, 1), IID),
    "dynamic": lambda: Dynamic(5, 3, 2),
}
PROOFS = [
    *itertools.product(
        ("top", "dynamic"), ("recursive", "naive", "traversal"), WARPS
    ),
    ("iid", "recursive", "T=0.7"),
    ("iid", "naive", "T=1.3"),
    ("distinct", "recursive", "T=1"),
    ("distinct", "traversal", "T=0.7"),
    ("chain", "tokenwise", "T=1"),
    ("chain", "block", "T=0.7"),
]


@pytest.mark.parametrize("tree, rule, warp", PROOFS)
@pytest.mark.parametrize("name", PLAIN)
def test_the_output_law_is_the_targets(name, tree, rule, warp, little):
    """By enumeration; V = 4 ends at token 1 and the head lacks token 3."""
    sampled = tree in ("iid", "distinct", "chain")
    for vocab in (3,) if sampled else VOCABS[warp]:
        seen, heads = little[vocab]
        case = case_of(seen, warp, vocab)
        got = head_law(
            seen,
            lambda h=heads[name]: HeadDrafter(h, TREES[tree]()),
            LOSSLESS[rule],
            case,
        )
        assert total_variation(got, truth(case)) <= TOLERANCE


@pytest.mark.parametrize("name", PLAIN)
def test_sampled_trees_over_fewer_words(name, little):
    """Three words of four: p has mass where q has none."""
    seen, heads = little[4]
    for kind, rule in ((IID, "recursive"), (WITHOUT_REPLACEMENT, "traversal")):
        case = case_of(seen, "T=1", 4, new=3)
        got = head_law(
            seen,
            lambda k=kind: HeadDrafter(heads[name], Static((-1, -1, 0), k)),
            LOSSLESS[rule],
            case,
        )
        assert total_variation(got, truth(case)) <= TOLERANCE


@pytest.mark.parametrize("name", PLAIN)
def test_typical_acceptance_has_another_law(name, little):
    """It draws nothing: all mass is on one text, whatever p says."""
    seen, heads = little[3]
    case = case_of(seen, "T=1", 3)
    got = head_law(
        seen,
        lambda: HeadDrafter(heads[name], TREES["top"]()),
        typical(0.3),
        case,
    )
    [(tokens, mass)] = got.items()
    want = truth(case)
    assert mass == 1.0 and not typical().lossless
    off = total_variation(got, want)
    assert off == pytest.approx(1.0 - want[tokens], abs=1e-12)
    assert off > 0.3


# --- mutants --------------------------------------------------------------

sound_extend = MedusaState.extend
sound_take = DepthState.take


class Mislabelled(Static):
    """Draws from each depth's head; declares the first head's law."""

    def grow(self, *rest):
        trees = super().grow(*rest)
        return [
            Tree(t.tokens, t.parents, t.kind, t.q[:1], (0,) * len(t))
            if len(t)
            else t
            for t in trees
        ]


def test_a_law_that_is_declared_but_not_drawn_from_is_caught(little):
    seen, heads = little[3]
    case, off = case_of(seen, "T=1", 3), {}
    for kind in (Static, Mislabelled):
        got = head_law(
            seen,
            lambda k=kind: HeadDrafter(heads["medusa"], k((-1, 0, 1), IID)),
            LOSSLESS["tokenwise"],
            case,
        )
        off[kind] = total_variation(got, truth(case))
    assert off[Static] <= TOLERANCE
    assert off[Mislabelled] > 1e-3


def one_pair_late(self, fresh):
    """Reads the feature of the pair before the newest."""
    sound_take(self, fresh)
    for b, f in enumerate(fresh):
        if len(f.tokens) > 1:
            self.root[b] = f.hidden[-2]


def depth_of_the_parent(self, tokens, parents):
    """Every level says what the first one says."""
    out = sound_extend(self, tokens, parents)
    return self._say(0)[:, None].expand_as(out)


def told_of_the_first_node(self, tokens, parents):
    """Hydra reads the path of the first node at every node."""
    out = sound_hydra(self, tokens, parents)
    return out[:, :1].expand_as(out)


sound_hydra = HydraState.extend
HARMLESS = {
    "feature of the pair before": (
        "medusa",
        DepthState,
        "take",
        one_pair_late,
    ),
    "first head at every depth": (
        "medusa",
        MedusaState,
        "extend",
        depth_of_the_parent,
    ),
    "path of another node": (
        "hydra",
        HydraState,
        "extend",
        told_of_the_first_node,
    ),
}


@pytest.mark.parametrize("mutant", HARMLESS)
def test_a_worse_draft_keeps_the_law_and_fails_the_state_test(
    mutant, little, target, text, monkeypatch
):
    """No law can catch these, they only accept less; the comparison of the
    state with the rollout does."""
    name, owner, part, broken = HARMLESS[mutant]
    monkeypatch.setattr(owner, part, broken)
    seen, heads = little[3]
    case = case_of(seen, "T=1", 3)
    got = head_law(
        seen,
        lambda: HeadDrafter(heads[name], Static((-1, -1, 0), IID)),
        LOSSLESS["recursive"],
        case,
    )
    assert total_variation(got, truth(case)) <= TOLERANCE
    with pytest.raises(AssertionError):
        test_state_says_what_the_rollout_says(name, target, text)
        test_nodes_of_different_depth_at_once(name, target, text)


# --- trees ----------------------------------------------------------------

MEDUSA_TREES = {
    "mc_sim_7b_63": (10, 28, 23, 2),
    "vicuna_7b_stage1": (10, 32, 20, 1),
    "vicuna_7b_stage2": (10, 23, 23, 7),
    "vicuna_13b_stage2": (10, 19, 25, 9),
    "vicuna_33b_stage1": (10, 34, 19),
    "zephyr_stage2": (10, 27, 23, 3),
}


def paths(shape) -> list[tuple[int, ...]]:
    """Ranks from the first level down, per node."""
    out, seen = [], {}
    for parent in shape:
        rank = seen[parent] = seen.get(parent, -1) + 1
        above = () if parent == ROOT else out[parent]
        out.append((*above, rank))
    return out


def counts(shape) -> tuple[int, ...]:
    depth = [len(p) for p in paths(shape)]
    return tuple(depth.count(d) for d in range(1, max(depth) + 1))


@pytest.mark.parametrize("name", MEDUSA_TREES)
def test_published_medusa_trees(name):
    shape = known_shapes.known(name)
    assert len(shape) == 63 and counts(shape) == MEDUSA_TREES[name]
    assert max(max(p) for p in paths(shape)) <= 9


def test_all_published_trees_grow_and_are_ordered():
    for name in known_shapes.COUNTS:
        shape = known_shapes.known(name)
        assert Static(shape, DETERMINISTIC).max_nodes == len(shape)
        order = paths(shape)
        assert order == sorted(order, key=lambda p: (len(p), p))


def leaves(shape) -> int:
    return len(set(range(len(shape))) - set(shape))


def test_leaves_and_paths():
    medusa, eagle = (
        known_shapes.known(n) for n in ("mc_sim_7b_63", "eagle_26")
    )
    assert leaves(medusa) == 42
    assert counts(eagle) == (4, 8, 8, 3, 2) and leaves(eagle) == 15
    listed = (
        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 "
        "0000 0001 0002 00000 00001"
    )
    want = [tuple(map(int, word)) for word in listed.split()]
    assert paths(eagle) == want


def test_medusa_buffers():
    """Positions, mask and candidate indices of the published code, from
    what the loop computes for any tree."""
    shape = known_shapes.known("mc_sim_7b_63")
    tree = Tree((0,) * len(shape), shape)
    _, parents = pack([0], [tree], "cpu")
    sees, ranks = ancestors(parents)[0], [(), *paths(shape)]
    place = {p: i for i, p in enumerate(ranks)}
    want = torch.eye(64, dtype=torch.bool)
    for path, i in place.items():
        for n in range(len(path)):
            want[i, place[path[:n]]] = True
    assert torch.equal(sees, want) and bool(sees[:, 0].all())
    assert (sees.sum(1) - 1).tolist() == [len(p) for p in ranks]
    index = [0] + [p[-1] + 10 * (len(p) - 1) + 1 for p in ranks[1:]]
    assert index[1:11] == list(range(1, 11))  # head 1's ten candidates
    assert index[11:21] == list(range(11, 21)) and max(index) == 32


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([[2, 1]], r"levels\[0\]"),
        ([[1], [1, 1]], r"levels\[1\]"),
        ([[-1]], "none negative"),
    ],
)
def test_bad_counts(levels, message):
    with pytest.raises(ValueError, match=message):
        known_shapes.from_counts(levels)


def test_unknown_tree():
    with pytest.raises(ValueError, match="unknown tree 'x': give one of"):
        known_shapes.known("x")


def connected(depths: int, ranks: int, nodes: int):
    """All sets of paths closed under parent and previous sibling."""
    everything = [
        p
        for d in range(1, depths + 1)
        for p in itertools.product(range(ranks), repeat=d)
    ]
    found, todo = set(), {frozenset()}
    for _ in range(nodes):
        todo = {
            tree | {p}
            for tree in todo
            for p in everything
            if p not in tree
            and (len(p) == 1 or p[:-1] in tree)
            and (p[-1] == 0 or (*p[:-1], p[-1] - 1) in tree)
        }
        found |= todo
    return [t for t in found if len(t) == nodes]


def value(accept, tree) -> float:
    total = 0.0
    for path in tree:
        here = 1.0
        for depth, rank in enumerate(path):
            here *= accept[depth][rank]
        total += here
    return total


def falling(seed: int, depths: int, ranks: int) -> list[list[float]]:
    draws = Seeded(seed).uniform((depths, ranks)).sort(-1, True).values
    return (draws / draws.sum(-1, keepdim=True)).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_tree_is_the_best_one(seed):
    accept = falling(seed, 3, 3)
    for nodes in range(1, 7):
        shape = greedy_tree(accept, nodes)
        best = max(value(accept, t) for t in connected(3, 3, nodes))
        assert len(shape) == nodes
        assert worth(accept, shape) == pytest.approx(best, abs=1e-12)
        exact = shapes.sequoia(accept, nodes)
        assert worth(accept, exact) == pytest.approx(best, abs=1e-12)


def test_greedy_is_not_best_where_chances_rise():
    accept = [[0.5, 0.01, 0.4], [0.1, 0.0, 0.0]]
    best = max(value(accept, t) for t in connected(2, 3, 3))
    assert worth(accept, shapes.sequoia(accept, 3)) == pytest.approx(best)
    assert worth(accept, greedy_tree(accept, 3)) < best - 0.3


def test_small_trees_and_errors():
    accept = [[0.5, 0.0], [0.5]]
    assert greedy_tree(accept, 1) == (ROOT,)
    assert set(greedy_tree(accept, 10)) == {ROOT, 0, 1}  # no room for more
    with pytest.raises(ValueError, match="nodes must be at least 1"):
        greedy_tree(accept, 0)
    with pytest.raises(ValueError, match="at least one depth"):
        greedy_tree([[]], 2)
    with pytest.raises(ValueError, match="accept does not cover"):
        worth(accept, (ROOT, ROOT, ROOT))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_measured_accuracy_is_what_the_loop_would_see(
    name, temperature, target
):
    """Recounted position by position with the state."""
    head = make(name, target)
    ids, start = [1, 2, 3, *greedy_reference(target, [1, 2, 3], 9)], 3
    got = head_accuracy(target, head, [(ids, start)], 3, 4, temperature)
    want = torch.zeros(3, 4, dtype=torch.float64)
    seen = [0, 0, 0]
    with torch.inference_mode():
        out = target.forward(torch.tensor([ids]))
        law = Warp(temperature)(out.logits[0])
        for t in range(len(ids) - 1):
            state = head.state(1, 40)
            said = [
                state.begin(
                    [Pairs(out.hidden[0, : t + 1], (), tuple(ids[1 : t + 2]))]
                )[0]
            ]
            for s in range(2):
                if t + 2 + s < len(ids):
                    token = torch.tensor([[ids[t + 2 + s]]])
                    said.append(
                        state.extend(token, torch.tensor([[s - 1]]))[0, 0]
                    )
            for s, logits in enumerate(said):
                u = t + s + 1  # the feature that predicts this token
                if start - 1 <= u < len(ids) - 1:
                    want[s] += law[u][logits.topk(4).indices]
                    seen[s] += 1
    for s in range(3):
        torch.testing.assert_close(
            torch.tensor(got[s], dtype=torch.float64),
            want[s] / seen[s],
            atol=1e-5,
            rtol=0,
        )
