"""k-SEQ: SpecTr's near-optimal rule for k i.i.d. candidates.

Sun et al. 2023 (2310.15141), Algorithms 2 and 3.  All k candidates are
tested against the same thinned target p / rho, instead of against shrinking
residuals; drafts that agree with the accepted token go on together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, draw, stop_at
from specref.rules.recursive import first_accepted
from specref.tree import IID, ROOT, Tree


def solve_rho(p: Tensor, q: Tensor, k: int, steps: int = 60) -> float:
    """The smallest valid rho in [1, k], rounded up (a too small one would
    make the residual negative).

    Solves 1 - (1 - beta)^k = rho beta with beta = sum min(q, p / rho).
    """
    low, high = 1.0, float(k)
    for _ in range(steps if k > 1 else 0):
        rho = 0.5 * (low + high)
        beta = float(torch.minimum(q, p / rho).sum())
        if 1.0 - (1.0 - beta) ** k >= rho * beta:
            low = rho
        else:
            high = rho
        if high - low < 1e-12:
            break
    return high


def leftover(p: Tensor, q: Tensor, rho: float, k: int) -> Tensor:
    """The law after k rejections, ``[V]``; p itself if none is possible."""
    thin = torch.minimum(q, p / rho)
    beta = float(thin.sum())
    if beta == 0.0:
        return p
    hit = 1.0 - (1.0 - min(beta, 1.0)) ** k
    rest = (p - thin * (hit / beta)).clamp(min=0.0)
    total = rest.sum()
    return rest / total if total > 0 else p


def one_law(tree: Tree, drafts: Sequence[int]) -> Tensor:
    """The law ``[V]`` that every candidate was drawn from.

    Raises:
        ValueError: there is more than one; rho is solved for one q.
    """
    q = tree.law(drafts[0])
    for c in drafts[1:]:
        same = tree.law_of[c] == tree.law_of[drafts[0]]
        if not same and not torch.equal(tree.law(c), q):
            raise ValueError(
                "rule 'kseq' would be biased for candidates drawn from "
                "different laws: it needs k draws from one q"
            )
    return q


def kseq(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    """Apply k-SEQ to the surviving drafts, depth by depth."""
    alive = [ROOT]
    while True:
        drafts = [c for node in alive for c in tree.children(node)]
        here = p[alive[0] + 1]
        if not drafts:
            return stop_at(tree, alive[0], draw(here, draws))
        q = one_law(tree, drafts).to(here)
        rho = solve_rho(here, q, len(drafts))
        x = torch.tensor([tree.tokens[c] for c in drafts], device=p.device)
        chances = (here[x] / (rho * q[x])).clamp(max=1.0)
        which = first_accepted(chances, draws)
        if which == len(drafts):
            rest = leftover(here, q, rho, len(drafts))
            return stop_at(tree, alive[0], draw(rest, draws))
        won = tree.tokens[drafts[which]]
        alive = [c for c in drafts if tree.tokens[c] == won]
        # A draft that goes deeper leads, so that its children count.
        alive.sort(key=lambda c: not tree.children(c))


KSEQ = Rule(
    "kseq",
    kseq,
    lossless=True,
    admits=frozenset({IID}),
    paper="Sun 2023, 2310.15141",
)
