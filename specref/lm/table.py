"""`Table`: a language model given as context -> law, for proofs.

Laws are exact float64; a context's law is computed once and remembered.
Does not handle: speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specref.lm.base import (
    NO_PATH,
    Output,
    Path,
    check_lengths,
    check_path,
    check_room,
    check_shapes,
    check_size,
)

NextProbs = Callable[[tuple[int, ...]], Sequence[float]]


class TableCache:
    """The tokens themselves are the state.

    Lists, not the tensors of `lm.pending`: a law by enumeration makes
    millions of these forwards.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        check_size(batch, capacity)
        self.capacity, self.pending = capacity, 0
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self._forget()

    def _forget(self) -> None:
        # Per row, the pending nodes as full contexts (None for padding),
        # and their parents.
        self.nodes: list[list[tuple[int, ...] | None]] = [
            [] for _ in self.rows
        ]
        self.parents: list[list[int]] = [[] for _ in self.rows]
        self.pending, self.tree = 0, False

    @property
    def length(self) -> list[int]:
        return [len(row) for row in self.rows]

    def add(self, b: int, token: int, parent: int) -> None:
        """One more pending node of row ``b``."""
        nodes = self.nodes[b]
        if not -2 <= parent < len(nodes):
            raise ValueError(
                "parents must be earlier pending nodes, -1 for children of "
                f"the last committed token or -2 for padding, got {parent}"
            )
        above = tuple(self.rows[b])
        if parent == -2:
            above = None
        elif parent >= 0:
            above = nodes[parent]
        nodes.append(None if above is None else (*above, token))
        self.parents[b].append(parent)

    def keep(self, path: Path | None = None) -> None:
        """See `Cache.keep`."""
        if path is None:
            if self.tree:
                raise ValueError(NO_PATH)
            path = [range(self.pending)] * len(self.rows)
        chosen = check_path(path, self.pending, len(self.rows), self.parents)
        for b, row in enumerate(chosen):
            if row:
                self.rows[b] = list(self.nodes[b][row[-1]])
        self._forget()

    def truncate(self, length: Sequence[int]) -> None:
        """See `Cache.truncate`."""
        check_lengths(length, self.length)
        self.rows = [r[:n] for r, n in zip(self.rows, length, strict=True)]
        self._forget()


class Table:
    """A language model over a tiny vocabulary.

    Args:
        next_probs: ``next_probs(context)`` with the context as a tuple of
            token ids returns ``vocab_size`` probabilities.
        vocab_size: V.
    Raises:
        ValueError: a law of the wrong length, negative, or not summing
            to 1 within 1e-9.
    """

    device = torch.device("cpu")

    def __init__(self, next_probs: NextProbs, vocab_size: int) -> None:
        if not callable(next_probs):
            raise TypeError(
                f"next_probs must be a function of a context, got "
                f"{type(next_probs).__name__}"
            )
        if vocab_size < 1:
            raise ValueError(
                f"vocab_size must be at least 1, got {vocab_size}"
            )
        self.next_probs, self.vocab_size = next_probs, vocab_size
        self._memo: dict[tuple[int, ...], Tensor] = {}

    def law(self, context: Sequence[int]) -> Tensor:
        """float64 ``[V]``: the law after ``context``."""
        key = tuple(context)
        if key not in self._memo:
            prob = torch.tensor(
                [float(x) for x in self.next_probs(key)], dtype=torch.float64
            )
            if len(prob) != self.vocab_size:
                raise ValueError(
                    f"next_probs must return {self.vocab_size} values, got "
                    f"{len(prob)} for context {key}"
                )
            if bool((prob < 0).any()) or abs(float(prob.sum()) - 1) > 1e-9:
                raise ValueError(
                    "next_probs must return a probability law, got "
                    f"{prob.tolist()} for context {key}"
                )
            self._memo[key] = prob
        return self._memo[key]

    def new_cache(self, batch: int, capacity: int) -> TableCache:
        return TableCache(batch, capacity)

    def forward(
        self,
        tokens: Tensor,
        cache: TableCache,
        parents: Tensor | None = None,
        taps: Sequence[int] = (),
        logits: bool = True,
    ) -> Output:
        """See `LM.forward`.  Logits are log-probabilities; the hidden
        state and every tap are the law itself, ``[B, n, V]``."""
        rows = tokens.tolist()
        n, base = tokens.shape[1], cache.pending
        check_shapes(tokens, parents, len(cache.rows))
        check_room(cache.length, base, n, cache.capacity)
        ups = parents.tolist() if parents is not None else None
        cache.tree |= ups is not None
        out = []
        for b, row in enumerate(rows):
            for i, token in enumerate(row):
                cache.add(b, token, base + i - 1 if ups is None else ups[b][i])
            out += [self._row(node) for node in cache.nodes[b][base:]]
        cache.pending = base + n
        law = torch.stack(out).reshape(len(rows), n, self.vocab_size)
        return Output(
            law.log() if logits else None, law, tuple(law for _ in taps)
        )

    def _row(self, node: tuple[int, ...] | None) -> Tensor:
        if node is None:  # padding: any law will do, it is never read
            return torch.full(
                (self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64
            )
        return self.law(node)
