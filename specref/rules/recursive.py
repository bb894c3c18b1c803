"""Recursive rejection: siblings are tested in turn against what is left.

SpecInfer's multi-step speculative sampling for i.i.d. children (Miao et
al. 2024, 2305.09781, Theorem 4.2); Sequoia's Algorithm 2 and recursive
speculative decoding for children without replacement (Chen et al. 2024,
2402.12374; Jeon et al. 2024, 2402.14160); EAGLE's tree rule for top-k
children, whose draft law is a point mass (Li et al. 2024, 2401.15077).
One rule: the kinds differ in the law that a sibling was drawn from only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, draw, residual, stop_at
from specref.tree import DETERMINISTIC, KINDS, ROOT, WITHOUT_REPLACEMENT, Tree


def drafted_from(
    tree: Tree, siblings: Sequence[int], like: Tensor
) -> Iterator[Tensor]:
    """The law ``[V]`` each sibling was drawn from, given earlier ones."""
    law = None
    for node in siblings:
        if tree.kind == DETERMINISTIC:
            law = torch.zeros_like(like)
            law[tree.tokens[node]] = 1.0
        elif tree.kind == WITHOUT_REPLACEMENT and law is not None:
            law = law / law.sum()
        else:
            law = tree.law(node).to(like)
        yield law
        if tree.kind == WITHOUT_REPLACEMENT:
            # After the rejection step has used the law with it.
            law = law.clone()
            law[tree.tokens[node]] = 0.0


def sibling_tests(
    tree: Tree, siblings: Sequence[int], p: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Acceptance chances of siblings in turn, and what is left after each.

    Returns:
        ``[k]`` chance of each given that all earlier ones were rejected,
        and ``k + 1`` laws: p, then the residual after each rejection.
    """
    left, chances = [p], []
    for node, q in zip(siblings, drafted_from(tree, siblings, p), strict=True):
        x = tree.tokens[node]
        chances.append((left[-1][x] / q[x]).clamp(max=1.0))
        left.append(residual(left[-1], q))
    return torch.stack(chances) if chances else p.new_zeros(0), left


def first_accepted(chances: Tensor, draws: Draws) -> int:
    """Index of the first test that passes; their number when none does."""
    failed = torch.cat((chances.new_ones(1), (1.0 - chances).cumprod(0)))
    passes = torch.cat((chances, chances.new_ones(1)))
    return int(draws.categorical(failed * passes))


def recursive(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    """Walk down: accept the first sibling that passes, else correct."""
    node = ROOT
    while True:
        siblings = tree.children(node)
        chances, left = sibling_tests(tree, siblings, p[node + 1])
        which = first_accepted(chances, draws) if siblings else 0
        if which == len(siblings):
            return stop_at(tree, node, draw(left[-1], draws))
        node = siblings[which]


RECURSIVE = Rule(
    "recursive",
    recursive,
    lossless=True,
    admits=frozenset(KINDS),
    paper="Miao 2024, 2305.09781; Chen 2024, 2402.12374; Li 2024, 2401.15077",
)
