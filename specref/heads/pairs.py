"""Heads that are a causal layer over pairs of feature and token.

EAGLE-1, EAGLE-3 and multi-token prediction differ in how a pair enters the
layer and in what is fed back; how they are unrolled is the same.  A guess
has no feature of the target, so the head's own output stands in for it.
After a round the pairs of accepted tokens are fed again with the target's
features: what was computed from guessed ones is never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specref.heads.base import Head, Pairs, Text, after
from specref.lm.cache import StaticCache
from specref.lm.llama import Attend
from specref.tree import DEAD, ROOT


class PairHead(Head):
    """A head with one step: features and tokens in, features out.

    A subclass says how (`fuse`, `step`).  ``detach`` stops gradients
    between the steps of an unroll.
    """

    detach: bool = False

    def fuse(self, hidden: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """Target features ``[..., d]`` as the head reads them."""
        return hidden

    def step(self, tokens: Tensor, features: Tensor, at: Attend) -> Tensor:
        """Pairs ``[B, n]`` and ``[B, n, d]`` to outputs ``[B, n, d]``,
        which are both what `project` reads and what is fed back."""
        raise NotImplementedError

    def rollout(self, text: Text, depth: int) -> list[Tensor]:
        """See `Head.rollout`: EAGLE-3's training-time test.

        Step ``s`` of pair ``t`` stands at position ``t + s``.  It sees the
        keys of step 0 up to position ``t``, and those of steps 1 .. s of
        its own pair only: exactly what decoding from ``t`` would hold.
        """
        features, out = self.fuse(text.hidden, text.taps), []
        for tokens, at in unroll(self, text.tokens[:, 1:], depth):
            if out:
                features = out[-1].detach() if self.detach else out[-1]
            out.append(self.step(tokens, features, at))
        return out

    def state(self, batch: int, capacity: int) -> PairState:
        """See `Head.state`."""
        return PairState(self, batch, capacity)


def unroll(
    head: Head, tokens: Tensor, depth: int
) -> Iterator[tuple[Tensor, Attend]]:
    """The steps of an unroll: their tokens, and who sees whom.

    Args:
        tokens: ``[B, n]``, the token of every pair.
    """
    batch, n = tokens.shape
    where = torch.arange(n, device=tokens.device)
    allowed = where[:, None] >= where
    own = torch.eye(n, dtype=torch.bool, device=where.device)
    top = head.config.max_position_embeddings - 1
    memory = Steps()
    for s in range(depth):
        if s:
            allowed = torch.cat((allowed, own), 1)
        spots = (where + s).clamp(max=top).expand(batch, n)
        cos, sin = head.angles(spots, head.dtype)
        at = Attend(cos, sin, allowed.expand(batch, -1, -1), memory)
        yield after(tokens, s), at


class Steps:
    """Keys and values of the steps of an unroll, side by side."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def write(
        self, layer: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `StaticCache.write`; they are appended."""
        if layer in self.kept:
            k, v = (
                torch.cat(pair, 2)
                for pair in zip(self.kept[layer], (k, v), strict=True)
            )
        self.kept[layer] = k, v
        return k, v


class PairState:
    """See `State`."""

    def __init__(self, head: PairHead, batch: int, capacity: int) -> None:
        self.head = head
        self.cache = StaticCache(
            head.config, batch, capacity, head.device, head.dtype
        )
        # Output after each row's newest pair, then those of pending nodes.
        self.root = torch.zeros(
            batch, head.width, device=head.device, dtype=head.dtype
        )
        self.guesses = self.root[:, None, :][:, :0]

    @property
    def pending(self) -> int:
        return self.cache.pending

    def begin(self, fresh: Sequence[Pairs]) -> Tensor:
        """See `State.begin`."""
        self.take(fresh)
        return self.head.logits(self.root)

    def take(self, fresh: Sequence[Pairs]) -> None:
        """Drop pending nodes, step each row's new pairs into ``root``."""
        if self.cache.pending:
            self.cache.keep([[] for _ in fresh])
        self.guesses = self.guesses[:, :0]
        size = [len(f.tokens) for f in fresh]
        if any(size):
            out = self._feed(fresh, max(size))
            for b, n in enumerate(size):
                if n:
                    self.root[b] = out[b, n - 1]

    def _feed(self, fresh: Sequence[Pairs], width: int) -> Tensor:
        """Step the new pairs of all rows and commit them."""
        head, size = self.head, [len(f.tokens) for f in fresh]
        tokens = torch.zeros(len(fresh), width, dtype=torch.long)
        features = self.root.new_zeros(len(fresh), width, head.width)
        for b, f in enumerate(fresh):
            if size[b]:
                tokens[b, : size[b]] = torch.tensor(f.tokens)
                features[b, : size[b]] = head.fuse(f.hidden, f.taps)
        parents = None
        if min(size) < width:
            line = torch.arange(-1, width - 1)
            spare = line.new_tensor(size)[:, None] <= torch.arange(width)
            parents = line.expand(len(fresh), width).masked_fill(spare, DEAD)
            parents = parents.to(head.device)
        out = self._step(tokens.to(head.device), features, parents)
        self.cache.keep([range(n) for n in size])
        return out

    def _step(
        self, tokens: Tensor, features: Tensor, parents: Tensor | None
    ) -> Tensor:
        spots, allowed = self.cache.open(tokens, parents)
        cos, sin = self.head.angles(spots, self.head.dtype)
        at = Attend(cos, sin, allowed, self.cache)
        out = self.head.step(tokens, features, at)
        self.cache.close(tokens.shape[1])
        return out

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `State.extend`; each node reads its parent's output."""
        device = self.head.device
        tokens, parents = tokens.to(device), parents.to(device)
        known = torch.cat((self.root[:, None], self.guesses), 1)
        spots = parents.clamp(min=ROOT) + 1  # padding reads anything
        pick = spots[..., None].expand(-1, -1, known.shape[-1])
        out = self._step(tokens, known.gather(1, pick), parents)
        self.guesses = torch.cat((self.guesses, out), 1)
        return self.head.logits(out)
