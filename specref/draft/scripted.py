"""A drafter that proposes what a function says: for tests and exercises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specref.draft.base import Accepted, Drafter
from specref.draws import Draws
from specref.tree import EMPTY, Tree

Script = Callable[[tuple[int, ...], int, Draws], Tree]


class Scripted(Drafter):
    """Proposes ``script(row, room, draws)`` for every row.

    Args:
        script: gets a row's committed tokens, the deepest useful proposal
            and the row's draws; what it proposes may depend on these only.
        max_nodes: most nodes it will ever propose.
    Raises:
        ValueError: in `propose`, when a tree is deeper or larger than said.
    """

    max_nodes: int = 0

    def __init__(self, script: Script, max_nodes: int) -> None:
        self.script, self.max_nodes = script, max_nodes

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        return [
            self._one(tuple(row), limit, d) if limit else EMPTY
            for row, limit, d in zip(rows, room, draws, strict=True)
        ]

    def _one(self, row: tuple[int, ...], limit: int, draws: Draws) -> Tree:
        tree = self.script(row, limit, draws)
        if len(tree) > self.max_nodes or tree.height > limit:
            raise ValueError(
                f"script must propose at most {self.max_nodes} nodes and "
                f"{limit} levels here, got {len(tree)} and {tree.height}"
            )
        return tree

    def commit(self, news: Sequence[Accepted | None]) -> None:
        self.news = list(news)
