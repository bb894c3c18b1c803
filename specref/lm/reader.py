"""A growing text of one tokenizer, read in the tokens of another.

Encoding the whole text again each round costs time that grows with it.  A
`Reader` goes back a few tokens, encodes from there, and joins the two at a
token on which they agree; where they never do, it encodes everything.

Does not handle: texts that shrink.
"""

from __future__ import annotations

from collections.abc import Sequence

from specref.lm.vocab import Vocab


class Reader:
    """One row's text in another vocabulary.

    Args:
        source: vocabulary of the tokens that are added.
        into: vocabulary of what is returned.
        behind: tokens to go back; 0 encodes the whole text each time.
    """

    def __init__(self, source: Vocab, into: Vocab, behind: int = 24) -> None:
        self.source, self.into, self.behind = source, into, behind
        self.data = b""
        self.ids: list[int] = []
        self._starts: list[int] | None = []

    def add(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens of ``source``; the ids of the whole text."""
        new = self.source.decode(tokens)
        self.data += new
        if new and not self._join():
            self.ids = self.into.encode(self.data)
            self._starts = self.into.starts(self.ids, len(self.data))
        return self.ids

    def _join(self) -> bool:
        """Encode from ``behind`` tokens back; False when nothing fits."""
        first = len(self.ids) - self.behind
        if not self.behind or first <= 0 or self._starts is None:
            return False
        base = self._starts[first]
        window = self.data[base:]
        ids = self.into.encode(window)
        spots = self.into.starts(ids, len(window))
        if spots is None:
            return False
        # The first half is too near the cut to be trusted.
        half = range(first + self.behind // 2, len(self.ids))
        old = {(self._starts[i], self.ids[i]): i for i in half}
        for i, (spot, token) in enumerate(zip(spots, ids, strict=True)):
            at = old.get((base + spot, token))
            if at is not None:
                self.ids = self.ids[:at] + ids[i:]
                tail = [base + s for s in spots[i:]]
                self._starts = self._starts[:at] + tail
                return True
        return False
