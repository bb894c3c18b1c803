"""Dynamic trees: grow where the draft is confident, then keep the best.

EAGLE-2's two phases (Li et al. 2024, 2406.16858, section 4) for any draft:
each level expands the ``width`` nodes of the largest path probability, and
of all nodes seen the ``nodes`` best are proposed.  The tree is a function of
the context alone, so it is deterministic and any rule for such trees is
lossless.  Path probabilities are the draft's at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specref.draft.grow import entries, rank
from specref.draft.sprout import (
    Sprout,
    Stepper,
    scores_after,
    step_front,
    unpad,
)
from specref.draws import Draws
from specref.tree import DETERMINISTIC, ROOT, Tree
from specref.warp import Sampling


class Dynamic:
    """Trees by draft confidence.

    Args:
        nodes: most proposed nodes.
        depth: most levels.
        width: nodes expanded per level: what a level's step costs.
        stop_below: paths less probable than this are not expanded.
        children: candidates below each expanded node; ``width`` unless
            given, as in EAGLE-2.  More of them cost no step, and nodes that
            a narrow tree would never see can be kept.
    """

    def __init__(
        self,
        nodes: int = 16,
        depth: int = 6,
        width: int = 4,
        stop_below: float = 0.0,
        children: int | None = None,
    ) -> None:
        children = width if children is None else children
        sizes = {"nodes": nodes, "depth": depth, "width": width}
        sizes["children"] = children
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 <= stop_below <= 1.0:
            raise ValueError(f"stop_below must be in [0, 1], got {stop_below}")
        self.nodes, self.depth = nodes, depth
        self.width, self.stop_below = width, stop_below
        self.children = children

    @property
    def max_nodes(self) -> int:
        """Nodes seen while growing, not only those proposed."""
        return self.children * (1 + (self.depth - 1) * self.width)

    def grow(
        self,
        stepper: Stepper,
        sprouts: Sequence[Sprout],
        logits: Tensor,
        sampling: Sampling,
        draws: Sequence[Draws],
        eos: frozenset[int],
    ) -> list[Tree]:
        """See `grow.Static.grow`."""
        worths: list[list[float]] = [[] for _ in sprouts]
        front = [[ROOT] if s.room > 0 else [] for s in sprouts]
        rows = unpad(logits[:, None], front)
        for level in range(1, self.depth + 1):
            scores = scores_after(sprouts, front, rows, sampling)
            grown = self._plant(sprouts, front, scores, worths)
            front = [
                []
                if level == min(self.depth, s.room)
                else self._best(s, new, worth, eos)
                for s, new, worth in zip(sprouts, grown, worths, strict=True)
            ]
            if not any(front):
                break
            rows = step_front(stepper, sprouts, front)
        for sprout, worth in zip(sprouts, worths, strict=True):
            prune(sprout, _top(range(len(worth)), worth, self.nodes))
        return [s.tree(DETERMINISTIC) for s in sprouts]

    def _plant(
        self,
        sprouts: Sequence[Sprout],
        front: Sequence[Sequence[int]],
        scores: Tensor,
        worths: Sequence[list[float]],
    ) -> list[list[int]]:
        """Add the most probable children of all ``front`` nodes, and their
        worth; returns each row's new nodes."""
        tokens = iter(picks := rank(scores, self.children))
        chances = iter(entries(scores.softmax(-1), picks).tolist())
        out: list[list[int]] = [[] for _ in sprouts]
        for sprout, nodes, worth, new in zip(
            sprouts, front, worths, out, strict=True
        ):
            for node in nodes:
                above = 1.0 if node == ROOT else worth[node]
                for token, chance in zip(next(tokens), chances, strict=False):
                    if chance > 0.0:
                        new.append(sprout.add(token, node))
                        worth.append(above * chance)
        return out

    def _best(
        self,
        sprout: Sprout,
        new: Sequence[int],
        worth: Sequence[float],
        eos: frozenset[int],
    ) -> list[int]:
        grows = [
            i
            for i in new
            if sprout.tokens[i] not in eos and worth[i] >= self.stop_below
        ]
        return _top(grows, worth, self.width)


def _top(
    nodes: Sequence[int], worth: Sequence[float], count: int
) -> list[int]:
    """The worthiest nodes, in their order of growth.

    A parent is worth at least as much as its child and comes earlier, so
    what is kept is a tree.
    """
    best = sorted(nodes, key=lambda i: (-worth[i], i))[:count]
    return sorted(best)


def prune(sprout: Sprout, keep: Sequence[int]) -> None:
    """Keep only some nodes, parents with children; numbers close up."""
    new = {old: i for i, old in enumerate(keep)}
    sprout.tokens = [sprout.tokens[i] for i in keep]
    sprout.depth = [sprout.depth[i] for i in keep]
    sprout.law_of = [sprout.law_of[i] for i in keep]
    ups = [sprout.parents[i] for i in keep]
    sprout.parents = [up if up == ROOT else new[up] for up in ups]
    sprout.slot = {new[i]: s for i, s in sprout.slot.items() if i in new}
