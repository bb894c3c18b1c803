"""Medusa: several heads on one feature, each for its own distance.

Cai et al. 2024, 2401.10774.  Head ``i`` guesses the token ``i`` places
below the newest one from the newest feature alone.  No head knows what the
others guess, so all drafts of a depth have one law, whatever path they are
on, and a whole tree costs one pass over the heads.

Does not handle: training (`specref.train`); Medusa-2's tuned backbone,
which is another target (`specref.heads.lora`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specref.heads.base import Pairs, Text
from specref.heads.blocks import DepthHeads, DepthState, ResBlock
from specref.lm.llama import Llama


class Medusa(DepthHeads):
    """``blocks`` residual blocks per head, then the output.

    Args:
        heads: number of heads: levels it can draft.
        blocks: residual blocks of each (published heads have one).
        mix, own_head, head_bias: see `DepthHeads`; published heads have
            ``own_head=True, mix=False``.
        scales: of embeddings (there are none here) and features, as in
            `Eagle`; `fold` moves them into the blocks.
    """

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        heads: int = 3,
        blocks: int = 1,
        mix: bool = False,
        own_head: bool = False,
        head_bias: bool = False,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(target, words, heads, mix, own_head, head_bias)
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        d, f = self.width, scales[1]
        scale = None if f == 1.0 else torch.full((d,), f)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(ResBlock(d, d, scale=scale) for _ in range(blocks))
            )
            for _ in range(heads)
        )

    def rollout(self, text: Text, depth: int) -> list[Tensor]:
        """See `Head.rollout`.

        Raises:
            ValueError: ``depth`` above the number of heads.
        """
        self.reach(depth - 1)
        return [self.blocks[s](text.hidden) for s in range(depth)]

    def state(self, batch: int, capacity: int) -> MedusaState:
        """See `Head.state`."""
        return MedusaState(self, batch)


class MedusaState(DepthState):
    """See `State`.  The logits of a depth are made once a round."""

    def __init__(self, head: Medusa, batch: int) -> None:
        super().__init__(head, batch)
        self._said: dict[int, Tensor] = {}

    def begin(self, fresh: Sequence[Pairs]) -> Tensor:
        """See `State.begin`."""
        self.take(fresh)
        self._said = {}
        return self._say(0)

    def _say(self, depth: int) -> Tensor:
        """``[B, V]`` logits of a depth."""
        if depth not in self._said:
            out = self.head.blocks[depth](self.root)
            self._said[depth] = self.head.logits(out, depth)
        return self._said[depth]

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `State.extend`; a node's depth is all that counts."""
        depth = self.deepen(parents)
        some = depth.unique().tolist()
        said = torch.stack([self._say(d) for d in some], 1)  # [B, k, V]
        if len(some) == 1:
            return said.expand(-1, depth.shape[1], -1)
        pick = torch.searchsorted(torch.tensor(some), depth)
        rows = torch.arange(len(depth), device=said.device)[:, None]
        return said[rows, pick.to(said.device)]
