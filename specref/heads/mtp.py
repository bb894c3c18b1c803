"""Multi-token prediction as DeepSeek-V3 builds it (2412.19437, section 2.2).

``M [norm(f_t); norm(e(x_{t+1}))]``, then one decoder layer; embedding and
output head are the target's.  The published model has one such module and
drafts one token; drafting further feeds its own output back, which is also
how it is unrolled in training here.

Does not handle: several modules in a row; training inside pre-training,
which is where the published figures come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specref.heads.pairs import PairHead
from specref.lm.linear import Linear
from specref.lm.llama import Attend, Layer, Llama, RMSNorm


class MTP(PairHead):
    """Norms on both inputs, a matrix, a whole decoder layer, a norm."""

    def __init__(self, target: Llama, words: Tensor) -> None:
        super().__init__(target, words)
        c = self.config
        self.feature_norm = RMSNorm(self.width, c.rms_norm_eps)
        self.token_norm = RMSNorm(self.width, c.rms_norm_eps)
        self.fc = Linear(2 * self.width, self.width)
        self.layer = Layer(c)
        self.layer.index = 0
        self.norm = RMSNorm(self.width, c.rms_norm_eps)

    @torch.no_grad()
    def start_near(self, target: Llama) -> None:
        """See `Head.start_near`."""
        self.fc.weight[:, self.width :].mul_(0.5)
        self.fc.weight[:, : self.width].copy_(torch.eye(self.width))
        # A normed feature is a feature but for its size.
        size = target.norm.weight.square().mean().sqrt()
        self.norm.weight.fill_(float(size))

    def step(self, tokens: Tensor, features: Tensor, at: Attend) -> Tensor:
        """See `PairHead.step`."""
        e = self.token_norm(self.embed(tokens))
        x = self.fc(torch.cat((self.feature_norm(features), e), -1))
        return self.layer(x, at)

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """See `Head.project`."""
        return self.head(self.norm(out))
