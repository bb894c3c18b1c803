"""`Table`: a language model given as context -> law, for proofs.

Laws are exact float64; a context's law is computed once and remembered.
Does not handle: speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specref.lm.base import Output, Path, check_path, check_room

NextProbs = Callable[[tuple[int, ...]], Sequence[float]]


class TableCache:
    """The tokens themselves are the state."""

    def __init__(self, batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"batch and capacity must be at least 1, got {batch} and "
                f"{capacity}"
            )
        self.capacity, self.pending = capacity, 0
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        # Per row, the pending nodes as full contexts (None for padding).
        self.nodes: list[list[tuple[int, ...] | None]] = [[] for _ in self.rows]

    @property
    def length(self) -> list[int]:
        return [len(row) for row in self.rows]

    def keep(self, path: Path | None = None) -> None:
        if path is None:
            path = [range(self.pending)] * len(self.rows)
        for b, row in enumerate(check_path(path, self.pending)):
            if row and self.nodes[b][row[-1]] is not None:
                self.rows[b] = list(self.nodes[b][row[-1]])
        self.nodes = [[] for _ in self.rows]
        self.pending = 0

    def truncate(self, length: Sequence[int]) -> None:
        self.rows = [r[:n] for r, n in zip(self.rows, length, strict=True)]


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
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
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
        check_room(cache.length, base, n, cache.capacity)
        ups = parents.tolist() if parents is not None else None
        out = []
        for b, row in enumerate(rows):
            nodes = cache.nodes[b]
            for i, token in enumerate(row):
                up = base + i - 1 if ups is None else ups[b][i]
                if up == -2:
                    nodes.append(None)
                    continue
                above = tuple(cache.rows[b]) if up < 0 else nodes[up]
                nodes.append((*above, token))
            out += [self._row(node) for node in nodes[base:]]
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
