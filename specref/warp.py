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
            edge = scores.topk(self.top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < edge, float("-inf"))
        prob = scores.softmax(-1)
        if self.top_p is None or self.top_p >= 1.0:
            return prob
        return _nucleus(prob, self.top_p)


def _nucleus(prob: Tensor, top_p: float) -> Tensor:
    """Zero the tail beyond ``top_p`` and renormalise."""
    value, index = prob.sort(dim=-1, descending=True, stable=True)
    total = value.cumsum(-1)
    # Mass ranked above each entry; the first is always kept.
    before = torch.cat((torch.zeros_like(total[..., :1]), total[..., :-1]), -1)
    value = value * (before < top_p)
    value = value / value.sum(-1, keepdim=True)
    return torch.zeros_like(prob).scatter_(-1, index, value)


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
