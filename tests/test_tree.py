"""Trees: shapes, ancestors against the definition, packing, errors."""

from __future__ import annotations

import random

import pytest
import torch

from specref.draft import shapes
from specref.tree import (
    DEAD,
    EMPTY,
    IID,
    ROOT,
    WITHOUT_REPLACEMENT,
    Tree,
    ancestors,
    chain,
    pack,
)

#        0 -- 2 -- 4
#  root <      `-- 5
#        1 -- 3
TREE = Tree((7, 8, 9, 7, 0, 1), (-1, -1, 0, 1, 2, 2))
Q = torch.full((2, 3), 1 / 3)


def test_navigation():
    assert TREE.children(ROOT) == [0, 1]
    assert TREE.children(2) == [4, 5] and TREE.children(5) == []
    assert TREE.path(5) == [0, 2, 5] and TREE.path(ROOT) == []
    assert [TREE.depth(i) for i in range(-1, 6)] == [0, 1, 1, 2, 2, 3, 3]
    assert TREE.height == 3 and len(TREE) == 6
    assert not TREE.is_chain


def test_the_empty_tree():
    assert len(EMPTY) == EMPTY.height == 0
    assert EMPTY.is_chain and EMPTY.children(ROOT) == []


def test_chains():
    sampled = chain([2, 0], Q)
    assert sampled.is_chain and sampled.kind == IID
    assert sampled.parents == (-1, 0) and sampled.law_of == (0, 1)
    assert torch.equal(sampled.law(1), Q[1])
    assert chain([2, 0]).q is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((1, 2), (-1,)), "one entry per token"),
        (((1,), (0,)), r"parents\[0\] must be in \[-1, 0\)"),
        (((1, 2), (-1, 1)), r"parents\[1\] must be in \[-1, 1\)"),
        (((1,), (-2,)), r"parents\[0\] must be"),
        (((1,), (-1,), "greedy"), "kind must be one of"),
        (((1,), (-1,), IID), "needs q and one law_of"),
        (((1,), (-1,), IID, Q), "needs q and one law_of"),
        (((1,), (-1,), IID, Q, (2,)), r"law_of must name rows of q"),
        (((1,), (-1,), IID, Q, (-1,)), r"law_of must name rows of q"),
        (
            ((1, 2), (-1, -1), WITHOUT_REPLACEMENT, Q, (0, 1)),
            "must share one law",
        ),
    ],
)
def test_what_is_no_tree(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tree(*arguments)


def random_parents(rng: random.Random, n: int) -> list[int]:
    """Any tree or forest; some nodes are padding."""
    out: list[int] = []
    for i in range(n):
        alive = [j for j in range(i) if out[j] != DEAD]
        pad = rng.random() < 0.1
        out.append(DEAD if pad else rng.choice([ROOT, *alive]))
    return out


def seen_by(parents: list[int], i: int) -> set[int]:
    """The definition: a node sees itself and what its parent sees."""
    up = parents[i]
    return {i} | (seen_by(parents, up) if up >= 0 else set())


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 31, 64, 65])
def test_ancestors_are_those_of_the_definition(n):
    rng = random.Random(n)
    rows = [random_parents(rng, n) for _ in range(5)]
    rows += [list(range(-1, n - 1)), [ROOT] * n, [DEAD] * n]
    got = ancestors(torch.tensor(rows))
    assert got.shape == (len(rows), n, n) and got.dtype == torch.bool
    for b, parents in enumerate(rows):
        for i in range(n):
            want = seen_by(parents, i)
            assert set(got[b, i].nonzero().flatten().tolist()) == want
        for i in [j for j in range(n) if parents[j] == DEAD]:
            assert got[b, :, i].sum() == 1  # itself only


def test_pack_lays_rows_side_by_side():
    tokens, parents = pack([5, 6], [TREE, chain([4, 3])], "cpu")
    assert tokens.tolist() == [
        [5, 7, 8, 9, 7, 0, 1],
        [6, 4, 3, 0, 0, 0, 0],
    ]
    assert parents.tolist() == [
        [-1, 0, 0, 1, 2, 3, 3],
        [-1, 0, 1, -2, -2, -2, -2],
    ]


def test_pack_of_full_chains_needs_no_mask():
    tokens, parents = pack([5, 6], [chain([1, 2]), chain([3, 4])], "cpu")
    assert tokens.tolist() == [[5, 1, 2], [6, 3, 4]] and parents is None
    tokens, parents = pack([5, 6], [EMPTY, EMPTY], "cpu")
    assert tokens.tolist() == [[5], [6]] and parents is None
    assert pack([5, 6], [chain([1]), EMPTY], "cpu")[1] is not None


def test_pack_needs_one_tree_per_row():
    with pytest.raises(ValueError):
        pack([5, 6], [EMPTY], "cpu")


def test_shapes():
    assert shapes.chain(3) == (-1, 0, 1)
    assert shapes.chains(2, 2) == (-1, -1, 0, 1)
    assert shapes.branching((2, 2)) == (-1, -1, 0, 0, 1, 1)
    assert shapes.branching((1, 1)) == shapes.chain(2)
    for bad in (lambda: shapes.chain(0), lambda: shapes.chains(0, 1)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            bad()
    with pytest.raises(ValueError, match="widths must be positive"):
        shapes.branching((2, 0))
