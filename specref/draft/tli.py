"""Drafting in the tokens that two vocabularies share.

Token-level intersection (TLI; Timor et al. 2025, 2502.05202, Algorithm 4;
transformers' universal speculative decoding): the draft's law is restricted
to the shared tokens and divided by its mass there.  What is left is an
ordinary draft over the target's vocabulary, for any tree and any rule.

Does not handle: target tokens that the draft can not write; they are never
proposed, and come from the residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specref.draft.base import Accepted, Drafter, Prefill
from specref.draft.sprout import Sprout
from specref.draft.step import TextStepper
from specref.draws import Draws
from specref.lm.base import LM
from specref.lm.vocab import Vocab
from specref.tree import EMPTY, Tree
from specref.warp import Sampling


class Intersection:
    """Draft logits over the target's vocabulary.

    Args:
        same: target id -> draft id of the shared tokens.
        size: the target's vocabulary.
    """

    def __init__(
        self, same: Mapping[int, int], size: int, device: torch.device
    ) -> None:
        pairs = sorted(same.items())
        self.of, self.size = dict(same), size
        self.mine = torch.tensor([i for i, _ in pairs], device=device)
        self.theirs = torch.tensor([j for _, j in pairs], device=device)
        self.to_draft = torch.zeros(size, dtype=torch.long, device=device)
        self.to_draft[self.mine] = self.theirs

    def widen(self, logits: Tensor) -> Tensor:
        """``[..., Vd]`` -> ``[..., Vt]``, ``-inf`` where nothing is shared.

        The softmax of the result is q restricted and renormalised.  Where
        q has no mass on shared tokens there is nothing to renormalise, and
        they get equal chances: any law will do that is the one drawn from.
        """
        shared = logits[..., self.theirs]
        none = shared.amax(-1, keepdim=True) == -torch.inf
        shared = shared.masked_fill(none, 0.0)
        shape = (*logits.shape[:-1], self.size)
        full = logits.new_full(shape, -torch.inf)
        return full.index_copy_(-1, self.mine, shared)


class SharedStepper:
    """`TextStepper` that speaks in the target's tokens."""

    def __init__(self, text: TextStepper, same: Intersection) -> None:
        self.text, self.same = text, same

    @property
    def pending(self) -> int:
        return self.text.pending

    def begin(self, live: Sequence[bool]) -> Tensor:
        """See `TextStepper.begin`."""
        return self.same.widen(self.text.begin(live))

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `grow.Stepper`."""
        theirs = self.same.to_draft[tokens.to(self.same.to_draft.device)]
        return self.same.widen(self.text.extend(theirs, parents))


class SharedDrafter(Drafter):
    """Drafts with a model of another vocabulary, in shared tokens.

    Args:
        lm: the draft.
        source: the target's vocabulary.
        into: the draft's vocabulary.
        same: target id -> draft id, see `specref.lm.vocab.shared`.
        size: ids of the target.
        policy: how trees grow, see `specref.draft.grow`.
    """

    def __init__(
        self,
        lm: LM,
        source: Vocab,
        into: Vocab,
        same: Mapping[int, int],
        size: int,
        policy: Any,
    ) -> None:
        self.lm, self.source, self.into = lm, source, into
        self.policy = policy
        self.same = Intersection(same, size, lm.device)

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
        text = TextStepper(
            self.lm, self.source, self.into, rows, self.max_nodes
        )
        self.stepper = SharedStepper(text, self.same)

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        text = self.stepper.text
        able = [r * text.able(b) for b, r in enumerate(room)]
        self._sprouts = [
            Sprout(row, r) for row, r in zip(rows, able, strict=True)
        ]
        if not any(able):
            return [EMPTY] * len(rows)
        return self.policy.grow(
            self.stepper,
            self._sprouts,
            self.stepper.begin([r > 0 for r in able]),
            self.sampling,
            draws,
            self.eos,
        )

    def commit(self, news: Sequence[Accepted | None]) -> None:
        slots, tokens = [], []
        theirs = self.same.of
        for new, sprout in zip(news, self._sprouts, strict=True):
            # Leaves were never stepped.
            path = [i for i in new.path if i in sprout.slot] if new else []
            slots.append([sprout.slot[i] for i in path])
            tokens.append([theirs[sprout.tokens[i]] for i in path])
        self.stepper.text.settle(
            slots, tokens, [new.tokens if new else () for new in news]
        )

    def key(self) -> tuple:
        return self.stepper.text.key()
