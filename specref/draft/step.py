"""Language models and their caches as `grow.Stepper`.

The cache may lag behind what was committed (after a full acceptance it
lacks the last draft token, after a correction the correction); `begin`
feeds whatever is missing, so no case is special.  `TextStepper` does the
same for a draft with another tokenizer, whose tokens of the committed text
can change at their end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specref.lm.base import LM
from specref.lm.reader import Reader
from specref.lm.vocab import Vocab
from specref.tree import DEAD


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


class TextStepper:
    """A draft that reads the target's rows as text.

    Args:
        lm: the draft.
        source: the target's vocabulary.
        into: the draft's.
        rows: prompts in the target's tokens.
        spare: most nodes that are pending at once.
    Raises:
        ValueError: a prompt that the draft has no positions for.
    """

    def __init__(
        self,
        lm: LM,
        source: Vocab,
        into: Vocab,
        rows: Sequence[Sequence[int]],
        spare: int,
    ) -> None:
        self.lm, self.spare = lm, spare
        self.limit = getattr(lm, "max_positions", None)
        self.readers = [Reader(source, into) for _ in rows]
        self.fed: list[list[int]] = [[] for _ in rows]
        for reader, row in zip(self.readers, rows, strict=True):
            self._check(len(reader.add(row)))
        longest = max(len(r.ids) for r in self.readers)
        self.inner = LMStepper(lm, len(rows), 2 * (longest + spare))

    def _check(self, length: int) -> None:
        if self.limit is not None and length + self.spare > self.limit:
            raise ValueError(
                f"draft has {self.limit} positions, a prompt needs "
                f"{length + self.spare} in the draft's tokens: shorten it "
                "or give another draft"
            )

    @property
    def pending(self) -> int:
        return self.inner.pending

    def able(self, b: int) -> bool:
        """Whether there is text to draft from, and room for a draft; a
        text that has outgrown the draft is continued without it."""
        n = len(self.readers[b].ids)
        return n > 0 and (self.limit is None or n + self.spare <= self.limit)

    def begin(self, live: Sequence[bool]) -> Tensor:
        """Take in what was committed; logits ``[B, V]`` after each row
        that is ``live`` (any for the others)."""
        want = [
            reader.ids if on else fed
            for reader, on, fed in zip(
                self.readers, live, self.fed, strict=True
            )
        ]
        # A live row is fed at least its last token: its logits are wanted.
        same = [
            min(common(fed, new), len(new) - on)
            for fed, new, on in zip(self.fed, want, live, strict=True)
        ]
        lag = max(len(w) - n for w, n in zip(want, same, strict=True))
        need = max(max(same) + lag, max(map(len, want))) + self.spare
        if need > self.inner.cache.capacity:
            longest = max(map(len, want)) + self.spare
            self.inner = LMStepper(self.lm, len(want), 2 * longest)
            same = [0] * len(want)
        self.inner.cache.truncate(same)
        self.fed = [list(w) for w in want]
        return self.inner.begin(want)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `grow.Stepper`; in the draft's tokens."""
        return self.inner.extend(tokens, parents)

    def settle(
        self,
        slots: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        news: Sequence[Sequence[int]],
    ) -> None:
        """End a round.

        Args:
            slots: pending nodes to keep; what turns out not to be in the
                text is dropped by the next `begin`.
            tokens: the draft's tokens in them.
            news: committed tokens of the target.
        """
        self.inner.cache.keep(slots)
        for fed, kept in zip(self.fed, tokens, strict=True):
            fed += kept
        for reader, new in zip(self.readers, news, strict=True):
            reader.add(new)

    def key(self) -> tuple:
        """How each text is cut into tokens, which its history can sway."""
        return tuple(tuple(reader.ids) for reader in self.readers)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
