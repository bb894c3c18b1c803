"""`specref.theory.trees`: Sequoia's program against every tree there is."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator

import numpy as np
import pytest
from test_theory import EXACT

from specref import theory

# Chen et al. 2024 (2402.12374), appendix E: Llama3-8B for 70B, CNN.
CNN = [
    *(0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043),
    *(0.0035, 0.0026, 0.0025, 0.0021, 0.0016, 0.0014, 0.0010, 0.0010),
    *(0.0010, 0.0007, 0.0007, 0.0006, 0.0007, 0.0006, 0.0004, 0.0004),
    *(0.0005, 0.0006, 0.0004, 0.0003, 0.0002, 0.0004, 0.0001),
]


def rank(parents: list[int]) -> list[int]:
    """Index of each node among its siblings."""
    seen: dict[int, int] = {}
    out = []
    for parent in parents:
        out.append(seen.get(parent, 0))
        seen[parent] = out[-1] + 1
    return out


def depths(parents: list[int]) -> list[int]:
    """Levels above each node; 0 for the root."""
    out: list[int] = []
    for parent in parents:
        out.append(out[parent] + 1 if parent >= 0 else 0)
    return out


def value_of(accept: np.ndarray, parents: list[int]) -> float:
    """Sum over nodes of the product of chances down to them."""
    accept = np.array(accept)
    at, down = depths(parents), rank(parents)
    reach = [1.0]
    for node in range(1, len(parents)):
        row = accept if accept.ndim == 1 else accept[at[node] - 1]
        reach.append(reach[parents[node]] * row[down[node]])
    return sum(reach)


def check(
    accept: np.ndarray, nodes: int, depth: int | None, full: bool = True
) -> float:
    """The returned tree is a tree within limits and has the value said."""
    value, parents = theory.sequoia(accept, nodes, depth)
    assert parents[0] == -1 and len(parents) <= nodes
    assert all(0 <= p < i for i, p in enumerate(parents) if i)
    assert not full or len(parents) == nodes
    assert depth is None or max(depths(parents)) < depth
    assert max(rank(parents)) < np.shape(accept)[-1]
    assert value_of(accept, parents) == pytest.approx(value, **EXACT)
    assert parents == sorted(parents)  # level by level
    return value


VALUES = [
    *((2, 1.7732), (4, 2.8333), (8, 3.8459), (16, 4.5376), (32, 5.2199)),
    *((64, 5.9166), (128, 6.6066), (256, 7.2887), (512, 7.9684)),
]
BOUNDED = [
    *((3, 2.8338), (4, 3.4587), (5, 3.8739)),
    *((6, 4.1101), (8, 4.3929), (10, 4.5234)),
]


@pytest.mark.parametrize("nodes,value", VALUES)
def test_golden_values(nodes: int, value: float) -> None:
    assert round(check(CNN, nodes, None), 4) == value


@pytest.mark.parametrize("depth,value", BOUNDED)
def test_golden_values_with_depth(depth: int, value: float) -> None:
    assert round(check(CNN, 16, depth), 4) == value


# --- every tree


def forests(nodes: int, width: int, levels: int) -> Iterator[tuple]:
    """Every ordered forest of exactly ``nodes`` nodes with at most
    ``width`` roots and ``levels`` levels, as nested tuples."""
    if nodes == 0:
        yield ()
        return
    if width == 0 or levels == 0:
        return
    for first in range(1, nodes + 1):
        for below in forests(first - 1, MOST, levels - 1):
            for others in forests(nodes - first, width - 1, levels):
                yield (below, *others)


MOST = 3


def worth(children: tuple, accept: np.ndarray, level: int = 0) -> float:
    row = accept if accept.ndim == 1 else accept[min(level, len(accept) - 1)]
    return 1.0 + sum(
        row[b] * worth(child, accept, level + 1)
        for b, child in enumerate(children)
    )


def vector(seed: int) -> np.ndarray:
    """Chances of three children; by turns rising, with zeros, or equal."""
    rng = np.random.default_rng(seed)
    v = rng.dirichlet(np.ones(4))[:3]
    if seed % 3 == 0:
        v = np.sort(v)
    if seed % 5 == 0:
        v[rng.integers(3)] = 0.0
    return v


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("depth", [None, 1, 2, 3, 4])
def test_best_of_every_tree(seed: int, depth: int | None) -> None:
    accept = vector(seed)
    levels = 99 if depth is None else depth
    best = 0.0
    for nodes in range(1, 8):
        shapes = forests(nodes - 1, MOST, levels - 1)
        trees = [worth(t, accept) for t in shapes]
        best = max([best, *trees])
        got = check(accept, nodes, depth, full=bool(trees))
        assert got == pytest.approx(best, **EXACT)


@pytest.mark.parametrize("seed", range(10))
def test_best_of_every_tree_with_chances_by_depth(seed: int) -> None:
    accept = np.array([vector(9 * seed + i + 1) for i in range(3)])
    for nodes in range(1, 8):
        for depth in (1, 2, 3, 4, None):
            levels = 4 if depth is None else depth
            want = max(
                worth(t, accept)
                for n in range(1, nodes + 1)
                for t in forests(n - 1, MOST, levels - 1)
            )
            value, parents = theory.sequoia(accept, nodes, depth)
            assert value == pytest.approx(want, **EXACT)
            assert value_of(accept, parents) == pytest.approx(want, **EXACT)
            assert max(depths(parents)) < levels


def test_large_trees_with_chances_by_depth_are_read_off_right() -> None:
    rng = np.random.default_rng(2)
    for nodes in (12, 25, 40):
        check(rng.dirichlet(np.full(5, 0.4), 6)[:, :4], nodes, None)


def greedy(accept: list[float], nodes: int) -> float:
    """Best-first growth: exact only when chances never rise."""
    total, heap = 0.0, [(-1.0, 0, 1.0)]
    for _ in range(nodes):
        reach, b, parent = heapq.heappop(heap)
        total -= reach
        heapq.heappush(heap, (reach * accept[0], 0, -reach))
        if total > 1 and b + 1 < len(accept):
            heapq.heappush(heap, (-parent * accept[b + 1], b + 1, parent))
    return total


def test_greedy_is_enough_only_when_chances_never_rise() -> None:
    falling = sorted(CNN, reverse=True)
    for nodes in (2, 7, 40, 150):
        got, _ = theory.sequoia(falling, nodes)
        assert got == pytest.approx(greedy(falling, nodes), **EXACT)
    hidden = [0.3, 0.01, 0.6]  # the best child stands behind a bad one
    got, _ = theory.sequoia(hidden, 4)
    assert got > greedy(hidden, 4) + 0.4


# --- shapes that are known


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_one_child_is_a_chain(alpha: float) -> None:
    for nodes in (1, 2, 6):
        value, parents = theory.sequoia([alpha], nodes)
        want = theory.expected_tokens(alpha, nodes - 1)
        assert value == pytest.approx(want, **EXACT)
        assert parents == list(range(-1, nodes - 1))
        assert theory.sequoia([alpha], 99, nodes)[0] == pytest.approx(want)


def test_limits_of_infinite_trees() -> None:
    # One chain: 1 / (1 - P1); binary: 1 / (1 - P1 - P2).
    assert theory.sequoia([0.6], 200)[0] == pytest.approx(2.5)
    full = theory.sequoia([0.4, 0.2], 2**8 - 1, 8)[0]
    assert full == pytest.approx((1 - 0.6**8) / 0.4, **EXACT)


def test_depth_that_cannot_hold_the_nodes() -> None:
    value, parents = theory.sequoia([0.5, 0.25], 50, 3)
    assert len(parents) == 7  # all of the binary tree
    assert value == pytest.approx(1 + 0.75 + 0.75**2, **EXACT)
    assert theory.sequoia([0.5, 0.25], 50, 1) == (1.0, [-1])


def test_more_nodes_or_levels_never_hurt_and_limits_agree() -> None:
    table = theory.sequoia_values(CNN, 24, 24)
    assert (np.diff(table, axis=0) >= -1e-12).all()
    assert (np.diff(table, axis=1) >= -1e-12).all()
    for d, n in ((1, 5), (2, 9), (4, 24), (24, 24), (7, 13)):
        got, _ = theory.sequoia(CNN, n, d)
        assert table[d - 1, n - 1] == pytest.approx(got, **EXACT)
    got, _ = theory.sequoia(CNN, 24)
    assert table[-1, -1] == pytest.approx(got, **EXACT)
    # The same row at each depth is the vector.
    got, tree = theory.sequoia(np.tile(CNN, (5, 1)), 24)
    assert (got, tree) == theory.sequoia(CNN, 24, 6)


def test_best_tree_is_the_best_of_all_sizes() -> None:
    def cost(n: int) -> float:
        return 1.0 + 0.02 * (n - 1)

    gain, nodes, depth = theory.best_tree(CNN, 0.05, cost, 40, 9)
    best = max(
        theory.sequoia(CNN, n, d)[0] / (cost(n) + 0.05 * (d - 1))
        for n in range(1, 41)
        for d in range(1, 10)
    )
    assert gain == pytest.approx(best, **EXACT)
    again = theory.sequoia(CNN, nodes, depth)[0]
    assert gain == pytest.approx(again / (cost(nodes) + 0.05 * (depth - 1)))
    # One child only: the chain's best length.
    gain, nodes, depth = theory.best_tree([0.8], 0.1, None, 30, 30)
    assert nodes == depth
    assert (nodes - 1, gain) == pytest.approx(theory.optimal_gamma(0.8, 0.1))
    assert theory.best_tree([0.05], 0.5)[:2] == (1.0, 1)


def test_fast_enough() -> None:
    start = time.process_time()
    theory.sequoia(CNN, 128, 10)
    assert time.process_time() - start < 1.0
    start = time.process_time()
    theory.sequoia(CNN, 512, 12)
    assert time.process_time() - start < 5.0


BAD = [
    ("sequoia", ([], 4), "accept must be a vector"),
    ("sequoia", (0.5, 4), "accept must be a vector"),
    ("sequoia", (np.ones((1, 1, 1)), 4), "accept must be a vector"),
    ("sequoia", ([0.5, 1.5], 4), r"accept must be in \[0, 1\], got 1.5"),
    ("sequoia", ([0.5, np.nan], 4), "accept must be finite"),
    ("sequoia", ([0.5], 0), "nodes must be at least 1, got 0"),
    ("sequoia", ([0.5], 4, 0), "depth must be at least 1, got 0"),
    ("sequoia", ([0.5], 4, 2.5), "depth must be a whole number"),
    ("sequoia", ([[0.5], [0.4]], 9, 4), "depth must be at most 3"),
    ("sequoia_values", ([[0.5]], 4, 2), "accept must be a vector here"),
    ("best_tree", ([0.5], -1.0), "c must be in"),
]


@pytest.mark.parametrize("name,args,message", BAD)
def test_bad_input_is_one_clear_sentence(
    name: str, args: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        getattr(theory, name)(*args)
    assert "\n" not in str(error.value)
