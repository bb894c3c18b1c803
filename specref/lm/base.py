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
NO_PATH = "path must be given for a tree: keep() without one commits chains"


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
            path: for each row, indices of pending nodes, parent to child
                from the first level down (may be empty); None commits all
                of a chain.
        Raises:
            ValueError: a row's nodes are not such a path, or None for a
                tree.
        """

    def truncate(self, length: Sequence[int]) -> None:
        """Forget row ``b``'s tokens beyond ``length[b]``, and all pending.

        Raises:
            ValueError: longer than the row, or not one entry per row.
        """


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


def check_path(
    path: Path,
    pending: int,
    batch: int,
    parents: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Validate a ``keep`` argument; returns it as lists.

    Args:
        parents: of the pending nodes, per row; None for chains.
    Raises:
        ValueError: a row is no path from the first level down.
    """
    rows = [list(map(int, row)) for row in path]
    if len(rows) != batch:
        raise ValueError(
            f"path must have one entry per row ({batch}), got {len(rows)}"
        )
    for b, row in enumerate(rows):
        if any(not 0 <= i < pending for i in row):
            raise ValueError(
                f"path[{b}] must list pending nodes in [0, {pending}), got "
                f"{row}"
            )
        ups = [i - 1 if parents is None else parents[b][i] for i in row]
        if ups != [-1, *row][: len(row)]:
            raise ValueError(
                f"path[{b}] must go from a child of the last committed "
                f"token down, parent to child, got {row}"
            )
    return rows


def check_lengths(length: Sequence[int], now: Sequence[int]) -> list[int]:
    """Validate a ``truncate`` argument; returns it as a list."""
    if len(length) != len(now):
        raise ValueError(
            f"length must have one entry per row ({len(now)}), got "
            f"{len(length)}"
        )
    for b, n in enumerate(length):
        if not 0 <= n <= now[b]:
            raise ValueError(f"length[{b}] must be in [0, {now[b]}], got {n}")
    return [int(n) for n in length]


def check_size(batch: int, capacity: int) -> None:
    """Validate the arguments of ``new_cache``."""
    if batch < 1 or capacity < 1:
        raise ValueError(
            f"batch and capacity must be at least 1, got {batch} and "
            f"{capacity}"
        )


def check_shapes(tokens: Tensor, parents: Tensor | None, batch: int) -> None:
    """Validate the shapes of a forward's arguments."""
    if tokens.dim() != 2 or tokens.shape[0] != batch or not tokens.shape[1]:
        raise ValueError(
            f"tokens must be [{batch}, n] with n at least 1, as the cache "
            f"has {batch} rows, got {list(tokens.shape)}"
        )
    if parents is not None and parents.shape != tokens.shape:
        raise ValueError(
            f"parents must have the shape of tokens, {list(tokens.shape)}, "
            f"got {list(parents.shape)}"
        )


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
