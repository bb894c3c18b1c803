"""Drafting in text: any draft for any target, whatever their tokenizers.

String-level exact match (SLEM; Timor et al. 2025, 2502.05202, Algorithm 2;
transformers' universal assisted generation).  The committed text is encoded
again for the draft, the draft writes on, and what it wrote is encoded again
in the target's tokens.  The proposal is a function of the text, so that the
rule ``naive`` (the target's own draw, kept if it agrees) is lossless.

Does not handle: sampled drafts (the draft's first choice is proposed at
every temperature), logits processors in the draft (they speak of the
target's tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

from specref.draft import shapes
from specref.draft.base import Accepted, Drafter, Prefill
from specref.draft.grow import Static
from specref.draft.sprout import Sprout
from specref.draft.step import TextStepper
from specref.draws import Draws
from specref.lm.base import LM
from specref.lm.vocab import Vocab
from specref.tree import DETERMINISTIC, EMPTY, Tree, chain
from specref.warp import Sampling, Warp

BEHIND = 16  # target tokens that are encoded again with what was drafted
GREEDY = Sampling(Warp(0.0))


class UniversalDrafter(Drafter):
    """Proposes what another model writes, in the target's tokens.

    Args:
        lm: the draft.
        source: the target's vocabulary.
        into: the draft's vocabulary.
        gamma: most draft tokens written per round; at most twice as many
            target tokens are proposed.
        stop_below: write no further after a token that is less probable.
    """

    def __init__(
        self,
        lm: LM,
        source: Vocab,
        into: Vocab,
        gamma: int = 8,
        stop_below: float | None = None,
    ) -> None:
        self.lm, self.source, self.into = lm, source, into
        self.gamma = gamma
        self.policy = Static(shapes.chain(gamma), DETERMINISTIC, stop_below)
        self.ends = frozenset(getattr(lm, "eos", ()))

    @property
    def max_nodes(self) -> int:
        return 2 * self.gamma

    def start(
        self,
        rows: Sequence[Sequence[int]],
        capacity: int,
        sampling: Sampling,
        eos: frozenset[int] = frozenset(),
        prefill: Sequence[Prefill] | None = None,
    ) -> None:
        super().start(rows, capacity, sampling, eos, prefill)
        self.stepper = TextStepper(
            self.lm, self.source, self.into, rows, self.gamma
        )

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        live = [r > 0 and self.stepper.able(b) for b, r in enumerate(room)]
        self._sprouts = [Sprout((), self.gamma * on) for on in live]
        if not any(live):
            return [EMPTY] * len(rows)
        self.policy.grow(
            self.stepper,
            self._sprouts,
            self.stepper.begin(live),
            GREEDY,
            draws,
            self.ends,
        )
        return [
            chain(self.translate(row, sprout.tokens)[:most])
            for row, sprout, most in zip(
                rows, self._sprouts, room, strict=True
            )
        ]

    def translate(self, row: Sequence[int], drafted: list[int]) -> list[int]:
        """What the draft wrote after ``row``, in the target's tokens.

        The end of a text is the token that ends it, not what it spells.
        """
        ended = bool(drafted) and drafted[-1] in self.ends
        new = self.into.decode(drafted[:-1] if ended else drafted)
        before = self.source.decode(row[-BEHIND:])
        out = self.source.proceed(before, new) if new else []
        for i, token in enumerate(out[: self.max_nodes]):
            if token in self.eos:
                return out[: i + 1]
        if ended and self.eos:
            out.append(min(self.eos))
        return out[: self.max_nodes]

    def commit(self, news: Sequence[Accepted | None]) -> None:
        self.stepper.settle(
            [list(s.slot.values()) for s in self._sprouts],
            [[s.tokens[i] for i in s.slot] for s in self._sprouts],
            [new.tokens if new else () for new in news],
        )

    def key(self) -> tuple:
        return self.stepper.key()
