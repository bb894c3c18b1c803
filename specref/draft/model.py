"""An autoregressive draft model: chains, k chains, sampled and top-k trees.

Any `LM` drafts: a smaller model, the target's int8 copy, an early exit.
Its cache may lag behind what was committed (after a full acceptance it
lacks the last draft token, after a correction the correction); `begin`
feeds whatever is missing, so no case is special.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specref.draft.base import Accepted, Drafter, Prefill
from specref.draft.grow import Sprout
from specref.draws import Draws
from specref.lm.base import LM
from specref.tree import DEAD, EMPTY, Tree
from specref.warp import Sampling


class LMStepper:
    """A language model and its cache, as a `grow.Stepper`."""

    def __init__(self, lm: LM, batch: int, capacity: int) -> None:
        self.lm, self.cache = lm, lm.new_cache(batch, capacity)

    @property
    def pending(self) -> int:
        return self.cache.pending

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Feed what the cache lacks of ``rows``; logits ``[B, V]``."""
        lag = [
            list(row[n:])
            for row, n in zip(rows, self.cache.length, strict=True)
        ]
        width = max(map(len, lag))
        if width > 64:  # a prompt: its logits but the last are not needed
            self._feed([new[:-1] for new in lag], logits=False)
            lag, width = [new[-1:] for new in lag], 1
        out = self._feed(lag)
        last = torch.tensor([max(len(new) - 1, 0) for new in lag])
        return out[torch.arange(len(lag)), last]

    def _feed(
        self, lag: list[list[int]], logits: bool = True
    ) -> Tensor | None:
        width = max(map(len, lag))
        pad = [width - len(new) for new in lag]
        device = self.lm.device
        tokens = [new + [0] * p for new, p in zip(lag, pad, strict=True)]
        parents = None
        if any(pad):
            line = list(range(-1, width - 1))
            parents = torch.tensor(
                [
                    line[: len(new)] + [DEAD] * (width - len(new))
                    for new in lag
                ],
                device=device,
            )
        out = self.lm.forward(
            torch.tensor(tokens, device=device),
            self.cache,
            parents,
            logits=logits,
        )
        self.cache.keep([range(len(new)) for new in lag])
        return out.logits

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `grow.Stepper`; new nodes stay pending in the cache."""
        device = self.lm.device
        if tokens.shape == (1, 1) and int(parents) == self.pending - 1:
            chain = None  # a chain needs no mask
        else:
            chain = parents.to(device)
        return self.lm.forward(tokens.to(device), self.cache, chain).logits


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
        self._check_positions(capacity - self.max_nodes - 1)
        self.stepper = LMStepper(self.lm, len(rows), capacity)
        if self.length is not None:
            self.length.start(len(rows))

    def _check_positions(self, need: int) -> None:
        limit = getattr(self.lm, "max_positions", None)
        if limit is not None and need > limit:
            raise ValueError(
                f"draft has {limit} positions, the prompt plus "
                f"max_new_tokens need {need}: shorten one of them or give "
                "another draft"
            )

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
