"""Tree shapes: parents of nodes, parents before children, ``ROOT`` on top.

A shape says where nodes are; `grow.Static` fills it with tokens.  Sequoia's
shape is the best one for measured acceptance (`measure.acceptance`).
"""

from __future__ import annotations

from collections.abc import Sequence

from specref.tree import ROOT

Shape = tuple[int, ...]


def chain(gamma: int) -> Shape:
    """A chain of ``gamma`` nodes."""
    if gamma < 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}")
    return tuple(range(-1, gamma - 1))


def chains(k: int, gamma: int) -> Shape:
    """``k`` chains of ``gamma`` nodes, level by level."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    chain(gamma)
    return (ROOT,) * k + tuple(range(k * (gamma - 1)))


def branching(widths: Sequence[int]) -> Shape:
    """Every node of level ``i`` has ``widths[i]`` children."""
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be positive numbers, got {widths}")
    shape: list[int] = []
    level = [ROOT]
    for width in widths:
        start = len(shape)
        shape += [node for node in level for _ in range(width)]
        level = list(range(start, len(shape)))
    return tuple(shape)


def sequoia(
    accept: Sequence[float], nodes: int, depth: int | None = None
) -> Shape:
    """The shape of ``nodes`` drafted tokens with the most expected ones.

    Args:
        accept: ``accept[b]`` is the chance that the b-th child is the one
            accepted, given that its parent was (`theory.sequoia`).
        depth: most levels below the root.
    Raises:
        ValueError: no node, or chances that are none.
    """
    from specref import theory

    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}")
    levels = None if depth is None else depth + 1
    _, parents = theory.sequoia(accept, nodes + 1, levels)
    # The theory counts the root (the last committed token) as a node.
    return tuple(p - 1 for p in parents[1:])
