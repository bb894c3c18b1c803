"""Token-wise rejection: the rule of speculative decoding and sampling.

Leviathan et al. 2023 (2211.17192), Algorithm 1; Chen et al. 2023
(2302.01318), Algorithm 2 (with the letters p and q exchanged).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, draw, residual
from specref.tree import IID, WITHOUT_REPLACEMENT, Tree


def tokenwise(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    """Accept token i with probability min(1, p_i / q_i), stop at the first
    rejection and draw from norm([p - q]_+); a bonus from p if none."""
    n = accepted(ratios(tree, p).clamp(max=1.0), draws)
    rest = p[n] if n == len(tree) else residual(p[n], tree.law(n).to(p))
    return Verdict(tuple(range(n)), draw(rest, draws))


def ratios(tree: Tree, p: Tensor) -> Tensor:
    """p_i(x_i) / q_i(x_i) of a chain's tokens, ``[gamma]``."""
    if not len(tree):
        return p.new_zeros(0)
    at = torch.arange(len(tree), device=p.device)
    x = torch.tensor(tree.tokens, device=p.device)
    rows = torch.tensor(tree.law_of, device=p.device)
    return p[at, x] / tree.q[rows, x].to(p)


def accepted(chance: Tensor, draws: Draws) -> int:
    """How many tests pass before the first that fails.

    One draw over 0..gamma instead of gamma coins: same law, and a GPU
    waits once.
    """
    passed = torch.cat((chance.new_ones(1), chance.cumprod(0)))
    fails = torch.cat((1.0 - chance, chance.new_ones(1)))
    return int(draws.categorical(passed * fails))


TOKENWISE = Rule(
    "tokenwise",
    tokenwise,
    lossless=True,
    admits=frozenset({IID, WITHOUT_REPLACEMENT}),
    paper="Leviathan 2023, 2211.17192",
    chains_only=True,
)
