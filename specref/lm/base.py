"""The `LM` protocol: what the loop and the drafters ask of a model.

A cache holds, per batch row, the committed tokens and the *pending* nodes
of forwards since the last ``keep``.  Pending nodes form a tree below the
last committed token; ``keep(path)`` commits one path of it per row and
drops the rest.  Plain decoding is a one-node tree kept whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Path = Sequence[Sequence[int]]


@dataclass
class Output:
    """Result of a forward over ``n`` new nodes.

    Attributes:
        logits: ``[B, n, V]``, or None when not asked for.
        hidden: ``[B, n, d]`` after the final norm (what the head reads).
        taps: one ``[B, n, d]`` per tap asked for: the residual stream that
            enters layer ``t`` (0 is the embedding; the number of layers is
            the stream before the final norm).
    """

    logits: Tensor | None
    hidden: Tensor
    taps: tuple[Tensor, ...] = ()


class Cache(Protocol):
    """Per-row state of a model over its committed and pending tokens."""

    length: list[int]  # committed tokens of each row
    pending: int  # nodes since the last keep, the same number in each row

    def keep(self, path: Path | None = None) -> None:
        """Commit one path of pending nodes per row and drop the others.

        Args:
            path: for each row, indices of pending nodes from the first
                level down (may be empty); None commits all, for chains.
        Raises:
            ValueError: an index out of range or not increasing.
        """

    def truncate(self, length: Sequence[int]) -> None:
        """Forget the committed tokens of row ``b`` beyond ``length[b]``."""


class LM(Protocol):
    """A language model over token ids."""

    vocab_size: int
    device: torch.device

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for ``batch`` rows of at most ``capacity`` nodes."""

    def forward(
        self,
        tokens: Tensor,
        cache: Cache,
        parents: Tensor | None = None,
        taps: Sequence[int] = (),
        logits: bool = True,
    ) -> Output:
        """Run ``tokens`` ``[B, n]`` as new pending nodes.

        Args:
            parents: ``[B, n]`` long, indices into the pending nodes (those
                of earlier forwards first), -1 for a child of the last
                committed token, -2 for padding.  None is a chain below the
                last pending node.
            taps: layers whose input to return.
            logits: skip the output head when False (prefill).
        Raises:
            ValueError: a row would exceed its capacity.
        """


def check_path(path: Path, pending: int) -> list[list[int]]:
    """Validate a ``keep`` argument; returns it as lists."""
    rows = [list(map(int, row)) for row in path]
    for b, row in enumerate(rows):
        if any(not 0 <= i < pending for i in row) or any(
            i >= j for i, j in zip(row, row[1:], strict=False)
        ):
            raise ValueError(
                f"path[{b}] must list increasing pending nodes in "
                f"[0, {pending}), got {row}"
            )
    return rows


def check_room(
    length: Sequence[int], pending: int, new: int, capacity: int
) -> None:
    """Raise when ``new`` nodes do not fit."""
    need = max(length) + pending + new
    if need > capacity:
        row = max(range(len(length)), key=length.__getitem__)
        raise ValueError(
            f"capacity {capacity} exceeded: row {row} needs {need} slots "
            f"({length[row]} committed, {pending} pending, {new} new); pass "
            "a larger capacity or a shorter prompt"
        )
