"""EAGLE: predict the next feature from the last one and the token drawn.

Li et al. 2024, 2401.15077.  The embedding of the token that was drawn and
the feature it was drawn from are joined by one matrix and go through a
decoder layer; the target's own head turns the predicted feature into
logits.  The token matters: the feature alone does not say which of the
likely tokens came.  EAGLE-2 (2406.16858) grows its tree from the same head;
HASS (2408.15766) trains the same head unrolled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specref.heads.pairs import PairHead
from specref.lm.linear import Linear
from specref.lm.llama import Attend, Layer, Llama, LlamaConfig, RMSNorm


class Eagle(PairHead):
    """``fc([e(x_{t+1}), f_t])``, then decoder layers.

    The first layer has no norm at its entrance, and none stands at the
    exit, as in the published heads.

    Args:
        layers: decoder layers (published heads have one).
        bias: whether ``fc`` has one (it does where configs do not say).
        scales: what embedding and feature are multiplied with while the
            head is trained, so that both enter with about unit size;
            `fold` moves them into ``fc``.
        norms: whether embedding and feature are normed at the entrance
            (HASS's ``add_para_norm``).
        config: sizes of its layers; the target's unless given.
    """

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        layers: int = 1,
        bias: bool = True,
        scales: tuple[float, float] = (1.0, 1.0),
        norms: bool = False,
        config: LlamaConfig | None = None,
    ) -> None:
        super().__init__(target, words, layers, config)
        self.fc = Linear(2 * self.width, self.width, bias)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(layers))
        for i, layer in enumerate(self.layers):
            layer.index = i
        self.layers[0].input_norm = nn.Identity()
        self.scales = scales
        self.norms = None
        if norms:
            eps = self.config.rms_norm_eps
            self.norms = nn.ModuleList(
                RMSNorm(self.width, eps) for _ in range(2)
            )

    @torch.no_grad()
    def start_near(self, target: Llama) -> None:
        """See `Head.start_near`."""
        e, f = self.fc.weight.chunk(2, 1)
        e.mul_(0.5)
        f.copy_(torch.eye(self.width) / self.scales[1])
        # Nothing is normed before it, and features have large entries.
        self.layers[0].qkv.weight.mul_(0.3)

    def step(self, tokens: Tensor, features: Tensor, at: Attend) -> Tensor:
        """See `PairHead.step`."""
        e, f = self.embed(tokens), features
        if self.scales != (1.0, 1.0):
            e, f = e * self.scales[0], f * self.scales[1]
        if self.norms is not None:
            e, f = self.norms[0](e), self.norms[1](f)
        x = self.fc(torch.cat((e, f), -1))
        for layer in self.layers:
            x = layer(x, at)
        return x

    def fold(self) -> None:
        """Move ``scales`` into ``fc``: the same head in published form."""
        with torch.no_grad():
            e, f = self.fc.weight.chunk(2, 1)
            self.fc.weight.copy_(
                torch.cat((e * self.scales[0], f * self.scales[1]), 1)
            )
        self.scales = (1.0, 1.0)
