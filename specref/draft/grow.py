"""Growing trees level by level, for any model that can be stepped.

A `Stepper` turns nodes into logits; `Static` decides which nodes to grow.
Together they make a drafter: an autoregressive model, a head, an exit.
Dynamic trees are in `specref.draft.dynamic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specref.draws import Draws
from specref.tree import (
    DEAD,
    DETERMINISTIC,
    IID,
    KINDS,
    ROOT,
    Tree,
)
from specref.warp import Sampling, Warp


class Stepper(Protocol):
    """A draft model seen from the growing tree."""

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Take in what was committed; logits ``[B, V]`` after each row."""

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits ``[B, m, V]`` after new nodes (parents as in `LM`)."""


@dataclass
class Sprout:
    """One row's tree while it grows."""

    prefix: Sequence[int]
    room: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    law_of: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    slot: dict[int, int] = field(default_factory=dict)  # node -> pending

    def add(self, token: int, parent: int, law: int = 0) -> int:
        """Append a node below ``parent``, drawn from ``laws[law]``;
        returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depth.append(1 if parent == ROOT else self.depth[parent] + 1)
        self.law_of.append(law)
        return len(self.tokens) - 1

    def text(self, node: int) -> list[int]:
        """The prefix that the law after ``node`` is conditioned on."""
        out: list[int] = []
        while node != ROOT:
            out.append(self.tokens[node])
            node = self.parents[node]
        return [*self.prefix, *out[::-1]]

    def tree(self, kind: str) -> Tree:
        """What has grown, as a proposal of that kind."""
        laws = None
        if kind != DETERMINISTIC and self.tokens:
            laws = torch.stack(self.laws)
        return Tree(
            tuple(self.tokens),
            tuple(self.parents),
            kind,
            laws,
            tuple(self.law_of) if laws is not None else (),
        )


def top(scores: Tensor, count: int) -> list[int]:
    """The ``count`` most likely tokens of ``[V]``, ties by lower index."""
    if count == 1:
        return [int(scores.argmax())]
    edge = scores.topk(min(count, scores.shape[-1])).values[-1]
    # Every entry of the edge's value: topk alone picks any of them.
    index = ((scores >= edge) & (scores > -torch.inf)).nonzero().squeeze(-1)
    pairs = zip(scores[index].tolist(), index.tolist(), strict=True)
    ranked = sorted((-v, i) for v, i in pairs)
    return [i for _, i in ranked[:count]]


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


def extend_all(
    stepper: Stepper, sprouts: Sequence[Sprout], front: list[list[int]]
) -> list[list[Tensor]]:
    """Step every row's ``front`` nodes at once; logits ``[V]`` of each."""
    width = max(map(len, front))
    tokens, parents = [], []
    base = getattr(stepper, "pending", 0)
    for sprout, nodes in zip(sprouts, front, strict=True):
        pad = width - len(nodes)
        tokens.append([sprout.tokens[i] for i in nodes] + [0] * pad)
        ups = [sprout.parents[i] for i in nodes]
        parents.append(
            [ROOT if u == ROOT else sprout.slot[u] for u in ups] + [DEAD] * pad
        )
        for j, node in enumerate(nodes):
            sprout.slot[node] = base + j
    logits = stepper.extend(torch.tensor(tokens), torch.tensor(parents))
    return [list(logits[b, : len(n)]) for b, n in enumerate(front)]


def share(
    sprout: Sprout, new: Sequence[tuple[int, int]], rows: list[Tensor]
) -> list[Tensor]:
    """One law per context: equal i.i.d. siblings get the same logits.

    A batched forward rounds each node in its own way, and a rule that
    compares children of equal siblings needs draws from one law.
    """
    first: dict[tuple[int, ...], Tensor] = {}
    return [
        first.setdefault(tuple(sprout.text(node)), row)
        for (node, _), row in zip(new, rows, strict=True)
    ]


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
        # Each row's frontier: (node of the tree, node of the shape, logits).
        front = [[(ROOT, ROOT, row)] for row in logits]
        while True:
            grown = []
            for sprout, nodes, d in zip(sprouts, front, draws, strict=True):
                new = []
                for node, spot, row in nodes:
                    new += self._children(
                        sprout, node, spot, row, kind, sampling, d, eos
                    )
                grown.append(new)
            if not any(grown):
                return [s.tree(kind) for s in sprouts]
            rows = extend_all(
                stepper, sprouts, [[n for n, _ in new] for new in grown]
            )
            front = [
                [(n, s, row) for (n, s), row in zip(new, out, strict=True)]
                for new, out in zip(
                    grown, map(share, sprouts, grown, rows), strict=True
                )
            ]

    def _children(
        self,
        sprout: Sprout,
        node: int,
        spot: int,
        logits: Tensor,
        kind: str,
        sampling: Sampling,
        draws: Draws,
        eos: frozenset[int],
    ) -> list[tuple[int, int]]:
        """Give ``node`` its children; returns those to grow below."""
        spots = self.below.get(spot, [])
        above = 0 if node == ROOT else sprout.depth[node]
        if not spots or above >= sprout.room:
            return []
        prefix = [sprout.text(node)] if sampling.processors else None
        scores = sampling.scores(logits[None], prefix)[0]
        law = sampling.warp(scores) if kind != DETERMINISTIC else None
        sure = law
        if self.stop_below is not None and law is None:
            # The greedy law is certain of every token: no use for a stop.
            sure = (Warp() if sampling.greedy else sampling.warp)(scores)
        tokens = self._tokens(scores, law, len(spots), kind, draws)
        if kind != DETERMINISTIC:
            sprout.laws.append(law)
        out = []
        for token, child in zip(tokens, spots, strict=False):
            new = sprout.add(token, node, len(sprout.laws) - 1)
            ends = token in eos or child not in self.below
            if ends or above + 1 >= sprout.room:
                continue
            if self.stop_below is None or sure[token] >= self.stop_below:
                out.append((new, child))
        return out

    def _tokens(
        self,
        scores: Tensor,
        law: Tensor | None,
        count: int,
        kind: str,
        draws: Draws,
    ) -> list[int]:
        if kind == DETERMINISTIC:
            return top(scores, count)
        if kind == IID:
            return draws.categorical(law.expand(count, -1)).tolist()
        return without_replacement(law, count, draws)
