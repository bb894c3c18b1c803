"""Growing trees: all rows and nodes at once, yet node by node the same.

The references below grow one node after the other from plain lists and
share no code with the library but the tree and the draws.
"""

from __future__ import annotations

import itertools
import math
import random

import cases
import pytest
import torch

from specref.draft.dynamic import Dynamic
from specref.draft.grow import Static, entries, rank
from specref.draft.sprout import Sprout, share, unpad
from specref.draws import Recorder, Seeded
from specref.tree import (
    DEAD,
    DETERMINISTIC,
    IID,
    KINDS,
    ROOT,
    Tree,
)
from specref.warp import BLOCK, Sampling, Warp, largest

NO = -math.inf
EOS = frozenset({1})


def ban(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The last token may not come again: rows of their own support."""
    out = scores.clone()
    out[0, ids[0, -1]] = NO
    return out


class Words:
    """A stepper by table: what follows a text is a function of the text.

    Args:
        make: random source -> ``vocab`` scores.
    """

    def __init__(self, make, seed, prompts):
        self.make, self.seed, self.prompts = make, seed, prompts
        self.texts = [[] for _ in prompts]  # of pending nodes
        self.pending = 0

    def scores(self, text):
        return self.make(random.Random(f"{self.seed}{tuple(text)}"))

    def begin(self):
        return torch.tensor(
            [self.scores(p) for p in self.prompts], dtype=torch.float64
        )

    def extend(self, tokens, parents):
        out = []
        for b, (row, ups) in enumerate(
            zip(tokens.tolist(), parents.tolist(), strict=True)
        ):
            for token, up in zip(row, ups, strict=True):
                above = self.prompts[b] if up < 0 else self.texts[b][up]
                self.texts[b].append([*above, token])
            new = self.texts[b][-len(row) :]
            out.append([self.scores(text) for text in new])
            for i, up in enumerate(ups):
                if up == DEAD:  # nobody may read what follows padding
                    out[-1][i] = [math.nan] * len(out[-1][i])
        self.pending += tokens.shape[1]
        return torch.tensor(out, dtype=torch.float64)


def few(rng):  # ties everywhere, some tokens impossible
    return [rng.choice([NO, 0.0, 0.0, 1.0]) for _ in range(4)] + [0.0, 1.0]


def flat(rng):
    return [0.0] * 5


def certain(rng):
    out = [NO] * 5
    out[rng.randrange(5)] = rng.gauss(0, 1)
    return out


def generic(rng):
    return [rng.gauss(0, 2) for _ in range(5)]


def long(rng):  # takes the way of blocks, with ties within and across them
    size = 4 * BLOCK
    return [rng.choice([0.0, 1.0, 2.0, rng.random()]) for _ in range(size)]


MAKES = (few, flat, certain, generic, long)
SAMPLINGS = (
    Sampling(Warp(0.0)),
    Sampling(Warp(0.8)),
    Sampling(Warp(1.0, top_k=3, top_p=0.8)),
    Sampling(Warp(0.7), (cases.penalty,)),
    Sampling(Warp(0.0), (ban, cases.penalty)),
)


# References


def processed(words, text, sampling):
    row = torch.tensor([words.scores(text)], dtype=torch.float64)
    for process in sampling.processors:
        row = process(torch.tensor([list(text)]), row)
    return row[0]


def best(scores, count):
    """Tokens by score, then by number, none that is impossible."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in order if scores[i] > NO][:count]


def plain_static(policy, words, prompt, room, sampling, draws, eos):
    """Level by level, node by node: `Static` without tensors of rows."""
    kind = DETERMINISTIC if sampling.greedy else policy.kind
    tokens, parents, law_of, laws = [], [], [], []
    front = [(ROOT, ROOT, list(prompt))] if room else []
    for level in itertools.count(1):
        after = []
        for node, spot, text in front:
            scores = processed(words, text, sampling)
            spots = [i for i, up in enumerate(policy.shape) if up == spot]
            law = sampling.warp(scores)
            if kind == DETERMINISTIC:
                picks = best(scores.tolist(), len(spots))
            elif kind == IID:
                picks = [int(draws.categorical(law)) for _ in spots]
            else:
                picks, left = [], law.clone()
                for _ in range(min(len(spots), int((law > 0).sum()))):
                    picks.append(int(draws.categorical(left)))
                    left[picks[-1]] = 0.0
            laws.append(law)
            sure = scores.softmax(-1) if sampling.greedy else law
            for token, child in zip(picks, spots, strict=False):
                tokens.append(token)
                parents.append(node)
                law_of.append(len(laws) - 1)
                on = policy.stop_below is None
                on = on or bool(sure[token] >= policy.stop_below)
                leaf = child not in policy.shape
                if on and not leaf and level < room and token not in eos:
                    new = len(tokens) - 1
                    after.append((new, child, [*text, token]))
        front = after
        if not front:
            break
    if kind == DETERMINISTIC or not tokens:
        return Tree(tuple(tokens), tuple(parents), kind)
    return Tree(
        tuple(tokens), tuple(parents), kind, torch.stack(laws), tuple(law_of)
    )


def plain_dynamic(policy, words, prompt, room, sampling, eos):
    """Every node is (token, parent, worth); the worthiest are kept."""
    nodes, front = [], [(ROOT, 1.0, list(prompt))]
    for level in range(1, min(policy.depth, room) + 1):
        seen = []
        for node, above, text in front:
            scores = processed(words, text, sampling)
            prob = scores.softmax(-1).tolist()
            for token in best(scores.tolist(), policy.width):
                if prob[token] > 0.0:
                    nodes.append((token, node, above * prob[token]))
                    seen.append((len(nodes) - 1, [*text, token]))
        seen = [
            (i, nodes[i][2], text)
            for i, text in seen
            if nodes[i][0] not in eos and nodes[i][2] >= policy.stop_below
        ]
        seen = sorted(seen, key=lambda x: (-x[1], x[0]))[: policy.width]
        front = sorted(seen) if level < policy.depth else []
    order = sorted(range(len(nodes)), key=lambda i: (-nodes[i][2], i))
    keep = sorted(order[: policy.nodes])
    at = {ROOT: ROOT} | {old: i for i, old in enumerate(keep)}
    return Tree(
        tuple(nodes[i][0] for i in keep),
        tuple(at[nodes[i][1]] for i in keep),
    )


def same(got: Tree, want: Tree) -> None:
    """Equal trees, laws bit for bit."""
    assert (got.tokens, got.parents) == (want.tokens, want.parents)
    assert (got.kind, got.law_of) == (want.kind, want.law_of)
    assert (got.q is None) == (want.q is None)
    if got.q is not None:
        assert torch.equal(got.q, want.q)


# All rows at once against each row alone


PROMPTS = ([3, 0], [2], [0, 4, 4], [2])
ROOMS = ((1, 0, 3, 2), (9, 9, 9, 9), (2, 3, 0, 0), (0, 0, 0, 0))
SHAPES = (
    (-1, 0, 1),
    (-1, -1, 0, 1, 2, 3),  # equal siblings grow below the same text
    (-1, -1, -1, 0, 0, 1, 3, 3, 5),
    (-1, -1, 1, 1, 2),  # the first child is a leaf
)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("kind", KINDS)
def test_static_growth_equals_node_by_node(make, kind):
    sizes = set()
    for seed, (sampling, room, shape, stop) in enumerate(
        itertools.product(SAMPLINGS, ROOMS, SHAPES, (None, 0.3))
    ):
        policy = Static(shape, kind, stop)
        words = Words(make, seed, PROMPTS)
        if make is certain and sampling.processors:
            continue  # a law of one token that is banned is no law
        draws = [Recorder(Seeded(seed, b)) for b in range(len(room))]
        sprouts = [Sprout(p, r) for p, r in zip(PROMPTS, room, strict=True)]
        trees = policy.grow(
            words, sprouts, words.begin(), sampling, draws, EOS
        )
        for b, tree in enumerate(trees):
            again = Recorder(Seeded(seed, b))
            want = plain_static(
                policy, words, PROMPTS[b], room[b], sampling, again, EOS
            )
            same(tree, want)
            assert draws[b].tape == again.tape
            sizes.add(len(tree))
    assert {0, 1} < sizes


@pytest.mark.parametrize("make", MAKES)
def test_dynamic_growth_equals_node_by_node(make):
    sizes = set()
    for seed, (sampling, room, (nodes, depth, width), stop) in enumerate(
        itertools.product(
            SAMPLINGS,
            ROOMS,
            ((1, 1, 1), (3, 2, 2), (5, 3, 2), (9, 3, 3), (9, 2, 7)),
            (0.0, 0.3),
        )
    ):
        policy = Dynamic(nodes, depth, width, stop)
        words = Words(make, seed, PROMPTS)
        sprouts = [Sprout(p, r) for p, r in zip(PROMPTS, room, strict=True)]
        trees = policy.grow(
            words, sprouts, words.begin(), sampling, [None] * 4, EOS
        )
        for b, tree in enumerate(trees):
            want = plain_dynamic(
                policy, words, PROMPTS[b], room[b], sampling, EOS
            )
            same(tree, want)
            sizes.add(len(tree))
    assert {0, 1} < sizes


def test_draws_of_a_batch_go_on_one_tape_row_by_row():
    """The order in which rows of one tape ask is part of the format."""
    words = Words(generic, 3, PROMPTS)
    tape: list[int] = []
    draws = [Recorder(Seeded(3, b), tape) for b in range(4)]
    sprouts = [Sprout(p, 2) for p in PROMPTS]
    trees = Static((-1, -1, 0), IID).grow(
        words, sprouts, words.begin(), Sampling(), draws, frozenset()
    )
    want = [t for tree in trees for t in tree.tokens[:2]]
    want += [t for tree in trees for t in tree.tokens[2:]]
    assert tape == want


# The parts


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16]
)
@pytest.mark.parametrize("size", [3, 8 * BLOCK, 8 * BLOCK + 1])
def test_rank_equals_a_sort(dtype, size):
    """Ties inside, at the edge and across blocks; impossible tokens."""
    source = random.Random(size)
    ties = 0
    for trial in range(60):
        values = [NO, *range(1 + trial % 5), source.random()]
        rows = [[source.choice(values) for _ in range(size)] for _ in range(3)]
        scores = torch.tensor(rows, dtype=dtype)
        for count in (1, 2, 3, 5):
            got = rank(scores, count)
            for row, tokens in zip(scores.tolist(), got, strict=True):
                if max(row) > NO:
                    assert tokens == best(row, count)
                    ties += len(set(row)) < len(row)
    assert ties > 300


@pytest.mark.parametrize("size", [5, 8 * BLOCK, 8 * BLOCK + 1])
def test_largest_equals_topk(size):
    source = torch.Generator().manual_seed(size)
    rows = torch.rand(4, 2, size, dtype=torch.float64, generator=source)
    rows = rows[:, 1]  # not contiguous
    rows[0, 3:] = NO
    rows[1, 2] = math.nan
    for count in (1, 2, 5):
        value, index = largest(rows, count)
        want = rows.topk(count)
        torch.testing.assert_close(value, want.values, equal_nan=True)
        torch.testing.assert_close(
            rows.gather(1, index), value, equal_nan=True
        )
        assert all(len(set(row)) == count for row in index.tolist())
        torch.testing.assert_close(index[2:], want.indices[2:])


def test_entries_and_unpad_keep_the_order_of_rows():
    values = torch.arange(12).reshape(3, 4)
    got = entries(values, [[3, 0], [], [1]]).tolist()
    assert got == [3, 0, 9]
    assert entries(values, [[], [], []]).tolist() == []
    logits = torch.arange(12).reshape(2, 3, 2)
    got = unpad(logits, [[7], [4, 5, 6]])
    assert got.tolist() == [[0, 1], [6, 7], [8, 9], [10, 11]]
    assert unpad(logits, [[1, 2, 3], [4, 5, 6]]).tolist() == [
        [2 * i, 2 * i + 1] for i in range(6)
    ]


def test_equal_siblings_share_one_law_within_their_row():
    sprouts = [Sprout([0], 9), Sprout([0], 9)]
    for sprout in sprouts:
        for token, parent in ((5, ROOT), (5, ROOT), (6, 0), (6, 1), (7, 1)):
            sprout.add(token, parent)
    logits = torch.arange(6.0)[:, None]
    got = share(sprouts, [[2, 3, 4], [4, 3, 2]], logits)
    assert got.flatten().tolist() == [0.0, 0.0, 2.0, 3.0, 4.0, 4.0]
