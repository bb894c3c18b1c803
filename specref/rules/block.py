"""Block verification: the whole draft is judged together.

Sun et al. 2024 (2403.10444), Algorithm 2.  Accepts as many tokens as any
valid rule of this form can, never fewer than token-wise rejection; equal to
it for one drafted token and at temperature 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, draw, residual
from specref.rules.tokenwise import ratios
from specref.tree import IID, WITHOUT_REPLACEMENT, Tree


def weights(ratio: Tensor) -> Tensor:
    """w_i = min(1, w_{i-1} p_i / q_i) with w_0 = 1, ``[gamma + 1]``."""
    out = [ratio.new_ones(())]
    for r in ratio:
        out.append((out[-1] * r).clamp(max=1.0))
    return torch.stack(out)


def chances(tree: Tree, p: Tensor, w: Tensor) -> Tensor:
    """h_i for i = 1..gamma: chance that the i-th test passes.

    h_i = A_i / (A_i + 1 - w_i) with A_i = sum [w_i p - q]_+ of the next
    position; h_gamma = w_gamma.
    """
    gamma = len(tree)
    rows = torch.tensor(tree.law_of, device=p.device)
    over = w[1:gamma, None] * p[1:gamma] - tree.q[rows[1:]].to(p)
    area = over.clamp(min=0.0).sum(-1)
    # In this order: area + 1 - w can round below the area, and h above 1.
    under = area + (1.0 - w[1:gamma])
    # 0 / 0: the prefix is certain and q is p.  Passing is right.
    h = torch.where(under > 0, area / under.clamp(min=1e-300), 1.0)
    return torch.cat((h, w[gamma:]))


def block(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    """Keep the longest prefix whose own test passes, whatever the tests of
    shorter ones say; then draw from norm([w p - q]_+) or the bonus."""
    gamma = len(tree)
    if not gamma:
        return Verdict((), draw(p[0], draws))
    w = weights(ratios(tree, p))
    h = chances(tree, p, w)
    # The last test that passes is at i when i passes and all later fail.
    fails = torch.cat(((1.0 - h).flip(0).cumprod(0).flip(0), h.new_ones(1)))
    passes = torch.cat((h.new_ones(1), h))
    n = int(draws.categorical(passes * fails))
    rest = p[n] if n == gamma else residual(w[n] * p[n], tree.law(n).to(p))
    return Verdict(tuple(range(n)), draw(rest, draws))


BLOCK = Rule(
    "block",
    block,
    lossless=True,
    admits=frozenset({IID, WITHOUT_REPLACEMENT}),
    paper="Sun 2024, 2403.10444",
    chains_only=True,
)
