"""Trees while they grow, for any model that can be stepped.

A `Stepper` turns nodes into logits; a policy (`grow`, `dynamic`) decides
which nodes to grow.  It works on the frontiers of all rows at once: a list
of nodes per row, and one tensor ``[m, V]`` with the logits after each of
them, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specref.tree import DEAD, DETERMINISTIC, ROOT, Tree
from specref.warp import Sampling


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

    def words(self, node: int) -> list[int]:
        """The tokens from the first level down to ``node``."""
        out: list[int] = []
        while node != ROOT:
            out.append(self.tokens[node])
            node = self.parents[node]
        return out[::-1]

    def text(self, node: int) -> list[int]:
        """The prefix that the law after ``node`` is conditioned on."""
        return [*self.prefix, *self.words(node)]

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


def scores_after(
    sprouts: Sequence[Sprout],
    front: Sequence[Sequence[int]],
    logits: Tensor,
    sampling: Sampling,
) -> Tensor:
    """``[m, V]`` logits after the ``front`` nodes, processed."""
    prefixes = None
    if sampling.processors:
        both = zip(sprouts, front, strict=True)
        prefixes = [s.text(node) for s, nodes in both for node in nodes]
    return sampling.scores(logits, prefixes)


def unpad(logits: Tensor, front: Sequence[Sequence[int]]) -> Tensor:
    """``[B, n, V]`` -> ``[m, V]``: as many entries of each row as it has
    nodes in ``front``."""
    counts = list(map(len, front))
    if min(counts) == logits.shape[1]:
        return logits.flatten(0, 1)
    return torch.cat([x[:n] for x, n in zip(logits, counts, strict=True)])


def step_front(
    stepper: Stepper, sprouts: Sequence[Sprout], front: list[list[int]]
) -> Tensor:
    """Step every row's ``front`` nodes at once; their logits ``[m, V]``."""
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
    return unpad(logits, front)


def share(
    sprouts: Sequence[Sprout], front: list[list[int]], logits: Tensor
) -> Tensor:
    """One law per context: equal i.i.d. siblings get the same logits.

    A batched forward rounds each node in its own way, and a rule that
    compares children of equal siblings needs draws from one law.
    """
    first: dict[tuple[int, ...], int] = {}
    pick: list[int] = []
    for b, (sprout, nodes) in enumerate(zip(sprouts, front, strict=True)):
        for node in nodes:
            key = (b, *sprout.words(node))
            pick.append(first.setdefault(key, len(pick)))
    return logits if len(first) == len(pick) else logits[pick]
