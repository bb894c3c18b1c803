"""Medusa's sparse tree: grown greedily from measured head accuracies.

Cai et al. 2024, 2401.10774, section 2.3.3.  ``accept[s][b]`` is the chance
that the draft's b-th best token at depth ``s`` is the right one; a node is
worth the product along its path, and a tree the sum over its nodes: the
expected number of accepted drafts, if ranks at different depths were
independent.

Does not handle: chances that rise with the rank.  The greedy tree need not
be the best one then; `shapes.sequoia` takes the same matrix and is exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specref.draft.shapes import Shape
from specref.heads.base import Head, Text
from specref.tree import ROOT
from specref.warp import Warp

Accept = Sequence[Sequence[float]]


def worth(accept: Accept, shape: Sequence[int]) -> float:
    """Sum over the nodes of ``shape`` of the products along their paths.

    Raises:
        ValueError: the shape is deeper or wider than ``accept``.
    """
    value: list[float] = []
    depth: list[int] = []
    seen: dict[int, int] = {}
    for parent in shape:
        level = 0 if parent == ROOT else depth[parent] + 1
        rank = seen[parent] = seen.get(parent, -1) + 1
        if level >= len(accept) or rank >= len(accept[level]):
            raise ValueError(
                f"shape has a child of rank {rank} at depth {level + 1}, "
                "which accept does not cover"
            )
        above = 1.0 if parent == ROOT else value[parent]
        value.append(above * float(accept[level][rank]))
        depth.append(level)
    return sum(value)


def greedy_tree(accept: Accept, nodes: int) -> Shape:
    """Add the worthiest neighbour until the tree has ``nodes`` nodes.

    Neighbours of a tree are the first child and the next sibling of its
    nodes.  Equal worth: the shallower, then the more leftward one first.

    Args:
        accept: ``[depths][ranks]``, see the module.
    Returns:
        The shape, level by level; fewer nodes where ``accept`` has no room.
    """
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}")
    if not accept or not all(len(row) for row in accept):
        raise ValueError("accept must have at least one depth and one rank")
    chosen: list[tuple[int, ...]] = []
    heap: list[tuple[float, int, tuple[int, ...], float]] = []

    def offer(path: tuple[int, ...], above: float) -> None:
        """A neighbour whose parent is worth ``above``."""
        row = accept[len(path) - 1] if len(path) <= len(accept) else ()
        if path[-1] < len(row):
            value = above * float(row[path[-1]])
            heapq.heappush(heap, (-value, len(path), path, above))

    offer((0,), 1.0)
    while heap and len(chosen) < nodes:
        loss, _, path, above = heapq.heappop(heap)
        chosen.append(path)
        offer((*path[:-1], path[-1] + 1), above)
        offer((*path, 0), -loss)
    return _as_shape(chosen)


def _as_shape(paths: Sequence[tuple[int, ...]]) -> Shape:
    """Parents of the nodes with these paths of ranks, level by level."""
    order = sorted(paths, key=lambda path: (len(path), path))
    index = {path: i for i, path in enumerate(order)}
    return tuple(index.get(path[:-1], ROOT) for path in order)


@torch.inference_mode()
def head_accuracy(
    target: Any,
    head: Head,
    texts: Sequence[tuple[Sequence[int], int]],
    depth: int = 3,
    width: int = 10,
    temperature: float = 0.0,
) -> list[list[float]]:
    """``accept[s][b]``, ``depth`` by ``width``, on texts of the target.

    At temperature 0 it is how often the draft's b-th best token is the
    target's choice; above, the target's mean probability of that token,
    which is how often it is accepted as a child of rank ``b``.  The path
    above is the text's own, so a head that reads it is told the truth.

    Args:
        texts: (token ids, where the response starts).
    """
    total = torch.zeros(depth, width, dtype=torch.float64)
    count = torch.zeros(depth, 1, dtype=torch.float64)
    for ids, start in texts:
        right = _right(target, head, ids, start, depth, width, temperature)
        for s, hits in enumerate(right):
            total[s] += hits.sum(0)
            count[s] += len(hits)
    mean = total / count.clamp(min=1.0)
    return [[round(float(x), 5) for x in row] for row in mean]


def _right(
    target: Any,
    head: Head,
    ids: Sequence[int],
    start: int,
    depth: int,
    width: int,
    temperature: float,
) -> list[Tensor]:
    """Per depth ``[positions, width]``: the target's law of the draft's
    best tokens, at every position that predicts a response token."""
    row = torch.tensor([list(ids)], device=target.device)
    out = target.forward(row, target.new_cache(1, len(ids)), None, head.taps)
    law = Warp(temperature)(out.logits[0])
    taps = tuple(tap[:, :-1] for tap in out.taps)
    drafts = head.rollout(Text(row, out.hidden[:, :-1], taps), depth)
    found = []
    for s, draft in enumerate(drafts):
        # Pair t at depth s guesses what feature u = t + s + 1 predicts.
        first = max(start - 1, s + 1)
        goal = law[first:-1]
        mine = draft[0, first - s - 1 : len(ids) - 2 - s]
        best = head.logits(mine, s).topk(width).indices
        found.append(goal.gather(1, best).double().cpu())
    return found
