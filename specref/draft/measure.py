"""How often the b-th child would be the accepted one: Sequoia's input.

Chen et al. 2024 (2402.12374), section 3.1: the positional acceptance
vector, measured on the target's own text, unconditional on siblings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.draft.grow import without_replacement
from specref.draws import Seeded
from specref.rules.recursive import sibling_tests
from specref.tree import ROOT, WITHOUT_REPLACEMENT, Tree
from specref.warp import Warp

FILE = Path(__file__).resolve().parent.parent / "data" / "acceptance.json"


def shipped_acceptance(draft: Any) -> list[float]:
    """The vector measured for a named draft of the embedded target.

    Raises:
        ValueError: none is shipped; measure one and pass ``accept``.
    """
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    if not isinstance(draft, str) or draft not in table:
        raise ValueError(
            f"no acceptance vector is shipped for draft {draft!r}: pass "
            "accept=specref.draft.measure.acceptance(...)"
        )
    return table[draft]["accept"]


def ranks(p: Tensor, q: Tensor, width: int, draws: Seeded) -> Tensor:
    """P(child b is accepted), b < width, for one position; ``[width]``.

    Exact given the children, which are drawn without replacement.
    """
    tokens = without_replacement(q, width, draws)
    n = len(tokens)
    star = Tree(
        tuple(tokens), (ROOT,) * n, WITHOUT_REPLACEMENT, q[None], (0,) * n
    )
    chance, _ = sibling_tests(star, range(n), p)
    failed = torch.cat((chance.new_ones(1), (1 - chance).cumprod(0)[:-1]))
    out = p.new_zeros(width)
    out[:n] = chance * failed
    return out


@torch.inference_mode()
def acceptance(
    target: Any,
    draft: Any,
    texts: Sequence[tuple[Sequence[int], int]],
    width: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """The positional acceptance vector.

    Args:
        texts: (token ids, where the response starts) of the target's text.
        width: ranks to measure.
        temperature: 0 counts how often the target's choice has rank b.
    """
    total, count = torch.zeros(width, dtype=torch.float64), 0
    warp, draws = Warp(temperature or 1.0), Seeded(seed)
    for ids, start in texts:
        row = torch.tensor([list(ids)])
        both = [
            lm.forward(row.to(lm.device), lm.new_cache(1, len(ids))).logits[0]
            for lm in (target, draft)
        ]
        p, q = (x[start - 1 : -1].double() for x in both)
        for i in range(len(p)):
            if temperature == 0.0:
                top = q[i].topk(width).indices
                total += (top == p[i].argmax()).double()
            else:
                total += ranks(warp(p[i]), warp(q[i]), width, draws)
            count += 1
    return [round(float(x), 5) for x in total / max(count, 1)]
