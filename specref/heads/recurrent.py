"""Heads with a memory per node: what follows reads only the parent's.

ReDrafter and the MLP speculator read the newest feature once and then carry
a vector from node to node; no attention, so no cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specref.heads.base import Head, Pairs, Text, after
from specref.tree import DEAD, ROOT


class Recurrent(Head):
    """A subclass says how the memory starts and how it goes on.

    Attributes:
        memory: its size, ``w`` below; `project` reads it.
    """

    memory: int

    def start(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Memory ``[..., w]`` after pairs of feature ``[..., d]`` and token
        ``[...]``."""
        raise NotImplementedError

    def advance(self, memory: Tensor, tokens: Tensor, depth: int) -> Tensor:
        """Memory ``[..., w]`` after one more token ``[...]``, which stands
        ``depth`` levels below the pair's token."""
        raise NotImplementedError

    def rollout(self, text: Text, depth: int) -> list[Tensor]:
        """See `Head.rollout`; the entries are memories ``[B, n, w]``.

        Raises:
            ValueError: ``depth`` above the number of levels.
        """
        check_depth(self, depth - 1)
        said = text.tokens[:, 1:]
        out = [self.start(text.hidden, said)]
        for s in range(1, depth):
            out.append(self.advance(out[-1], after(said, s), s))
        return out

    def state(self, batch: int, capacity: int) -> RecurrentState:
        """See `Head.state`."""
        return RecurrentState(self, batch)


def check_depth(head: Head, depth: int) -> None:
    """Raises ValueError for a depth (0 first) that the head lacks."""
    if head.levels is not None and depth >= head.levels:
        raise ValueError(
            f"depth must be at most {head.levels}, the number of levels "
            f"that the head has, got {depth + 1}"
        )


class RecurrentState:
    """See `State`."""

    def __init__(self, head: Recurrent, batch: int) -> None:
        self.head = head
        # Entry 0 is the memory after the newest pair, then pending nodes.
        self.known = torch.zeros(
            batch, 1, head.memory, device=head.device, dtype=head.dtype
        )
        self.depth = torch.zeros(batch, 1, dtype=torch.long)

    @property
    def pending(self) -> int:
        return self.known.shape[1] - 1

    def begin(self, fresh: Sequence[Pairs]) -> Tensor:
        """See `State.begin`."""
        self.known, self.depth = self.known[:, :1], self.depth[:, :1]
        for b, f in enumerate(fresh):
            if f.tokens:
                hidden = f.hidden[len(f.tokens) - 1]
                token = torch.tensor(f.tokens[-1], device=self.head.device)
                self.known[b, 0] = self.head.start(hidden, token)
        return self.head.logits(self.known[:, 0])

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `State.extend`."""
        head = self.head
        up = parents.cpu().clamp(min=ROOT) + 1  # padding reads anything
        depth = self.depth.gather(1, up) + 1
        dead = parents.cpu() == DEAD
        depth[dead] = depth[~dead].max() if bool((~dead).any()) else 1
        check_depth(head, int(depth.max()))
        tokens, up = tokens.to(head.device), up.to(head.device)
        above = self.known.gather(1, up[..., None].expand(-1, -1, head.memory))
        new = torch.empty_like(above)
        out = above.new_empty(*depth.shape, head.vocab_size)
        for d in depth.unique().tolist():
            b, i = (depth == d).nonzero(as_tuple=True)
            b, i = b.to(head.device), i.to(head.device)
            new[b, i] = head.advance(above[b, i], tokens[b, i], d)
            out[b, i] = head.logits(new[b, i], d)
        self.known = torch.cat((self.known, new), 1)
        self.depth = torch.cat((self.depth, depth), 1)
        return out
