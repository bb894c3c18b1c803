"""Trees: the one shape of every proposal.

A tree is a list of nodes, parents before children.  A chain is the thin
tree, k i.i.d. candidates the bushy one, an empty tree plain decoding.

Does not handle: batches.  A tree belongs to one row; `pack` lays the trees
of several rows side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROOT = -1  # parent of the children of the last committed token
DEAD = -2  # parent of a padding node: attends to itself only, never kept

IID = "iid"
WITHOUT_REPLACEMENT = "without_replacement"
DETERMINISTIC = "deterministic"
KINDS = (IID, WITHOUT_REPLACEMENT, DETERMINISTIC)


@dataclass(frozen=True)
class Tree:
    """One row's proposal.

    Attributes:
        tokens: node tokens, in an order where parents precede children
            and siblings stand in the order in which they were drawn.
        parents: index of each node's parent, ``ROOT`` for the children of
            the last committed token.
        kind: how siblings were made: ``iid`` draws from one law,
            ``without_replacement`` draws (each from the law with its
            earlier siblings removed and renormalised), or
            ``deterministic`` (a function of the context, such as top-k).
        q: ``[m, V]`` laws, or None for deterministic trees.  For draws
            without replacement it is the law before any removal.
        law_of: row of ``q`` that node ``i`` was drawn from.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    kind: str = DETERMINISTIC
    q: Tensor | None = None
    law_of: tuple[int, ...] = ()
    _children: dict[int, list[int]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ValueError(
                f"parents must have one entry per token, got "
                f"{len(self.parents)} for {len(self.tokens)} tokens"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.tokens and self.kind != DETERMINISTIC:
            if self.q is None or len(self.law_of) != len(self.tokens):
                raise ValueError(
                    f"a tree of kind {self.kind!r} needs q and one law_of "
                    "entry per node: the law each token was drawn from"
                )
            if not 0 <= min(self.law_of) <= max(self.law_of) < len(self.q):
                raise ValueError(
                    f"law_of must name rows of q, in [0, {len(self.q)}), "
                    f"got {self.law_of}"
                )
        for i, parent in enumerate(self.parents):
            if not ROOT <= parent < i:
                raise ValueError(
                    f"parents[{i}] must be in [-1, {i}), got {parent}"
                )
            self._children.setdefault(parent, []).append(i)
        if self.kind == WITHOUT_REPLACEMENT:
            for family in self._children.values():
                if len({self.law_of[i] for i in family}) > 1:
                    raise ValueError(
                        "siblings drawn without replacement must share one "
                        f"law, got law_of {self.law_of}"
                    )

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self, node: int) -> list[int]:
        """Children of ``node`` (or ``ROOT``), in the order drawn."""
        return self._children.get(node, [])

    def law(self, node: int) -> Tensor:
        """``[V]``: the law that ``node`` was drawn from."""
        return self.q[self.law_of[node]]

    def path(self, node: int) -> list[int]:
        """Nodes from the first level down to ``node``; [] for ``ROOT``."""
        out: list[int] = []
        while node != ROOT:
            out.append(node)
            node = self.parents[node]
        return out[::-1]

    def depth(self, node: int) -> int:
        """1 for a child of the root; 0 for ``ROOT``."""
        return len(self.path(node))

    @property
    def height(self) -> int:
        return max((self.depth(i) for i in range(len(self))), default=0)

    @property
    def is_chain(self) -> bool:
        return all(p == i - 1 for i, p in enumerate(self.parents))


EMPTY = Tree((), ())


def chain(tokens: Sequence[int], q: Tensor | None = None) -> Tree:
    """A chain of ``tokens``; ``q`` ``[gamma, V]`` if they were sampled."""
    n = len(tokens)
    parents = tuple(range(-1, n - 1))
    if q is None:
        return Tree(tuple(tokens), parents)
    return Tree(tuple(tokens), parents, IID, q, tuple(range(n)))


def ancestors(parents: Tensor) -> Tensor:
    """``[B, n, n]`` bool: entry (i, j) says that node i may see node j.

    A node sees itself and its ancestors.  Siblings and cousins do not see
    each other; a padding node sees itself only and nobody sees it.
    ``parents`` is ``[B, n]``.  Depth is the row sum minus one.
    """
    n = parents.shape[1]
    where = torch.arange(n, device=parents.device)
    hop = parents.unsqueeze(2) == where  # no column matches ROOT or DEAD
    reach = hop | torch.eye(n, dtype=torch.bool, device=parents.device)
    # Squaring doubles the distance covered: no loop over nodes, no
    # synchronisation with a GPU.
    for _ in range(max(n - 1, 1).bit_length()):
        wide = reach.float()
        reach = (wide @ wide) > 0
    return reach


def pack(
    last: Sequence[int], trees: Sequence[Tree], device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Lay rows side by side: the last committed token, then its tree.

    Returns:
        tokens ``[B, 1 + n]`` and parents ``[B, 1 + n]`` for `LM.forward`;
        node ``i`` of a tree is entry ``i + 1``.  Short rows end in
        padding nodes (parent ``DEAD``), whose token is never read.
        Parents are None when every row is a full chain.
    """
    width = 1 + max(len(t) for t in trees)
    line = all(t.is_chain and len(t) == width - 1 for t in trees)
    tokens, parents = [], []
    for first, t in zip(last, trees, strict=True):
        pad = width - 1 - len(t)
        tokens.append([first, *t.tokens, *[0] * pad])
        parents.append([ROOT, *[p + 1 for p in t.parents], *[DEAD] * pad])
    ids = torch.tensor(tokens, device=device)
    return ids, None if line else torch.tensor(parents, device=device)
