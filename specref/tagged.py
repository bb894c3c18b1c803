"""Rows that carry their own index: how a batch's rows are told apart.

transformers makes processors and criteria for whole padded batches that
advance in step; our rows are unpadded and advance at their own pace.  So
each row carries its index in the batch in front (the *tag*), by which
`specref.hf_run` finds the padded prompt it came from.  Neither model sees
the tag.

Does not handle: anything but `specref.hf_generate`'s needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from specref.draft.base import Accepted, Drafter, Prefill
from specref.draws import Draws
from specref.lm.base import Output, Path
from specref.tree import Tree
from specref.warp import Sampling


class TaggedCache:
    """A cache whose rows have one entry more, the tag, in front."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def length(self) -> list[int]:
        return [n + 1 for n in self.inner.length]

    @property
    def pending(self) -> int:
        return self.inner.pending

    def keep(self, path: Path | None = None) -> None:
        self.inner.keep(path)

    def truncate(self, length: Sequence[int]) -> None:
        self.inner.truncate([n - 1 for n in length])


class Tagged:
    """An `LM` for rows with a tag, which the model never sees.

    Logits are float32, as in transformers' decoding.
    """

    def __init__(self, lm: Any) -> None:
        self.lm, self.vocab_size, self.device = lm, lm.vocab_size, lm.device
        self.last: tuple[Tensor, Tensor | None, Tensor] | None = None

    def new_cache(self, batch: int, capacity: int) -> TaggedCache:
        return TaggedCache(self.lm.new_cache(batch, capacity))

    def forward(
        self,
        tokens: Tensor,
        cache: TaggedCache,
        parents: Tensor | None = None,
        taps: Sequence[int] = (),
        logits: bool = True,
    ) -> Output:
        """See `LM.forward`."""
        out = self.lm.forward(tokens, cache.inner, parents, taps, logits)
        if out.logits is not None:
            out = replace(out, logits=out.logits.float())
            self.last = (tokens, parents, out.logits)
        return out

    def logits_after(self, b: int, fresh: Sequence[int]) -> Tensor:
        """``[V]`` of the last forward, after the round's tokens so far."""
        tokens, parents, logits = self.last
        if parents is None:
            return logits[b, len(fresh)]
        ids, ups = tokens[b].tolist(), parents[b].tolist()
        at = {0}  # equal siblings are equal contexts: follow all of them
        for token in fresh:
            at = {
                i for i, up in enumerate(ups) if up in at and ids[i] == token
            }
        return logits[b, min(at)]


class Untagged(Drafter):
    """A drafter that is shown rows without their tags."""

    def __init__(self, inner: Drafter, sampling: Sampling) -> None:
        self.inner, self.mine = inner, sampling
        self.features, self.taps = inner.features, inner.taps

    @property
    def max_nodes(self) -> int:
        return self.inner.max_nodes

    def start(
        self,
        rows: Sequence[Sequence[int]],
        capacity: int,
        sampling: Sampling,
        eos: frozenset[int] = frozenset(),
        prefill: Sequence[Prefill] | None = None,
    ) -> None:
        bare = [row[1:] for row in rows]
        self.inner.start(bare, capacity - 1, self.mine, eos, prefill)

    def propose(
        self,
        rows: Sequence[Sequence[int]],
        room: Sequence[int],
        draws: Sequence[Draws],
    ) -> list[Tree]:
        return self.inner.propose([row[1:] for row in rows], room, draws)

    def commit(self, news: Sequence[Accepted | None]) -> None:
        self.inner.commit(news)

    def key(self) -> tuple:
        return self.inner.key()
