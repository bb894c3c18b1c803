"""What a drafter is: it proposes trees and is told what became of them.

A drafter owns its state (usually a model and its cache) and rolls it back
itself.  It never sees the target's laws before the verdict, and a node that
was drawn is always proposed: dropping a drawn token after looking at it
would change the law of what is proposed, and with it the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from specref.draws import Draws
from specref.tree import Tree
from specref.warp import Sampling


@dataclass(frozen=True)
class Accepted:
    """One row's news after a round.

    Attributes:
        tree: what was proposed.
        path: accepted nodes of the tree, from the first level down.
        tokens: what was added to the row: the path's tokens and the extra
            one, cut at the end of the sequence.
        hidden: ``[1 + len(path), d]`` target features of the last committed
            token and the accepted nodes, each of which predicted the token
            after it; None unless the drafter has ``features``.
        taps: one ``[1 + len(path), d]`` per entry of the drafter's ``taps``.
    """

    tree: Tree
    path: tuple[int, ...]
    tokens: tuple[int, ...]
    hidden: Tensor | None = None
    taps: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Prefill:
    """The target's features of one row's prompt, its last token excluded.

    ``hidden`` ``[n - 1, d]`` and ``taps``, as in `Accepted`.
    """

    hidden: Tensor
    taps: tuple[Tensor, ...] = ()


def check_positions(what: str, limit: int | None, need: int) -> None:
    """Raise when a draft or head has fewer positions than are needed."""
    if limit is not None and need > limit:
        raise ValueError(
            f"{what} has {limit} positions, the prompt plus max_new_tokens "
            f"need {need}: shorten one of them or give another {what}"
        )


class Drafter:
    """Base class: state handling that most drafters share.

    Attributes:
        features: ask the loop for the target's hidden states.
        taps: layers whose input the target should return (implies
            ``features``).
        sampling: set by `start`; proposals must come from its laws.
    """

    features: bool = False
    taps: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    eos: frozenset[int] = frozenset()

    @property
    def max_nodes(self) -> int:
        """Most nodes of one proposal (the loop sizes its cache by it)."""
        raise NotImplementedError

    def start(
        self,
        rows: Sequence[Sequence[int]],
        capacity: int,
        sampling: Sampling,
        eos: frozenset[int] = frozenset(),
        prefill: Sequence[Prefill] | None = None,
    ) -> None:
        """Begin a run on prompts ``rows``; drop all state of earlier runs.

        Args:
            capacity: most tokens a row can reach, proposals included.
            eos: tokens after which nothing needs to be proposed.
            prefill: per row, when ``features`` is set.
        """
        self.sampling, self.eos = sampling, eos

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        """One tree per row.

        Args:
            rows: all committed tokens of each row, prompt included.
            room: deepest useful proposal of each row; 0 for an ended row,
                which gets an empty tree.
            draws: randomness of each row.
        """
        raise NotImplementedError

    def commit(self, news: Sequence[Accepted | None]) -> None:
        """Learn what was accepted; None for rows that had ended before."""

    def key(self) -> tuple:
        """State beyond the committed tokens, for merging equal branches.

        Empty when proposals are a function of the committed tokens (and of
        chance) only, which is what most drafters are.
        """
        return ()
