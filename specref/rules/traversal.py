"""Traversal verification: a tree is judged from its leaves to its root.

Weng et al. 2025 (2505.12398), Algorithm 1.  A leaf is accepted with the
weight of its whole path; a rejected leaf leaves its parent with a residual
law and a new weight.  On a chain it is block verification.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, draw, stop_at
from specref.rules.recursive import drafted_from, first_accepted
from specref.tree import KINDS, ROOT, Tree


class _State:
    """The tree while leaves are taken off: laws, weights, who is left."""

    def __init__(self, tree: Tree, p: Tensor) -> None:
        nodes = range(-1, len(tree))
        self.tree = tree
        self.law = {v: p[v + 1] for v in nodes}
        self.left = {v: list(tree.children(v)) for v in nodes}
        self.drafts = {
            v: dict(
                zip(
                    tree.children(v),
                    drafted_from(tree, tree.children(v), p[v + 1]),
                    strict=True,
                )
            )
            for v in nodes
        }
        # Weight of a node given its parent's state; the root's is 1.
        self.weight = {ROOT: p.new_ones(())}

    def leaf(self) -> int:
        """Go down the first children that are left, weighing new ones.

        A node that was entered before keeps its weight: what its rejected
        children left of it.
        """
        node = ROOT
        while self.left[node]:
            child = self.left[node][0]
            if child not in self.weight:
                x, q = self.tree.tokens[child], self.drafts[node][child]
                ratio = self.law[node][x] / q[x]
                self.weight[child] = (self.weight[node] * ratio).clamp(max=1.0)
            node = child
        return node

    def reject(self, leaf: int) -> None:
        """Take the leaf off; its parent keeps what is not covered by it."""
        node = self.tree.parents[leaf]
        q = self.drafts[node][leaf]
        over = (self.weight[node] * self.law[node] - q).clamp(min=0.0)
        area, missing = over.sum(), 1.0 - self.weight[node]
        total = area + missing
        if total > 0:
            self.weight[node] = area / total
        if area > 0:
            self.law[node] = over / area
        self.left[node].pop(0)


def traversal(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    """Test leaves in depth-first order until one passes.

    The order is fixed and each test's chance depends on earlier rejections
    only, so all tests together are one draw.
    """
    state, chances, ends = _State(tree, p), [], []
    while (leaf := state.leaf()) != ROOT:
        chances.append(state.weight[leaf])
        ends.append((leaf, state.law[leaf]))
        state.reject(leaf)
    ends.append((ROOT, state.law[ROOT]))
    which = first_accepted(torch.stack(chances), draws) if chances else 0
    node, law = ends[which]
    return stop_at(tree, node, draw(law, draws))


TRAVERSAL = Rule(
    "traversal",
    traversal,
    lossless=True,
    admits=frozenset(KINDS),
    paper="Weng 2025, 2505.12398",
)
