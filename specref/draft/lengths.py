"""Draft lengths that change from round to round.

The schedules of transformers' assisted generation (5.x names): constant,
heuristic (two more after a full acceptance, one less otherwise) and
heuristic_transient (the same, forgotten when a run starts).  All are
functions of what was accepted before, so any of them is lossless.
"""

from __future__ import annotations

from collections.abc import Sequence

from specref.draft.base import Accepted

SCHEDULES = ("constant", "heuristic", "heuristic_transient")


class Length:
    """Draft length per row.

    Args:
        gamma: length of the first round, at least 1.
        most: never longer.
        step: added after a full acceptance; 0 keeps the length.
        transient: start every run at ``gamma``; otherwise a run goes on
            with the last length of the run before.
    """

    def __init__(
        self, gamma: int, most: int, step: int = 2, transient: bool = True
    ) -> None:
        if not 1 <= gamma <= most:
            raise ValueError(
                f"gamma must be in [1, {most}] (max_gamma), got {gamma}"
            )
        self.gamma, self.most = gamma, most
        self.step, self.transient = step, transient
        self.now: list[int] = [gamma]

    def start(self, batch: int) -> None:
        first = self.gamma if self.transient else self.now[0]
        self.now = [first] * batch

    def update(self, news: Sequence[Accepted | None]) -> None:
        """Lengthen or shorten by what was accepted; empty proposals and
        rows that had ended (None) change nothing."""
        if not self.step:
            return
        for b, new in enumerate(news):
            if new is None or not len(new.tree):
                continue
            if len(new.path) == new.tree.height:
                self.now[b] = min(self.now[b] + self.step, self.most)
            else:
                self.now[b] = max(self.now[b] - 1, 1)

    def key(self) -> tuple:
        return tuple(self.now)


def schedule(name: str | Length, gamma: int, most: int) -> Length:
    """A schedule of `SCHEDULES` by its transformers name.

    A `Length` is returned as it is.  Give the same one, not transient, to
    several calls and they go on from each other, as transformers' own
    "heuristic" does by writing to the assistant's configuration; here no
    call changes another one unless asked to.
    """
    if isinstance(name, Length):
        return name
    if name == "constant":
        return Length(gamma, most, step=0)
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {name!r}")
    return Length(gamma, most, transient=name == "heuristic_transient")
