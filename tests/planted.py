"""Running planted heads in the production loop, for several test files."""

from __future__ import annotations

import torch

from specref import rules
from specref.decode import Request, rounds
from specref.draft import shapes
from specref.draft.grow import Static
from specref.draft.head import HeadDrafter
from specref.draws import Seeded
from specref.heads.base import Head
from specref.interchange.plant import World
from specref.tree import IID
from specref.warp import Sampling, Warp


def prompts(world: World) -> list[list[int]]:
    """Texts that the world could have said (with order 1: must have)."""
    some = list(world.said)
    if world.order == 1:
        return [[some[(s + i) % len(some)] for i in range(6)] for s in (0, 3)]
    return [[1, 2, 3, 4, 6, 7], [8, 1, 1, 3, 2, 6, 4], [6, 6, 7, 8, 2, 1]]


def acceptance(
    head: Head,
    world: World,
    depth: int = 5,
    temperature: float | None = None,
    new: int = 40,
) -> list[float]:
    """Accepted share of drafted tokens by depth, over all rows.

    The temperature is 1 unless given; worlds of order 1, whose drafts are
    the greedy text and no law, run at 0.
    """
    if temperature is None:
        temperature = 0.0 if world.order == 1 else 1.0
    if head.levels is not None:
        depth = min(depth, head.levels)
    drafter = HeadDrafter(head, Static(shapes.chain(depth), IID))
    rows, source = prompts(world), Seeded(3)
    ask = Request(
        rows,
        [source.row(b) for b in range(len(rows))],
        new,
        Sampling(Warp(temperature, None, None)),
    )
    tried, taken = [0] * depth, [0] * depth
    rule = rules.get("tokenwise")
    with torch.inference_mode():
        for r in rounds(world.target, drafter, rule, ask):
            for tree, got in zip(r.trees, r.accepted, strict=True):
                for d in range(min(tree.height, got + 1)):
                    tried[d] += 1
                    taken[d] += d < got
    return [a / n if n else 0.0 for a, n in zip(taken, tried, strict=True)]
