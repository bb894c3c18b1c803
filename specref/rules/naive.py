"""Naive sampling: draw from the target, keep a child that agrees.

The baseline of SpecInfer (Miao et al. 2024, 2305.09781, section 4.3).
Lossless for every proposal, since the target's draw never looks at it; for
top-k children it equals recursive rejection.
"""

from __future__ import annotations

from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, draw, stop_at
from specref.tree import KINDS, ROOT, Tree


def naive(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    """Follow the target's own draws for as long as they are in the tree."""
    node = ROOT
    while True:
        token = draw(p[node + 1], draws)
        match = [c for c in tree.children(node) if tree.tokens[c] == token]
        if not match:
            return stop_at(tree, node, token)
        node = match[0]


NAIVE = Rule(
    "naive",
    naive,
    lossless=True,
    admits=frozenset(KINDS),
    paper="Miao 2024, 2305.09781",
)
