"""Static trees that were published: EAGLE-1's and Medusa's.

A tree is written as the number of children of each node, level by level:
the root's; then those of the nodes of level 1, from the left; and so on,
trailing zeros left out.  The b-th child of a node is the draft's b-th best
token there.  Shapes are facts; they are from EAGLE's paper (2401.15077,
Figure 7) and from the calibrated trees of Medusa (2401.10774, section
2.3.3), which are named as in its repository.
"""

from __future__ import annotations

from collections.abc import Sequence

from specref.draft.shapes import Shape
from specref.tree import ROOT

COUNTS = {
    "eagle_26": "4 | 3 2 2 1 | 3 2 2 1 | 3 | 2",
    "mc_sim_7b_63": (
        "10 | 10 7 3 2 1 1 1 1 1 1 | 10 3 2 1 1 1 1 1 0 0 2 0 0 0 0 0 0 1 | 2"
    ),
    "vicuna_7b_stage1": (
        "10 | 10 7 4 3 2 2 1 1 1 1 | 9 3 2 1 1 1 0 0 0 0 2 0 0 0 0 0 0 1 | 1"
    ),
    "vicuna_7b_stage2": (
        "10 | 10 5 2 2 1 1 1 1 | 9 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1"
        " | 4 1 1 0 0 0 0 0 0 1"
    ),
    "vicuna_7b_stage1_ablation": (
        "10 | 10 4 2 2 1 1 1 | 10 4 2 1 1 1 0 0 0 0 3 1 0 0 1 0 1"
        " | 4 1 1 0 0 0 0 0 0 0 1"
    ),
    "vicuna_13b_stage1": (
        "10 | 10 7 4 2 2 1 1 1 1 | 10 4 2 1 1 1 0 0 0 0 2 1 0 0 0 0 0 1 | 1"
    ),
    "vicuna_13b_stage2": (
        "10 | 10 4 2 1 1 1 | 10 4 2 1 1 1 0 0 0 0 3 1 0 0 1 0 1"
        " | 4 2 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 1"
    ),
    "vicuna_33b_stage1": (
        "10 | 10 8 5 3 2 2 1 1 1 1 | 9 3 2 1 1 0 0 0 0 0 2 0 0 0 0 0 0 0 1"
    ),
    "vicuna_33b_stage2": (
        "10 | 10 5 3 2 1 1 1 1 | 10 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1"
        " | 3 1 0 0 0 0 0 0 0 0 1"
    ),
    "zephyr_stage2": (
        "10 | 10 6 4 2 2 1 1 1 | 10 4 2 1 1 1 0 0 0 0 2 1 0 0 0 0 1 | 2 1"
    ),
}


def from_counts(levels: Sequence[Sequence[int]]) -> Shape:
    """The shape with these numbers of children, level by level.

    Raises:
        ValueError: a level with more entries than nodes above it, or a
            negative number.
    """
    shape: list[int] = []
    above = [ROOT]
    for number, counts in enumerate(levels):
        if len(counts) > len(above) or min(counts, default=0) < 0:
            raise ValueError(
                f"levels[{number}] must hold at most {len(above)} numbers "
                f"of children, none negative, got {list(counts)}"
            )
        first = len(shape)
        for parent, count in zip(above, counts, strict=False):
            shape += [parent] * count
        above = list(range(first, len(shape)))
    return tuple(shape)


def known(name: str) -> Shape:
    """A published tree by name, nodes level by level.

    ``eagle_26`` has 25 nodes below the root, Medusa's trees have 63.

    Raises:
        ValueError: unknown name.
    """
    if name not in COUNTS:
        raise ValueError(
            f"unknown tree {name!r}: give one of {', '.join(COUNTS)}"
        )
    levels = COUNTS[name].split("|")
    return from_counts([[int(n) for n in level.split()] for level in levels])
