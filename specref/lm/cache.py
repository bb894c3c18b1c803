"""A preallocated key/value cache with tree masks and in-place commit.

Rows have their own lengths.  Row ``b`` keeps its committed tokens in slots
``0 .. length[b] - 1`` and its pending nodes directly after them; ``keep``
moves the accepted path down over the rejected nodes.

Does not handle: eviction.  A full cache is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specref.lm.base import Path, check_path, check_room
from specref.tree import ancestors


class StaticCache:
    """Keys and values ``[layers, B, kv heads, capacity, head_dim]``.

    Args:
        static: attend over the whole capacity instead of the used part, so
            that shapes never change (CUDA graphs).
    """

    def __init__(
        self,
        config: Any,
        batch: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
        static: bool = False,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"batch and capacity must be at least 1, got {batch} and "
                f"{capacity}"
            )
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        # Zeros, not empty: masked slots are multiplied by zero weights, and
        # zero times an uninitialised NaN is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.capacity, self.static = capacity, static
        self.window = config.sliding_window
        self.length = [0] * batch
        self.pending = 0
        self._parents: Tensor | None = None  # of the pending nodes; None: chain

    def open(
        self, tokens: Tensor, parents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Start a forward: positions ``[B, n]`` and who may see what.

        Returns ``allowed`` ``[B, n, span]``, or None when every node may
        see every slot.
        """
        batch, n = tokens.shape
        device, base = tokens.device, self.pending
        if batch != len(self.length):
            raise ValueError(
                f"tokens must have {len(self.length)} rows as the cache has, "
                f"got {batch}"
            )
        check_room(self.length, base, n, self.capacity)
        self._extend(batch, n, parents, device)
        even = min(self.length) == max(self.length)
        self._slots = self._slot_index(n, even, device)
        used = max(self.length) + base + n
        self._span = self.capacity if self.static else used
        start = torch.tensor(self.length, device=device).unsqueeze(1)
        if self._parents is None and even:
            at = torch.arange(base, base + n, device=device)
            positions = start + at
            if n == 1 and not self.static and self.window is None:
                return positions, None
        sees = self._sees(batch, base + n, device)[:, base:]
        positions = start + sees.sum(-1) - 1
        return positions, self._allowed(sees, start, positions)

    def _extend(
        self, batch: int, n: int, parents: Tensor | None, device: torch.device
    ) -> None:
        """Append the new nodes to the pending tree."""
        base = self.pending
        if parents is None and self._parents is None:
            return  # a chain stays a chain
        if self._parents is None:
            old = torch.arange(-1, base - 1, device=device).expand(batch, base)
        else:
            old = self._parents
        if parents is None:
            parents = torch.arange(base - 1, base + n - 1, device=device)
            parents = parents.expand(batch, n)
        self._parents = torch.cat((old, parents), 1)

    def _sees(self, batch: int, n: int, device: torch.device) -> Tensor:
        """``[B, n, n]``: the ancestor relation of the pending nodes."""
        if self._parents is not None:
            return ancestors(self._parents)
        where = torch.arange(n, device=device)
        return (where[:, None] >= where).expand(batch, n, n)

    def _allowed(self, sees: Tensor, start: Tensor, where: Tensor) -> Tensor:
        """Committed slots plus ancestors, laid out over the span."""
        batch, n, nodes = sees.shape
        slot = torch.arange(self._span, device=sees.device)
        node = slot - start  # [B, span]: index among the pending nodes
        inside = (node >= 0) & (node < nodes)
        pick = node.clamp(0, nodes - 1).unsqueeze(1).expand(batch, n, -1)
        allowed = (node < 0).unsqueeze(1) | (
            inside.unsqueeze(1) & sees.gather(2, pick)
        )
        if self.window is None:
            return allowed
        # A pending node's position is its depth, not its slot.
        depth = ancestors_depth(self, batch, nodes, sees.device)
        position = torch.where(
            node < 0, slot, start + depth.gather(1, node.clamp(0, nodes - 1))
        )
        return allowed & (where.unsqueeze(2) - position.unsqueeze(1) < self.window)

    def _slot_index(
        self, n: int, even: bool, device: torch.device
    ) -> int | Tensor:
        """Where new nodes go: one offset, or ``[B, n]`` when uneven."""
        if even and not self.static:
            return self.length[0] + self.pending
        start = torch.tensor(self.length, device=device) + self.pending
        return start.unsqueeze(1) + torch.arange(n, device=device)

    def write(
        self, layer: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store ``[B, kv, n, hd]``; returns the span to attend to."""
        keys, values = self.k[layer], self.v[layer]
        if isinstance(self._slots, int):
            keys.narrow(2, self._slots, k.shape[2]).copy_(k)
            values.narrow(2, self._slots, k.shape[2]).copy_(v)
        else:
            index = self._slots[:, None, :, None].expand(k.shape)
            keys.scatter_(2, index, k)
            values.scatter_(2, index, v)
        return keys[:, :, : self._span], values[:, :, : self._span]

    def close(self, n: int) -> None:
        self.pending += n

    def keep(self, path: Path | None = None) -> None:
        """See `Cache.keep`."""
        if path is None:
            path = [range(self.pending)] * len(self.length)
        rows = check_path(path, self.pending)
        if any(row != list(range(len(row))) for row in rows):
            self._move(rows)
        self.length = [
            n + len(row) for n, row in zip(self.length, rows, strict=True)
        ]
        self.pending, self._parents = 0, None

    def _move(self, rows: list[list[int]]) -> None:
        """Gather the kept slots, then write them down in order."""
        width = max(map(len, rows))
        device = self.k.device
        # Short rows copy their own next slots onto themselves.
        source = [
            [n + i for i in row] + [n + j for j in range(len(row), width)]
            for n, row in zip(self.length, rows, strict=True)
        ]
        target = [[n + j for j in range(width)] for n in self.length]
        shape = (*self.k.shape[:3], width, self.k.shape[4])
        src = torch.tensor(source, device=device)
        dst = torch.tensor(target, device=device)
        src = src[None, :, None, :, None].expand(shape)
        dst = dst[None, :, None, :, None].expand(shape)
        for store in (self.k, self.v):
            store.scatter_(3, dst, store.gather(3, src))

    def truncate(self, length: Sequence[int]) -> None:
        """See `Cache.truncate`; pending nodes are dropped too."""
        for b, n in enumerate(length):
            if not 0 <= n <= self.length[b]:
                raise ValueError(
                    f"length[{b}] must be in [0, {self.length[b]}], got {n}"
                )
        self.length, self.pending, self._parents = list(length), 0, None


def ancestors_depth(
    cache: StaticCache, batch: int, nodes: int, device: torch.device
) -> Tensor:
    """Depth of each pending node, ``[B, nodes]``; 0 directly below."""
    return cache._sees(batch, nodes, device).sum(-1) - 1
