"""ReDrafter: a recurrent network that starts from one feature.

Cheng et al. 2024, 2403.09919.  The newest feature ``c`` stays what it is;
a state ``s`` takes in the tokens below it one by one, ``s = SiLU(W e(x) +
U s + b)`` from zero.  Residual blocks and an output read ``[c; s]``.

Does not handle: ReDrafter's beam search, which is a way to grow candidates
and not a part of the head; its cut of the logits to the top 50.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.heads.blocks import ResBlock
from specref.heads.recurrent import Recurrent
from specref.lm.linear import Linear
from specref.lm.llama import Llama


class ReDrafter(Recurrent):
    """The memory is ``[c; s]``, twice the target's width.

    Args:
        blocks: residual blocks before the output.
        exit_dim: their width; twice the target's unless given, and then no
            matrix stands in front of them.
        rnn: whether the state has matrices; without, it is the sum of the
            embeddings.
    """

    own_head = True

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        blocks: int = 2,
        exit_dim: int | None = None,
        rnn: bool = True,
    ) -> None:
        super().__init__(target, words)
        d = self.width
        wide = self.memory = 2 * d
        size = wide if exit_dim is None else exit_dim
        if blocks < 0 or size < 1:
            raise ValueError(
                "blocks must be at least 0 and exit_dim at least 1, got "
                f"{blocks} and {size}"
            )
        self.input_proj = None if size == wide else Linear(wide, size, True)
        self.blocks = nn.ModuleList(
            ResBlock(size, size) for _ in range(blocks)
        )
        self.head = Linear(size, len(words))
        self.rnn_u = Linear(d, d, True) if rnn else None
        self.rnn_w = Linear(d, d) if rnn else None

    def start(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `Recurrent.start`."""
        nothing = torch.cat((hidden, torch.zeros_like(hidden)), -1)
        return self.advance(nothing, tokens, 0)

    def advance(self, memory: Tensor, tokens: Tensor, depth: int) -> Tensor:
        """See `Recurrent.advance`."""
        context, state = memory.chunk(2, -1)
        said = self.embed(tokens)
        if self.rnn_u is None:
            state = said + state
        else:
            state = F.silu(self.rnn_w(said) + self.rnn_u(state))
        return torch.cat((context, state), -1)

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """See `Head.project`."""
        x = out if self.input_proj is None else self.input_proj(out)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
