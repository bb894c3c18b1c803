"""The MLP speculator: one small layer per level, each with its own tables.

Wertheimer et al. 2024, 2404.19124.  The state starts as the newest feature;
level ``i`` adds the embedding of the last token to a projection of the
state, norms the sum and passes it through a GELU: the result is read by the
level's own output and is the next state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.heads.base import Head
from specref.heads.recurrent import Recurrent
from specref.lm.linear import Linear
from specref.lm.llama import Llama

EPS = 1e-6


class ScaleNorm(nn.Module):
    """``x / rms(x) * weight + bias`` over the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return unit(x) * self.weight + self.bias


def unit(x: Tensor) -> Tensor:
    """``x / rms(x)`` over the last axis, in float32 at least."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (wide * scale).to(x.dtype)


class MLPSpeculator(Recurrent):
    """``gelu(norm(proj(state) + r emb(token)))`` per level.

    ``r`` keeps the embedding's share of the state's variance at what
    `n_predict` levels would leave of the feature's: one half at the end.

    Args:
        heads: number of levels, ``n_predict``.
        inner: width of the state; 0 is the target's.
        tie: one set of tables for all levels (the first projection, whose
            width differs, stays apart).
        scale_input: norm the feature before level 0.
    """

    own_head = True

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        heads: int = 3,
        inner: int = 0,
        tie: bool = False,
        scale_input: bool = False,
    ) -> None:
        super().__init__(target, words)
        if heads < 1 or inner < 0:
            raise ValueError(
                "heads must be at least 1 and inner at least 0, got "
                f"{heads} and {inner}"
            )
        self.levels, self.scale_input = heads, scale_input
        size = self.memory = inner or self.width
        kept = 0.5 ** (0.5 / heads)
        self.ratio = math.sqrt((1.0 - kept**2) * size / 2) / kept
        sets = 1 if tie else heads
        vocab, count = target.vocab_size, len(words)
        self.emb = _repeat(
            [nn.Embedding(vocab, size) for _ in range(sets)], heads
        )
        later = [Linear(size, size) for _ in range(min(sets, heads - 1))]
        first = Linear(self.width, size)
        self.proj = nn.ModuleList([first, *_repeat(later, heads - 1)])
        self.ln = _repeat([ScaleNorm(size) for _ in range(sets)], heads)
        self.outputs = _repeat(
            [Linear(size, count) for _ in range(sets)], heads
        )
        self.head = self.outputs[0]  # not a second copy

    def start(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `Recurrent.start`."""
        if self.scale_input:
            hidden = unit(hidden) / math.sqrt(2.0)
        return self.advance(hidden, tokens, 0)

    def advance(self, memory: Tensor, tokens: Tensor, depth: int) -> Tensor:
        """See `Recurrent.advance`."""
        x = self.proj[depth](memory) + self.ratio * self.emb[depth](tokens)
        return F.gelu(self.ln[depth](x))

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """See `Head.project`."""
        return self.outputs[depth](out)

    def truncate(self, count: int) -> Head:
        """See `Head.truncate`."""
        super().truncate(count)
        for output in self.outputs:
            if len(output.weight) > count:
                output.weight = nn.Parameter(output.weight.detach()[:count])
                output._packed = None
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """See `Head.trained`; ``head`` is a name of the first output."""
        named = self.named_parameters(remove_duplicate=False)
        return {
            n: w for n, w in named if not n.startswith(("embed.", "head."))
        }


def _repeat(some: list[nn.Module], count: int) -> nn.ModuleList:
    """``count`` modules: those given, or one again and again."""
    return nn.ModuleList(some[i % len(some)] for i in range(count))
