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

from specref.lm.base import Path
from specref.lm.pending import Pending, within


class StaticCache(Pending):
    """Keys and values ``[layers, B, kv heads, capacity, head_dim]``.

    Args:
        config: a `LlamaConfig`.
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
        super().__init__(batch, capacity)
        self.window = config.sliding_window
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
        self.static = static
        self._slots: int | Tensor = 0
        self._span = 0

    def open(
        self, tokens: Tensor, parents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Start a forward: positions ``[B, n]`` and who may see what.

        Returns ``allowed`` ``[B, n, span]``, or None when every node may
        see every slot.
        """
        self.admit(tokens, parents)
        (_, n), device, base = tokens.shape, tokens.device, self.pending
        used = max(self.length) + base + n
        self._span = self.capacity if self.static else used
        first = torch.tensor(self.length, device=device).unsqueeze(1)
        slots = first + torch.arange(base, base + n, device=device)
        self._slots = slots
        if self.even and not self.static:
            self._slots = self.length[0] + base
        if self._parents is not None:
            where, at, allowed = self.look(n, first, self._span)
            return where, within(allowed, where, at, self.window)
        # A chain's nodes lie in the slots of their own positions.
        if n == 1 and self.window is None and isinstance(self._slots, int):
            return slots, None
        slot = torch.arange(self._span, device=device).unsqueeze(0)
        allowed = slot.unsqueeze(1) <= slots.unsqueeze(2)
        return slots, within(allowed, slots, slot, self.window)

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
        """The forward is done: its nodes are pending."""
        self.pending += n

    def keep(self, path: Path | None = None) -> None:
        """See `Cache.keep`."""
        rows = self.chosen(path)
        if any(row != list(range(len(row))) for row in rows):
            self._move(rows)
        self.advance(rows)

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
        """See `Cache.truncate`."""
        self.retreat(length)
