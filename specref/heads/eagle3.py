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
from specref.lm.llama import Attend, Layer, Llama, LlamaConfig, RMSNorm


def default_taps(layers: int) -> tuple[int, int, int]:
    """The published choice: what enters layers 2, n // 2 and n - 3."""
    if layers < 6:
        raise ValueError(
            f"taps must be given for a target of {layers} layers: the "
            "published choice needs at least 6"
        )
    return 2, layers // 2, layers - 3


class WideLayer(Layer):
    """A decoder layer whose attention reads embedding and feature.

    Args:
        normed: whether the residual is the feature after its norm
            (``norm_before_residual``) instead of as it came.
    """

    def __init__(self, config: LlamaConfig, normed: bool = False) -> None:
        super().__init__(config)
        c = config
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        self.qkv = Linear(2 * c.hidden_size, heads * c.head_dim, c.qkv_bias)
        self.feature_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.index, self.normed = 0, normed

    def forward(self, e: Tensor, f: Tensor, at: Attend) -> Tensor:
        """Embeddings and features ``[B, n, d]`` to ``[B, n, d]``."""
        feature = self.feature_norm(f)
        both = torch.cat((self.input_norm(e), feature), -1)
        x = (feature if self.normed else f) + self.attention(both, at)
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Eagle3(PairHead):
    """``fc`` of the taps, one wide layer, a norm and a head of its own.

    The defaults are the published head; the flags are what later trainers
    added, with the names that they have in config files.

    Args:
        taps: layers of the target whose input is read; `default_taps`
            unless given.
        layers: decoder layers; those after the first are plain.
        bias: whether ``fc`` has one.
        norm_before_residual: see `WideLayer`.
        norm_before_fc: one norm over all taps, joined.
        fc_norm: one norm per tap instead.
        norm_output: what is fed back is the output after the last norm.
        mix: train the output head as ``rows (I + M)``, ``rows`` being the
            target's: `merge` makes it a head like any other.
        scales: what each tap is multiplied with while the head is trained;
            `fold` moves them into ``fc``.
        config: sizes of its layers; the target's unless given.
    """

    own_head = True

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        taps: Sequence[int] | None = None,
        layers: int = 1,
        bias: bool = False,
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        mix: bool = False,
        scales: Sequence[float] | None = None,
        config: LlamaConfig | None = None,
    ) -> None:
        super().__init__(target, words, layers, config)
        most = target.config.num_hidden_layers
        self.taps = tuple(default_taps(most) if taps is None else taps)
        if not self.taps or not all(0 <= t <= most for t in self.taps):
            raise ValueError(
                f"taps must be layers in [0, {most}], got {list(self.taps)}"
            )
        if norm_before_fc and fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        if scales is not None and (norm_before_fc or fc_norm):
            raise ValueError("scales and norms of the taps exclude each other")
        eps, d = self.config.rms_norm_eps, target.config.hidden_size
        self.input_norm = self.tap_norms = None
        if norm_before_fc:
            self.input_norm = RMSNorm(len(self.taps) * d, eps)
        if fc_norm:
            self.tap_norms = nn.ModuleList(RMSNorm(d, eps) for _ in self.taps)
        self.fc = Linear(len(self.taps) * d, self.width, bias)
        self.layer = WideLayer(self.config, norm_before_residual)
        self.more = nn.ModuleList(
            Layer(self.config) for _ in range(layers - 1)
        )
        for i, layer in enumerate(self.more, 1):
            layer.index = i
        self.norm = RMSNorm(self.width, eps)
        self.norm_output = norm_output
        self.scales = None if scales is None else tuple(scales)
        self.mix = None
        if mix:
            self.mix, self.own_head = Linear(self.width, self.width), False
            nn.init.zeros_(self.mix.weight)

    @torch.no_grad()
    def start_near(self, target: Llama) -> None:
        """See `Head.start_near`; the highest tap passes through."""
        d = target.config.hidden_size
        if self.width == d and not self.norm_output:
            self.fc.weight[:, :-d].mul_(0.5)
            self.fc.weight[:, -d:].copy_(torch.eye(d))
            self.norm.weight.copy_(target.norm.weight)

    def fuse(self, hidden: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """See `PairHead.fuse`."""
        if self.tap_norms is not None:
            taps = [
                norm(tap)
                for norm, tap in zip(self.tap_norms, taps, strict=True)
            ]
        if self.scales is not None:
            pairs = zip(taps, self.scales, strict=True)
            taps = [tap * scale for tap, scale in pairs]
        joined = torch.cat(tuple(taps), -1)
        if self.input_norm is not None:
            joined = self.input_norm(joined)
        return self.fc(joined)

    def step(self, tokens: Tensor, features: Tensor, at: Attend) -> Tensor:
        """See `PairHead.step`."""
        x = self.layer(self.embed(tokens), features, at)
        for layer in self.more:
            x = layer(x, at)
        return self.norm(x) if self.norm_output else x

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """See `Head.project`; the norm is not fed back, unless it is."""
        x = out if self.norm_output else self.norm(out)
        return self.head(x if self.mix is None else x + self.mix(x))

    @torch.no_grad()
    def fold(self) -> None:
        """Move ``scales`` into ``fc``: the same head in published form."""
        if self.scales is not None:
            parts = self.fc.weight.split(self.fc.weight.shape[1]
                                         // len(self.scales), 1)
            pairs = zip(parts, self.scales, strict=True)
            self.fc.weight.copy_(torch.cat([w * s for w, s in pairs], 1))
        self.scales = None

    @torch.no_grad()
    def merge(self) -> None:
        """Turn ``rows (I + M)`` into a head of its own."""
        if self.mix is not None:
            rows = self.head.weight
            rows.copy_(rows + rows @ self.mix.weight)
            self.mix, self.own_head = None, True
