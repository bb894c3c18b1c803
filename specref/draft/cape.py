"""CaPE: a greedy chain with alternatives beside it where it is unsure.

Confidence-aware proposal expansion (Du et al. 2024, 2402.02082).  Every
position of the chain gets siblings, more of them the less probable its
token is to the draft; siblings are leaves.  The tree is a function of the
context alone, so it is deterministic and any rule for such trees is
lossless.  Confidence is the draft's probability at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specref.draft.grow import rank
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

BINS = (8, 8, 8, 6, 6, 6, 4, 4, 2, 2)


class Cape:
    """Chains with leaves beside them.

    Args:
        gamma: length of the chain.
        bins: candidates per position, the chain's token among them, by
            confidence: ``bins[i]`` holds from ``i / len(bins)`` on.  The
            default is the authors' published script's.
    Raises:
        ValueError: ``gamma`` below 1, or a bin that is.
    """

    def __init__(self, gamma: int = 5, bins: Sequence[int] = BINS) -> None:
        if gamma < 1:
            raise ValueError(f"gamma must be at least 1, got {gamma}")
        if not bins or min(bins) < 1:
            raise ValueError(
                "bins must hold at least one count, each at least 1, got "
                f"{list(bins)}"
            )
        self.gamma, self.bins = gamma, tuple(bins)

    @property
    def max_nodes(self) -> int:
        return self.gamma * max(self.bins)

    def count(self, confidence: float) -> int:
        """Candidates at a position whose best token has this probability."""
        bins = self.bins
        return bins[min(int(confidence * len(bins)), len(bins) - 1)]

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
        front = [[ROOT] if s.room > 0 else [] for s in sprouts]
        rows = unpad(logits[:, None], front)
        for level in range(1, self.gamma + 1):
            scores = scores_after(sprouts, front, rows, sampling)
            chain = self._plant(sprouts, front, scores)
            front = [
                [n for n in nodes if level < s.room and s.tokens[n] not in eos]
                for s, nodes in zip(sprouts, chain, strict=True)
            ]
            if level == self.gamma or not any(front):
                break
            rows = step_front(stepper, sprouts, front)
        return [s.tree(DETERMINISTIC) for s in sprouts]

    def _plant(
        self,
        sprouts: Sequence[Sprout],
        front: Sequence[Sequence[int]],
        scores: Tensor,
    ) -> list[list[int]]:
        """Add the candidates below every row's ``front`` node, if it has
        one; returns each row's new node of the chain."""
        chance = scores.softmax(-1).amax(-1).tolist()
        ranked = iter(zip(rank(scores, max(self.bins)), chance, strict=True))
        out: list[list[int]] = []
        for sprout, nodes in zip(sprouts, front, strict=True):
            new: list[int] = []
            for node in nodes:
                tokens, sure = next(ranked)
                count = self.count(sure)
                new = [sprout.add(t, node) for t in tokens[:count]]
            out.append(new[:1])
        return out
