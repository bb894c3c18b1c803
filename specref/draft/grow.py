"""Growing trees of a fixed shape, level by level.

A `Stepper` turns nodes into logits; `Static` decides which nodes to grow.
Together they make a drafter: an autoregressive model, a head, an exit.
Dynamic trees are in `specref.draft.dynamic`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from specref.draft.sprout import (
    Sprout,
    Stepper,
    scores_after,
    share,
    step_front,
    unpad,
)
from specref.draws import Draws
from specref.tree import DETERMINISTIC, IID, KINDS, ROOT, Tree
from specref.warp import Sampling, Warp, largest

Spot = tuple[int, int]  # (node of a tree, the node of its shape there)


def rank(scores: Tensor, count: int) -> list[list[int]]:
    """The ``count`` most likely tokens of each row of ``[m, V]``.

    Ties go to the lower index.  Fewer where fewer are possible.
    """
    if count == 1:
        return [[token] for token in scores.argmax(-1).tolist()]
    # One more than asked for shows whether there is a tie at the edge.
    value, index = largest(scores, min(count + 1, scores.shape[-1]))
    out = []
    pairs = zip(value.tolist(), index.tolist(), strict=True)
    for row, (v, i) in enumerate(pairs):
        if len(v) > count and v[-1] == v[-2] > -math.inf:
            # Every entry of the edge's value: topk alone picks any of them.
            at = (scores[row] >= v[-1]).nonzero().squeeze(-1)
            v, i = scores[row, at].tolist(), at.tolist()
        ranked = sorted(
            (-x, j) for x, j in zip(v, i, strict=True) if x > -math.inf
        )
        out.append([j for _, j in ranked[:count]])
    return out


def entries(values: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Entries ``tokens[i]`` of row ``i`` of ``[m, V]``, for all rows in
    turn: one flat tensor."""
    wide = values.shape[-1]
    at = [wide * i + t for i, some in enumerate(tokens) for t in some]
    where = torch.tensor(at, dtype=torch.long, device=values.device)
    return values.take(where)


def without_replacement(law: Tensor, count: int, draws: Draws) -> list[int]:
    """Up to ``count`` different tokens, each from what is left of ``law``.

    Fewer when the support is exhausted.
    """
    left, out = law.clone(), []
    for _ in range(min(count, int((law > 0).sum()))):
        token = int(draws.categorical(left))
        out.append(token)
        left[token] = 0.0
    return out


class Static:
    """Trees of one fixed shape.

    Args:
        shape: parents of the shape's nodes, parents before children, as in
            `Tree`.  A chain of length 3 is ``(-1, 0, 1)``; two chains
            ``(-1, -1, 0, 1)``.
        kind: how children are made: ``iid`` and ``without_replacement``
            draw from the draft's law, ``deterministic`` takes the top-k.
            At temperature 0 all three are the top-k.
        stop_below: do not grow below a node whose own draft probability is
            smaller (the confidence stop of assisted generation; at
            temperature 0 its probability at temperature 1 counts).  The
            node itself stays: dropping it after looking would bias the
            output.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kind: str = IID,
        stop_below: float | None = None,
    ) -> None:
        Tree((0,) * len(shape), tuple(shape))  # validates the parents
        if not len(shape):
            raise ValueError("shape must have at least one node, got none")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if stop_below is not None and not 0.0 <= stop_below <= 1.0:
            raise ValueError(f"stop_below must be in [0, 1], got {stop_below}")
        self.shape, self.kind, self.stop_below = shape, kind, stop_below
        self.below: dict[int, list[int]] = {}
        for node, parent in enumerate(shape):
            self.below.setdefault(parent, []).append(node)

    @property
    def max_nodes(self) -> int:
        return len(self.shape)

    def kind_for(self, sampling: Sampling) -> str:
        return DETERMINISTIC if sampling.greedy else self.kind

    def grow(
        self,
        stepper: Stepper,
        sprouts: Sequence[Sprout],
        logits: Tensor,
        sampling: Sampling,
        draws: Sequence[Draws],
        eos: frozenset[int],
    ) -> list[Tree]:
        """Grow one tree per sprout from root ``logits`` ``[B, V]``."""
        kind = self.kind_for(sampling)
        # Each row's frontier: (node of the tree, node of the shape).
        front = [[(ROOT, ROOT)] if s.room > 0 else [] for s in sprouts]
        rows = unpad(logits[:, None], front)
        while any(front):
            nodes = [[node for node, _ in some] for some in front]
            scores = scores_after(sprouts, nodes, rows, sampling)
            law = None if kind == DETERMINISTIC else sampling.warp(scores)
            picks = self._picks(scores, law, front, kind, draws)
            sure = self._sure(scores, law, picks, sampling)
            front = self._plant(sprouts, front, law, picks, sure, eos)
            nodes = [[node for node, _ in some] for some in front]
            if any(nodes):
                rows = step_front(stepper, sprouts, nodes)
                if kind == IID:
                    rows = share(sprouts, nodes, rows)
        return [s.tree(kind) for s in sprouts]

    def _picks(
        self,
        scores: Tensor,
        law: Tensor | None,
        front: Sequence[Sequence[Spot]],
        kind: str,
        draws: Sequence[Draws],
    ) -> list[list[int]]:
        """The tokens below each frontier node, row by row."""
        counts = [len(self.below[spot]) for some in front for _, spot in some]
        if law is None:
            best = rank(scores, max(counts))
            return [x[:n] for x, n in zip(best, counts, strict=True)]
        whose = [d for d, some in zip(draws, front, strict=True) for _ in some]
        each = zip(law, counts, whose, strict=True)
        if kind == IID:
            return [
                d.categorical(x.expand(n, -1)).tolist() for x, n, d in each
            ]
        return [without_replacement(x, n, d) for x, n, d in each]

    def _sure(
        self,
        scores: Tensor,
        law: Tensor | None,
        picks: list[list[int]],
        sampling: Sampling,
    ) -> Iterator[bool]:
        """Whether to go on below each of ``picks``, as far as confidence
        is asked for."""
        if self.stop_below is None:
            return repeat(True)
        if law is None:
            # The greedy law is certain of every token: no use for a stop.
            law = (Warp() if sampling.greedy else sampling.warp)(scores)
        return iter((entries(law, picks) >= self.stop_below).tolist())

    def _plant(
        self,
        sprouts: Sequence[Sprout],
        front: Sequence[Sequence[Spot]],
        law: Tensor | None,
        picks: list[list[int]],
        sure: Iterator[bool],
        eos: frozenset[int],
    ) -> list[list[Spot]]:
        """Add ``picks`` to the trees; the new frontier."""
        out: list[list[Spot]] = [[] for _ in sprouts]
        at = 0
        for sprout, some, new in zip(sprouts, front, out, strict=True):
            for node, spot in some:
                if law is not None:
                    sprout.laws.append(law[at])
                below = zip(picks[at], self.below[spot], strict=False)
                for (token, child), on in zip(below, sure, strict=False):
                    i = sprout.add(token, node, len(sprout.laws) - 1)
                    deep = sprout.depth[i] >= sprout.room
                    ends = deep or token in eos or child not in self.below
                    if on and not ends:
                        new.append((i, child))
                at += 1
        return out
