"""Temperature, top-k and top-p: from logits to the law that is sampled.

The same `Warp` is applied to the target's and the draft's logits, before
any ratio is formed (Leviathan et al. 2023, section 2.2).  The order is
temperature, then top-k, then top-p.  Ties at the edge of top-k are kept
(as transformers does); ties inside top-p are ranked lower index first.

Penalties and other functions of the prefix are logits processors; a
`Sampling` applies them before the warp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Warp:
    """Settings of the sampling law.

    Attributes:
        temperature: 0 means greedy: all mass on the first largest logit.
        top_k: keep the k largest logits, None keeps all.
        top_p: keep the smallest set of largest probabilities whose sum
            reaches ``top_p``, None or 1.0 keeps all.
    Raises:
        ValueError: on values outside their range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be at least 0 and finite, got "
                f"{self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """``[..., V]`` logits -> ``[..., V]`` probabilities.

        Logits of ``-inf`` get probability zero.  Half precision is
        widened to float32 first: the sum of a rounded law misses 1 by up
        to a percent, and then q is not the law that was drawn from.
        """
        if self.greedy:
            out = torch.zeros_like(logits)
            return out.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        half = logits.dtype in (torch.bfloat16, torch.float16)
        scores = (logits.float() if half else logits) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            rows = scores.reshape(-1, scores.shape[-1])
            edge = largest(rows, self.top_k)[0][:, -1]
            edge = edge.reshape(*scores.shape[:-1], 1)
            scores = scores.masked_fill(scores < edge, float("-inf"))
        prob = scores.softmax(-1)
        if self.top_p is None or self.top_p >= 1.0:
            return prob
        return _nucleus(prob, self.top_p)


def _nucleus(prob: Tensor, top_p: float) -> Tensor:
    """Zero the tail beyond ``top_p`` and renormalise."""
    wide = prob.shape[-1]
    if prob.device.type != "cpu" or wide <= BLOCK or not prob.numel():
        return _sorted_nucleus(prob, top_p)
    rows = [_row_nucleus(row, top_p) for row in prob.reshape(-1, wide)]
    return torch.stack(rows).reshape(prob.shape)


def _row_nucleus(row: Tensor, top_p: float) -> Tensor:
    """`_sorted_nucleus` of ``[V]``, which sorts no more than it must."""
    # Entries below the second floor have half of the tail's mass at most.
    for floor in (1e-3, (1.0 - top_p) / (2 * len(row))):
        at = (row >= floor).nonzero().squeeze(-1)
        value, order = row[at].sort(descending=True, stable=True)
        count = 1 + int((value.cumsum(-1) < top_p).sum())
        if count <= len(at):
            value = value[:count]
            at = at[order[:count]]
            return torch.zeros_like(row).index_copy_(
                0, at, value / value.sum()
            )
    return _sorted_nucleus(row, top_p)  # rounding, or NaN


def _sorted_nucleus(prob: Tensor, top_p: float) -> Tensor:
    value, index = prob.sort(dim=-1, descending=True, stable=True)
    total = value.cumsum(-1)
    # Mass ranked above each entry; the first is always kept.
    before = torch.cat((torch.zeros_like(total[..., :1]), total[..., :-1]), -1)
    value = value * (before < top_p)
    value = value / value.sum(-1, keepdim=True)
    return torch.zeros_like(prob).scatter_(-1, index, value)


BLOCK = 128  # tokens; a power of two that divides most vocabularies


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of each row of ``[m, V]``: values and indices.

    On a CPU the maxima of blocks, which vector units find fast, say where
    the largest entries are: several times faster on a long row.
    """
    m, size = scores.shape
    blocks = size // BLOCK
    if scores.device.type != "cpu" or size % BLOCK or count > blocks:
        return scores.topk(count, -1)
    each = scores.reshape(m, blocks, BLOCK)
    best = each.amax(-1).topk(count).indices
    few = each.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK))
    value, at = few.flatten(1).topk(count)
    return value, best.gather(1, at // BLOCK) * BLOCK + at % BLOCK


Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a next token is chosen from logits: processors, then a `Warp`.

    Attributes:
        processors: functions of (``input_ids [1, n]``, ``scores [1, V]``)
            as in transformers.  Each position is processed with its true
            prefix, for the target and the draft alike.
    """

    warp: Warp = Warp()
    processors: tuple[Processor, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.warp.greedy

    def scores(
        self, logits: Tensor, prefixes: Sequence[Sequence[int]] | None
    ) -> Tensor:
        """``[n, V]`` logits after the processors.

        Args:
            prefixes: the ``n`` token sequences that the logits follow; not
                read (and may be None) when there are no processors.
        """
        if not self.processors:
            return logits
        out = logits.clone()
        for i, prefix in enumerate(prefixes):
            ids = torch.tensor([list(prefix)], device=logits.device)
            row = out[i : i + 1]
            for process in self.processors:
                row = process(ids, row)
            out[i] = row[0]
        return out

    def law(
        self, logits: Tensor, prefixes: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """``[n, V]`` logits -> the laws that tokens are drawn from."""
        return self.warp(self.scores(logits, prefixes))
