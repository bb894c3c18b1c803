"""No draft at all: plain autoregression as the empty tree."""

from __future__ import annotations

from collections.abc import Sequence

from specref.draft.base import Accepted, Drafter
from specref.draws import Draws
from specref.tree import EMPTY, Tree


class NoDraft(Drafter):
    """Proposes nothing; every rule then draws one token from p."""

    max_nodes = 0

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        return [EMPTY] * len(rows)

    def commit(self, news: Sequence[Accepted | None]) -> None:
        pass
