"""Drafting with a head: the target's features in, trees out.

The loop hands over the features of what was accepted; the head is fed the
new pairs of feature and token and the tree grows from there, by the same
policies that grow the trees of a draft model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specref.draft.base import (
    Accepted,
    Drafter,
    Prefill,
    check_positions,
)
from specref.draft.grow import Sprout
from specref.draws import Draws
from specref.heads.base import Head, Pairs
from specref.tree import EMPTY, Tree
from specref.warp import Sampling


class HeadDrafter(Drafter):
    """Drafts with a `Head`.

    A row has no pair before its second token: a prompt of one token gets
    no draft in its first round.

    Args:
        head: the head; its vocabulary must be the target's.
        policy: how trees grow, see `specref.draft.grow`.
    """

    features = True

    def __init__(self, head: Head, policy: Any) -> None:
        self.head, self.policy = head, policy
        self.taps = tuple(head.taps)

    @property
    def max_nodes(self) -> int:
        return self.policy.max_nodes

    def start(
        self,
        rows: Sequence[Sequence[int]],
        capacity: int,
        sampling: Sampling,
        eos: frozenset[int] = frozenset(),
        prefill: Sequence[Prefill] | None = None,
    ) -> None:
        """See `Drafter.start`.

        Raises:
            ValueError: the loop gave the features of only a part of the
                prompt, or the head has too few positions.
        """
        super().start(rows, capacity, sampling, eos, prefill)
        limit = self.head.config.max_position_embeddings
        check_positions("head", limit, capacity - self.max_nodes - 1)
        self.state = self.head.state(len(rows), capacity)
        self._news: list[list[Pairs]] = [[] for _ in rows]
        self._ready = [False] * len(rows)
        for b, row in enumerate(rows):
            if len(row) > 1:
                seen = prefill[b]
                self._note(b, Pairs(seen.hidden, seen.taps, tuple(row[1:])))

    def _note(self, b: int, pairs: Pairs) -> None:
        if len(pairs.hidden) < len(pairs.tokens):
            raise ValueError(
                f"row {b} has {len(pairs.tokens)} tokens but features of "
                f"{len(pairs.hidden)} only"
            )
        self._news[b].append(pairs)
        self._ready[b] = True

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        """See `Drafter.propose`."""
        deep = self.head.levels
        room = [
            (n if deep is None else min(n, deep)) if ready else 0
            for n, ready in zip(room, self._ready, strict=True)
        ]
        if not any(room):
            return [EMPTY] * len(rows)
        logits = self.state.begin([self._join(b) for b in range(len(rows))])
        sprouts = [Sprout(row, r) for row, r in zip(rows, room, strict=True)]
        return self.policy.grow(
            self.state, sprouts, logits, self.sampling, draws, self.eos
        )

    def _join(self, b: int) -> Pairs:
        """Row ``b``'s pairs since the last round that drafted."""
        news, self._news[b] = self._news[b], []
        if not news:
            return Pairs(torch.empty(0), (), ())
        if len(news) == 1:
            return news[0]
        return Pairs(
            torch.cat([n.hidden for n in news]),
            tuple(map(torch.cat, zip(*(n.taps for n in news), strict=True))),
            tuple(t for n in news for t in n.tokens),
        )

    def commit(self, news: Sequence[Accepted | None]) -> None:
        """See `Drafter.commit`."""
        for b, new in enumerate(news):
            if new is not None:
                count = len(new.tokens)
                taps = tuple(tap[:count] for tap in new.taps)
                self._note(b, Pairs(new.hidden[:count], taps, new.tokens))
