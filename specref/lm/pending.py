"""The uncommitted nodes of a cache: their positions and who sees whom.

Both caches with tensors (`lm.cache`, `lm.hf`) are built on it; they differ
in where pending nodes are stored only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specref.lm.base import (
    NO_PATH,
    Path,
    check_lengths,
    check_path,
    check_room,
    check_shapes,
    check_size,
)
from specref.tree import DEAD, ancestors


class Pending:
    """Lengths, capacity and the pending tree of a batch.

    Args:
        batch: rows.
        capacity: most slots of a row, pending nodes included.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        check_size(batch, capacity)
        self.capacity = capacity
        self.length = [0] * batch
        self.pending = 0
        # ``[B, pending]``; None while every row is a chain, the usual case.
        self._parents: Tensor | None = None

    @property
    def even(self) -> bool:
        return min(self.length) == max(self.length)

    def admit(self, tokens: Tensor, parents: Tensor | None) -> None:
        """Check a forward's arguments and append its nodes to the tree."""
        check_shapes(tokens, parents, len(self.length))
        batch, n = tokens.shape
        base, device = self.pending, tokens.device
        check_room(self.length, base, n, self.capacity)
        if parents is None and self._parents is None:
            return
        if self._parents is not None:
            old = self._parents
        else:
            old = torch.arange(-1, base - 1, device=device).expand(batch, base)
        if parents is None:
            parents = torch.arange(base - 1, base + n - 1, device=device)
            parents = parents.expand(batch, n)
        else:
            _check_parents(parents, base)
        self._parents = torch.cat((old, parents), 1)

    def _sight(self, n: int, device: torch.device) -> Tensor:
        """``[B, nodes, nodes]``: which pending node sees which."""
        if self._parents is not None:
            return ancestors(self._parents)
        nodes = self.pending + n
        where = torch.arange(nodes, device=device)
        sees = where[:, None] >= where
        return sees.expand(len(self.length), nodes, nodes)

    def look(
        self, n: int, first: Tensor, span: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``n`` new nodes see.

        Args:
            first: ``[B, 1]`` slot of each row's first pending node.
            span: slots to lay the sight out over.
        Returns:
            positions ``[B, n]`` of the nodes; positions ``[B, span]`` of
            the slots (any number where nothing is stored); and ``[B, n,
            span]``, true where a node sees a slot.
        """
        device = first.device
        length = torch.tensor(self.length, device=device).unsqueeze(1)
        slot = torch.arange(span, device=device)
        sees = self._sight(n, device)
        depth = length + sees.sum(-1) - 1  # a position is a depth, no slot
        sees, nodes = sees[:, self.pending :], sees.shape[1]
        node = slot - first  # [B, span]: index among the pending nodes
        pick = node.clamp(0, nodes - 1)
        known = slot < length
        inside = ((node >= 0) & (node < nodes)).unsqueeze(1)
        wide = pick.unsqueeze(1).expand(-1, n, -1)
        allowed = known.unsqueeze(1) | (inside & sees.gather(2, wide))
        at = torch.where(known, slot, depth.gather(1, pick))
        return depth[:, self.pending :], at, allowed

    def chosen(self, path: Path | None) -> list[list[int]]:
        """The argument of ``keep``, checked against the pending tree."""
        if path is None:
            if self._parents is not None:
                raise ValueError(NO_PATH)
            return [list(range(self.pending)) for _ in self.length]
        parents = None if self._parents is None else self._parents.tolist()
        return check_path(path, self.pending, len(self.length), parents)

    def advance(self, rows: list[list[int]]) -> None:
        """Count what was kept and forget the pending nodes."""
        self.length = [
            n + len(row) for n, row in zip(self.length, rows, strict=True)
        ]
        self.pending, self._parents = 0, None

    def retreat(self, length: Sequence[int]) -> None:
        """See `Cache.truncate`; pending nodes are dropped too."""
        self.length = check_lengths(length, self.length)
        self.pending, self._parents = 0, None


def within(
    allowed: Tensor, where: Tensor, at: Tensor, window: int | None
) -> Tensor:
    """Sliding-window attention: only positions nearer than ``window``."""
    if window is None:
        return allowed
    return allowed & (where.unsqueeze(2) - at.unsqueeze(1) < window)


def _check_parents(parents: Tensor, base: int) -> None:
    if parents.device.type != "cpu":
        return  # looking would stall the device before its forward
    limit = base + torch.arange(parents.shape[1])
    if not bool(((parents >= DEAD) & (parents < limit)).all()):
        raise ValueError(
            "parents must be earlier pending nodes, -1 for children of the "
            f"last committed token or -2 for padding, got {parents.tolist()}"
        )
