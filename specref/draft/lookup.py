"""Prompt lookup: copy what followed the same words before.

Saxena 2023; the matching rules are those of transformers' assisted
generation: the longest suffix n-gram first, its leftmost occurrence with a
continuation, cut behind an end of sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from specref.draft.base import Accepted, Drafter
from specref.draws import Draws
from specref.tree import EMPTY, Tree, chain


class PromptLookup(Drafter):
    """Proposes a copied chain; nothing when no n-gram matches.

    Args:
        gamma: most tokens copied.
        ngram: longest suffix that is looked for.
    """

    def __init__(self, gamma: int = 10, ngram: int = 2) -> None:
        for name, value in (("gamma", gamma), ("ngram", ngram)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.gamma, self.ngram = gamma, ngram

    @property
    def max_nodes(self) -> int:
        return self.gamma

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        out = []
        for row, limit in zip(rows, room, strict=True):
            found = self.find(row)[: min(limit, self.gamma)]
            out.append(chain(found) if found else EMPTY)
        return out

    def find(self, row: Sequence[int]) -> list[int]:
        """What followed the leftmost occurrence of the longest suffix."""
        row = list(row)
        for n in range(min(self.ngram, len(row) - 1), 0, -1):
            suffix = row[-n:]
            for start in range(len(row) - n):
                if row[start : start + n] == suffix:
                    return self._until_eos(row[start + n :])
        return []

    def _until_eos(self, tokens: list[int]) -> list[int]:
        for i, token in enumerate(tokens):
            if token in self.eos:
                return tokens[: i + 1]
        return tokens

    def commit(self, news: Sequence[Accepted | None]) -> None:
        pass
