"""Rules that change the output law, and say so: typical acceptance and
lenience.

How far they move it is a number that `specref.law` computes; none of them
is ever a default.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from specref.draws import Draws
from specref.rules.base import Rule, Verdict, draw, residual, stop_at
from specref.rules.tokenwise import accepted, ratios
from specref.tree import IID, KINDS, ROOT, WITHOUT_REPLACEMENT, Tree


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of ``[..., V]``."""
    return -torch.xlogy(p, p).sum(-1)


def _typical(
    epsilon: float, delta: float, tree: Tree, p: Tensor, draws: Draws
) -> Verdict:
    edge = (delta * (-entropy(p)).exp()).clamp(max=epsilon).tolist()
    good, best = {ROOT}, ROOT
    for node, parent in enumerate(tree.parents):
        chance = float(p[parent + 1, tree.tokens[node]])
        if parent in good and chance > edge[parent + 1]:
            good.add(node)
            if tree.depth(node) > tree.depth(best):
                best = node
    return stop_at(tree, best, int(p[best + 1].argmax()))


def typical(epsilon: float = 0.09, delta: float | None = None) -> Rule:
    """Medusa's typical acceptance (Cai et al. 2024, 2401.10774, section
    2.3.1): keep a token whose p exceeds min(epsilon, delta exp(-H(p))).

    The longest kept path wins; the extra token is the target's most likely
    one.  Nothing is drawn.

    Args:
        epsilon: hard threshold in (0, 1].
        delta: of the entropy-dependent one; None is sqrt(epsilon).
    """
    if not 0.0 < epsilon <= 1.0:
        raise ValueError(f"epsilon must be in (0, 1], got {epsilon}")
    delta = math.sqrt(epsilon) if delta is None else delta
    if not 0.0 < delta <= 1.0:
        raise ValueError(f"delta must be in (0, 1], got {delta}")
    return Rule(
        "typical",
        partial(_typical, epsilon, delta),
        lossless=False,
        admits=frozenset(KINDS),
        paper="Cai 2024, 2401.10774",
    )


def _lenient(factor: float, tree: Tree, p: Tensor, draws: Draws) -> Verdict:
    n = accepted((ratios(tree, p) / factor).clamp(max=1.0), draws)
    rest = p[n] if n == len(tree) else residual(p[n], tree.law(n).to(p))
    return Verdict(tuple(range(n)), draw(rest, draws))


def lenience(factor: float = 0.5) -> Rule:
    """Leviathan et al. 2023, appendix A.5: accept with probability
    min(1, p / (factor q)).  No token gets more than p / factor.

    Args:
        factor: in (0, 1]; 1 is the lossless rule.
    """
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"factor must be in (0, 1], got {factor}")
    return Rule(
        "lenience",
        partial(_lenient, factor),
        lossless=factor == 1.0,
        admits=frozenset({IID, WITHOUT_REPLACEMENT}),
        paper="Leviathan 2023, 2211.17192",
        chains_only=True,
    )
