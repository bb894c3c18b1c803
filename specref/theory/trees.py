"""Sequoia's best tree for measured acceptance, by dynamic programming.

Values count the root (the token that is emitted in any case) as 1: they are
tokens per target call, correction or bonus included.  Depth counts the
root's level.

Does not handle: trees that follow a draft's confidence (dynamic trees).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from specref.theory._check import Array, chances, count, not_negative
from specref.theory.walltime import Verify, pass_cost

Table = Array  # [N + 1, B + 1]: best value with n nodes and b children
NEVER = -np.inf


def sequoia(
    accept: ArrayLike, nodes: int, depth: int | None = None
) -> tuple[float, list[int]]:
    """The tree with the most expected tokens, and their number.

    Chen et al. 2024 (2402.12374), section 3.1: with F(m) the best value of
    a subtree of m nodes, T[1, 0] = 1 and
    T[n, b] = max_m T[n - m, b - 1] + accept[b] F(m).  A node's children are
    the first ones: child b is tried when those before it were rejected.
    Exact for any vector; best-first growth is so only when it never rises.

    Args:
        accept: ``[B]``, chance that child b (from 0) is the one accepted,
            given that its parent was and whatever its siblings (so entries
            of a real vector sum to at most 1).  ``[D - 1, B]``: row i is
            for children at depth i + 1.
        nodes: most nodes, root included, at least 1.
        depth: most levels, root's included; None is no limit, or D for a
            matrix.
    Returns:
        value, and parents of the nodes level by level: parents precede
        children, siblings stand in order, the root's parent is -1.  Fewer
        than ``nodes`` where no more fit in the depth.
    """
    n, (rows, fixed) = count("nodes", nodes, 1), _rows(accept)
    levels = _levels(rows, fixed, n, depth)
    if fixed and levels >= n:
        table = _unbounded(rows[0], n)
        return _build(lambda _: (table, rows[0], table))
    tables = [_leaf(n, rows.shape[1])]
    for d in range(2, levels + 1):
        row = rows[0] if fixed else rows[levels - d]
        tables.append(_deeper(tables[-1], row))
        if fixed and np.array_equal(tables[-1], tables[-2]):
            break  # more levels change nothing

    def at(level: int) -> tuple[Table, Array, Table]:
        d = levels - level  # levels that are left, this node's included
        row = rows[0] if fixed else rows[min(level, len(rows) - 1)]
        last = len(tables) - 1
        return tables[min(d - 1, last)], row, tables[min(max(d - 2, 0), last)]

    return _build(at)


def sequoia_values(accept: ArrayLike, nodes: int, depth: int) -> Array:
    """Best value for every depth and number of nodes, ``[depth, nodes]``.

    Entry (d - 1, n - 1) is that of `sequoia` with n nodes and d levels.
    ``accept`` is a vector.
    """
    n, (rows, fixed) = count("nodes", nodes, 1), _rows(accept)
    if not fixed:
        raise ValueError("accept must be a vector here, got a matrix")
    table, out = _leaf(n, rows.shape[1]), []
    for d in range(count("depth", depth, 1)):
        if d:
            table = _deeper(table, rows[0])
        out.append(np.maximum.accumulate(_best(table)[1:]))
    return np.stack(out)


def best_tree(
    accept: ArrayLike,
    c: float,
    verify: Verify | None = None,
    nodes: int = 128,
    depth: int = 16,
) -> tuple[float, int, int]:
    """Sequoia's hardware-aware choice: (speedup, nodes, depth).

    The largest G(n, d) / (t(n) + (d - 1) c) (Chen et al. 2024, 2402.12374,
    section 3.3) over n and d; here d counts the root's level, which is not
    drafted.

    Args:
        c: time of drafting one level, in units of a one-token target pass.
        verify: time of a pass over n tokens, as in `walltime.speedup`.
        nodes, depth: most to try, root included.
    """
    value = sequoia_values(accept, nodes, depth)
    step = float(not_negative("c", c))
    cost = np.array([pass_cost(verify, n) for n in range(1, nodes + 1)])
    gain = value / (cost + step * np.arange(len(value))[:, None])
    # First maximum in depth-major order: the shallowest, then the smallest.
    d, n = np.unravel_index(int(gain.argmax()), gain.shape)
    return float(gain[d, n]), int(n) + 1, int(d) + 1


def _rows(accept: ArrayLike) -> tuple[Array, bool]:
    """``[rows, B]`` and whether one row serves every depth."""
    rows = chances("accept", accept)
    if rows.ndim not in (1, 2) or not rows.size:
        raise ValueError(
            "accept must be a vector [B] or a matrix [D - 1, B] with at "
            f"least one child, got shape {rows.shape}"
        )
    return np.atleast_2d(rows), rows.ndim == 1


def _levels(rows: Array, fixed: bool, n: int, depth: int | None) -> int:
    if depth is not None:
        depth = count("depth", depth, 1)
    if fixed:
        return n if depth is None else min(depth, n)
    most = len(rows) + 1
    if depth is not None and depth > most:
        raise ValueError(
            f"depth must be at most {most} for accept with {len(rows)} rows, "
            f"got {depth}"
        )
    return most if depth is None else depth


def _leaf(n: int, width: int) -> Table:
    table = np.full((n + 1, width + 1), NEVER)
    table[1, 0] = 1.0
    return table


def _best(table: Table) -> Array:
    """F: best value of exactly n nodes over numbers of children."""
    return table.max(-1)


def _deeper(below: Table, row: Array) -> Table:
    """T for one more level on top of ``below``."""
    n, width = len(below) - 1, len(row)
    table, best = _leaf(n, width), _best(below)
    # Entry (i, m - 1) is i - m: the nodes that are left for earlier
    # children.  T[0] is never, and so stands in for what is negative.
    left = np.arange(n + 1)[:, None] - np.arange(1, n + 1)
    left = np.maximum(left, 0)
    for b in range(1, min(width, n - 1) + 1):
        gain = table[left, b - 1] + _times(row[b - 1], best[1:])
        table[:, b] = gain.max(-1)
    return table


def _unbounded(row: Array, n: int) -> Table:
    """T when subtrees may be as deep as they like: a fixed point, found in
    order of n because a subtree has fewer nodes than the tree."""
    table = _leaf(n, len(row))
    best = np.full(n + 1, NEVER)
    best[1] = 1.0
    for i in range(2, n + 1):
        gain = table[i - 1 : 0 : -1, :-1] + np.outer(best[1:i], row)
        table[i, 1:] = gain.max(0)
        best[i] = table[i].max()
    return table


def _times(chance: float, best: Array) -> Array:
    """chance * best where impossible stays impossible (not 0 * -inf)."""
    out = np.full_like(best, NEVER)
    return np.multiply(chance, best, out=out, where=np.isfinite(best))


At = Callable[[int], tuple[Table, Array, Table]]


def _build(at: At) -> tuple[float, list[int]]:
    """Read a best tree off the tables, level by level.

    Args:
        at: level -> (table of its nodes, chances of their children, table
            of the children's subtrees).
    """
    top = _best(at(0)[0])
    size = int(np.flatnonzero(np.isfinite(top))[-1])
    value, parents, todo = float(top[size]), [], deque([(size, 0, -1)])
    while todo:
        n, level, parent = todo.popleft()
        parents.append(parent)
        me = len(parents) - 1
        table, row, below = at(level)
        sizes, best = [], _best(below)
        b = int(table[n].argmax())
        while b:
            m = np.arange(1, n)
            gain = table[n - m, b - 1] + _times(row[b - 1], best[1:n])
            sizes.append(int(gain.argmax()) + 1)
            n, b = n - sizes[-1], b - 1
        todo.extend((m, level + 1, me) for m in reversed(sizes))
    return value, parents
