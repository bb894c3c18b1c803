"""Greedy verification: follow the target's most likely token.

The law at temperature 0, for every kind of proposal.  Ties go to the lower
token id, as in ``argmax``, for the target and the drafts alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, stop_at
from specref.tree import KINDS, ROOT, Tree


def greedy(tree: Tree, scores: Tensor, draws: Draws) -> Verdict:
    """Accept the children that are the target's choice.

    Args:
        scores: ``[n + 1, V]`` logits or probabilities.
        draws: not asked.
    """
    best, node = scores.argmax(-1).tolist(), ROOT
    while True:
        want = best[node + 1]
        match = [c for c in tree.children(node) if tree.tokens[c] == want]
        if not match:
            return stop_at(tree, node, want)
        node = match[0]


def _decide(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    if not torch.equal(p.amax(-1), p.sum(-1)):
        raise ValueError(
            "rule 'greedy' needs laws with all mass on one token "
            "(temperature 0); use a sampling rule at other temperatures"
        )
    return greedy(tree, p, draws)


GREEDY = Rule(
    "greedy",
    _decide,
    lossless=True,
    admits=frozenset(KINDS),
    paper="Stern 2018, 1811.03115",
)
