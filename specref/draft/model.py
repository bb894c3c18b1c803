"""An autoregressive draft model: chains, k chains, sampled and top-k trees.

Any `LM` drafts: a smaller model, the target's int8 copy, an early exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specref.draft.base import (
    Accepted,
    Drafter,
    Prefill,
    check_positions,
)
from specref.draft.grow import Sprout
from specref.draft.step import LMStepper
from specref.draws import Draws
from specref.lm.base import LM
from specref.tree import EMPTY, Tree
from specref.warp import Sampling


class ModelDrafter(Drafter):
    """Drafts with a language model.

    Args:
        lm: the draft.  Its vocabulary must be the target's.
        policy: how trees grow, see `specref.draft.grow`.
        length: per-round depth, see `specref.draft.lengths`; None lets the
            policy's shape decide.
    """

    def __init__(self, lm: LM, policy: Any, length: Any = None) -> None:
        self.lm, self.policy, self.length = lm, policy, length

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
        super().start(rows, capacity, sampling, eos, prefill)
        limit = getattr(self.lm, "max_positions", None)
        check_positions("draft", limit, capacity - self.max_nodes - 1)
        self.stepper = LMStepper(self.lm, len(rows), capacity)
        if self.length is not None:
            self.length.start(len(rows))

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        self._sprouts = [Sprout(row, 0) for row in rows]
        if not any(room):
            return [EMPTY] * len(rows)
        logits = self.stepper.begin(rows)
        if self.length is not None:
            room = [
                min(r, g) for r, g in zip(room, self.length.now, strict=True)
            ]
        self._sprouts = [
            Sprout(row, r) for row, r in zip(rows, room, strict=True)
        ]
        return self.policy.grow(
            self.stepper,
            self._sprouts,
            logits,
            self.sampling,
            draws,
            self.eos,
        )

    def commit(self, news: Sequence[Accepted | None]) -> None:
        kept = []
        for b, new in enumerate(news):
            slots, path = self._sprouts[b].slot, new.path if new else ()
            # Leaves were never stepped: keep down to the last stepped node.
            kept.append([slots[i] for i in path if i in slots])
        self.stepper.cache.keep(kept)
        if self.length is not None:
            self.length.update(news)

    def key(self) -> tuple:
        return self.length.key() if self.length is not None else ()
