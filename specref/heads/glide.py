"""GLIDE: a small decoder that looks into the target's keys and values.

Du et al. 2024, 2402.02082.  A block of self-attention over the tokens, then
attention to the keys and values of the target, then an MLP.  The target has
computed them anyway, for all committed tokens but the last; the draft adds
two matrices, for its queries and for what they find.

Only the last layer is read here.  Its keys and values are one frozen matrix
away from the stream that enters it, so that stream is the head's feature and
the decode loop needs no access to the target's cache.

After a round the accepted tokens are fed again and see what has been
verified by then.  The paper trains on blocks instead (`block_mask`): one
pass, in which a position sees the target up to its block's start; `rollout`
is the exact account of decoding from every position.

Does not handle: other layers than the last, several blocks, dropping the
first positions of a target with a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.heads.base import Head, Text
from specref.heads.pairs import PairState, unroll
from specref.lm.linear import Linear
from specref.lm.llama import Attend, Layer, Llama, LlamaConfig, RMSNorm
from specref.lm.rotary import rotate

OWN, THEIRS = 0, 1  # layers of the state's cache


class Keys(nn.Module):
    """The target's last keys and values, from what enters its last layer.

    A frozen copy of that layer's norm and of two thirds of its projection.
    """

    def __init__(self, target: Llama) -> None:
        super().__init__()
        last, c = target.layers[-1], target.config
        self.heads, self.size = c.num_key_value_heads, c.head_dim
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        rows = 2 * self.heads * self.size
        self.kv = Linear(c.hidden_size, rows, c.qkv_bias)
        self.k_norm = RMSNorm(self.size, c.rms_norm_eps) if c.qk_norm else None
        self.to(target.device, target.dtype)  # before the copy: no rounding
        self.norm.load_state_dict(last.input_norm.state_dict())
        theirs = {n: w[-rows:] for n, w in last.qkv.state_dict().items()}
        self.kv.load_state_dict(theirs)
        if c.qk_norm:
            self.k_norm.load_state_dict(last.k_norm.state_dict())
        self.requires_grad_(False)

    def forward(
        self, stream: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Streams ``[B, n, d]`` at positions with ``cos`` and ``sin``
        ``[B, n, 1, hd]`` to keys and values ``[B, kv, n, hd]``."""
        kv = self.kv(self.norm(stream))
        kv = kv.view(*stream.shape[:2], 2 * self.heads, self.size)
        k, v = kv.chunk(2, 2)
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


class Cross(nn.Module):
    """Attention to keys and values that are not the head's own."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.heads, size = c.num_attention_heads, c.head_dim
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.q = Linear(c.hidden_size, self.heads * size)
        self.o = Linear(self.heads * size, c.hidden_size)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, at: Attend) -> Tensor:
        """``x`` ``[B, n, d]``; ``k``, ``v`` ``[B, kv, span, hd]``; ``at``
        has the queries' positions and which of the span they see."""
        batch, n, _ = x.shape
        q = self.q(self.norm(x)).view(batch, n, self.heads, -1)
        q = rotate(q, at.cos, at.sin).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=at.mask(1), enable_gqa=True
        )
        return self.o(out.transpose(1, 2).reshape(batch, n, -1))


class Glide(Head):
    """One block: self-attention, attention to the target, MLP.

    The target's embedding enters through a matrix (``fc``): where a model
    ties its embeddings, a token's own row is what the output head scores
    highest, and a residual that starts there repeats the token.

    Args:
        width: inner size of the MLP; 7/16 of the target's unless given.
    Raises:
        ValueError: ``width`` below 1.
    """

    def __init__(
        self, target: Llama, words: Tensor, width: int | None = None
    ) -> None:
        super().__init__(target, words, layers=2)  # OWN and THEIRS
        if width is None:
            width = self.config.intermediate_size * 7 // 16
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        c = self.config = replace(self.config, intermediate_size=width)
        self.taps = (target.config.num_hidden_layers - 1,)
        self.theirs = Keys(target)
        self.token_norm = RMSNorm(self.width, c.rms_norm_eps)
        self.fc = Linear(self.width, self.width)
        self.layer = Layer(c)
        self.layer.index = OWN
        self.cross = Cross(c)
        self.norm = RMSNorm(self.width, c.rms_norm_eps)
        # At full scale an untrained output is very sure of wrong words, and
        # the first steps of training go into shrinking it.
        nn.init.constant_(self.norm.weight, 0.5)

    def trained(self) -> dict[str, nn.Parameter]:
        """See `Head.trained`; the target's projection is not."""
        mine = super().trained().items()
        return {n: w for n, w in mine if not n.startswith("theirs.")}

    def fuse(self, hidden: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """What is read of the target: the stream into its last layer."""
        return taps[0]

    def step(
        self, tokens: Tensor, k: Tensor, v: Tensor, at: Attend, see: Attend
    ) -> Tensor:
        """Tokens ``[B, n]`` to outputs ``[B, n, d]``.

        Args:
            k, v: ``[B, kv, span, hd]`` of the target.
            at: who sees which token.
            see: who sees how much of ``span``.
        """
        layer = self.layer
        x = self.fc(self.token_norm(self.embed(tokens)))
        x = x + layer.attention(layer.input_norm(x), at)
        x = x + self.cross(x, k, v, see)
        gate, up = layer.gate_up(layer.post_norm(x)).chunk(2, -1)
        return x + layer.down(F.silu(gate) * up)

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """See `Head.project`."""
        return self.head(self.norm(out))

    def rollout(self, text: Text, depth: int) -> list[Tensor]:
        """See `Head.rollout`.

        Whatever the step, pair ``t`` sees the target up to position ``t``:
        its guesses have no verified keys.  Token ``x_{t+1+s}`` queries from
        position ``t + s``: one place off all the same is what a learned
        query matrix absorbs.
        """
        n = text.tokens.shape[1] - 1
        stream, out, k, v = self.fuse(text.hidden, text.taps), [], None, None
        where = torch.arange(n, device=stream.device)
        known = (where[:, None] >= where).expand(len(stream), n, n)
        for tokens, at in unroll(self, text.tokens[:, 1:], depth):
            if k is None:
                k, v = self.theirs(stream, at.cos, at.sin)
            see = Attend(at.cos.squeeze(2), at.sin.squeeze(2), known, None)
            out.append(self.step(tokens, k, v, at, see))
        return out

    def state(self, batch: int, capacity: int) -> GlideState:
        """See `Head.state`."""
        return GlideState(self, batch, capacity)


class GlideState(PairState):
    """Pairs bring keys of the target; guesses see those that are there."""

    def _step(
        self, tokens: Tensor, features: Tensor, parents: Tensor | None
    ) -> Tensor:
        """New pairs ``[B, n]``, not committed yet."""
        spots, allowed = self.cache.open(tokens, parents)
        cos, sin = self.head.angles(spots, self.head.dtype)
        at = Attend(cos, sin, allowed, self.cache)
        k, v = self.head.theirs(features, at.cos, at.sin)
        k, v = self.cache.write(THEIRS, k, v)
        return self._run(tokens, k, v, at, Attend(cos, sin, allowed, None))

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `State.extend`."""
        device = self.head.device
        tokens, parents = tokens.to(device), parents.to(device)
        spots, allowed = self.cache.open(tokens, parents)
        cos, sin = self.head.angles(spots, self.head.dtype)
        # A row without a pair looks at an empty slot, and is not read.
        length = torch.tensor(self.cache.length, device=device).clamp(min=1)
        slot = torch.arange(max(self.cache.length), device=device)
        known = (slot < length[:, None, None]).expand(*tokens.shape, -1)
        k = self.cache.k[THEIRS, :, :, : len(slot)]
        v = self.cache.v[THEIRS, :, :, : len(slot)]
        at = Attend(cos, sin, allowed, self.cache)
        out = self._run(tokens, k, v, at, Attend(cos, sin, known, None))
        return self.head.logits(out)

    def _run(
        self, tokens: Tensor, k: Tensor, v: Tensor, at: Attend, see: Attend
    ) -> Tensor:
        out = self.head.step(tokens, k, v, at, see)
        self.cache.close(tokens.shape[1])
        return out


def block_mask(n: int, block: int) -> Tensor:
    """GLIDE's training mask ``[n, n]``: true where the draft's token ``i``
    may see the target's key ``j``.

    A block starts at the last committed token, which the target has not
    read yet; its ``block`` tokens see the keys before it.  The first block
    is causal, for a row that sees nothing has no attention.

    Raises:
        ValueError: ``n`` or ``block`` below 1.
    """
    if n < 1 or block < 1:
        raise ValueError(
            f"n and block must be at least 1, got n={n}, block={block}"
        )
    where = torch.arange(n)
    start = where // block * block
    first = (start == 0)[:, None] & (where <= where[:, None])
    return first | (where < start[:, None])
