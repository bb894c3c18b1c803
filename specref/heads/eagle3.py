"""EAGLE-3: features of three depths in, and no feature to be matched.

Li et al. 2025, 2503.01840.  The target's streams at a low, a middle and a
high layer are fused by one matrix.  Embedding and fused feature are normed
apart and both enter the attention, whose matrices are twice as wide; what
is fed back is the layer's own output before its last norm, which nothing
ties to the target's features: it is trained by unrolling (`rollout`) on
tokens alone.  The output head is the head's own, over a draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.heads.pairs import PairHead
from specref.lm.linear import Linear
from specref.lm.llama import Attend, Layer, Llama, RMSNorm


def default_taps(layers: int) -> tuple[int, int, int]:
    """The published choice: what enters layers 2, n // 2 and n - 3."""
    if layers < 6:
        raise ValueError(
            f"taps must be given for a target of {layers} layers: the "
            "published choice needs at least 6"
        )
    return 2, layers // 2, layers - 3


class WideLayer(Layer):
    """A decoder layer whose attention reads embedding and feature."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        c = config
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        self.qkv = Linear(2 * c.hidden_size, heads * c.head_dim, c.qkv_bias)
        self.feature_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.index = 0

    def forward(self, e: Tensor, f: Tensor, at: Attend) -> Tensor:
        """Embeddings and features ``[B, n, d]`` to ``[B, n, d]``; the
        residual is the feature as it came, without its norm."""
        both = torch.cat((self.input_norm(e), self.feature_norm(f)), -1)
        x = f + self.attention(both, at)
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Eagle3(PairHead):
    """``fc`` of the taps, one wide layer, a norm and a head of its own.

    Args:
        taps: layers of the target whose input is read; `default_taps`
            unless given.
    """

    own_head = True

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        taps: Sequence[int] | None = None,
    ) -> None:
        super().__init__(target, words)
        most = target.config.num_hidden_layers
        self.taps = tuple(default_taps(most) if taps is None else taps)
        if not self.taps or not all(0 <= t <= most for t in self.taps):
            raise ValueError(
                f"taps must be layers in [0, {most}], got {list(self.taps)}"
            )
        self.fc = Linear(len(self.taps) * self.width, self.width)
        self.layer = WideLayer(self.config)
        self.norm = RMSNorm(self.width, self.config.rms_norm_eps)

    def fuse(self, hidden: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """See `PairHead.fuse`."""
        return self.fc(torch.cat(tuple(taps), -1))

    def step(self, tokens: Tensor, features: Tensor, at: Attend) -> Tensor:
        """See `PairHead.step`."""
        return self.layer(self.embed(tokens), features, at)

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """See `Head.project`; the norm is not fed back."""
        return self.head(self.norm(out))
