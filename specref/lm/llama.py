"""`Llama`: a decoder small enough to read in one sitting.

RMSNorm, rotary positions, grouped-query attention and SwiGLU: the family
of Llama, SmolLM2, Mistral, Qwen2 (biases) and Qwen3 (query/key norms).
The cache is preallocated; a tree is verified in one pass under an ancestor
mask and its accepted path is committed in place.

Does not handle: mixture of experts, multi-head latent attention, rotary
scaling other than "llama3" and "linear".  Loading weights: `lm.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.lm.base import Output
from specref.lm.cache import StaticCache
from specref.lm.linear import Linear
from specref.lm.rotary import Angles, rotate


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder, with the names transformers gives them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    qkv_bias: bool = False  # Qwen2
    o_bias: bool = False
    qk_norm: bool = False  # Qwen3
    sliding_window: int | None = None  # Mistral


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(nn.Module):
    """One decoder layer: attention and SwiGLU, each with a residual."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.config = c
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        self.input_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.qkv = Linear(c.hidden_size, heads * c.head_dim, c.qkv_bias)
        self.o = Linear(
            c.num_attention_heads * c.head_dim, c.hidden_size, c.o_bias
        )
        self.post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size)
        self.down = Linear(c.intermediate_size, c.hidden_size)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, at: Attend) -> Tensor:
        x = x + self.attention(self.input_norm(x), at)
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def attention(self, x: Tensor, at: Attend) -> Tensor:
        """Grouped-query attention, ``[B, n, d]`` to ``[B, n, d]``."""
        c, (batch, n, _) = self.config, x.shape
        h, kv = c.num_attention_heads, c.num_key_value_heads
        qkv = self.qkv(x).view(batch, n, h + 2 * kv, c.head_dim)
        qk, v = qkv.split((h + kv, kv), 2)
        if c.qk_norm:
            q, k = qk.split((h, kv), 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        q, k = rotate(qk, at.cos, at.sin).split((h, kv), 2)
        k, v = at.store(self.index, k.transpose(1, 2), v.transpose(1, 2))
        # The query heads of a group read the same keys: fold them into the
        # node axis instead of repeating keys and values.
        g = h // kv
        q = q.view(batch, n, kv, g, c.head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(batch, kv, g * n, c.head_dim)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=at.mask(g))
        out = out.view(batch, kv, g, n, c.head_dim).permute(0, 3, 1, 2, 4)
        return self.o(out.reshape(batch, n, h * c.head_dim))


class Attend:
    """What the layers of one forward share: positions, mask, storage."""

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        allowed: Tensor | None,
        cache: StaticCache | None,
    ) -> None:
        self.cos, self.sin = cos.unsqueeze(2), sin.unsqueeze(2)
        self.allowed, self.cache = allowed, cache  # [B, n, span] or None
        self._folded: Tensor | None = None

    def mask(self, group: int) -> Tensor | None:
        """``[B, 1, group * n, span]`` float: 0 where allowed, else -inf."""
        if self.allowed is None:
            return None
        if self._folded is None:
            add = torch.zeros_like(self.allowed, dtype=self.cos.dtype)
            add.masked_fill_(~self.allowed, float("-inf"))
            self._folded = add.repeat(1, group, 1).unsqueeze(1)
        return self._folded

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[B, kv, n, hd]``; returns keys and values to attend to."""
        if self.cache is None:
            return k, v
        return self.cache.write(layer, k, v)


class Llama(nn.Module):
    """The decoder.  See `LM` for the protocol.

    Args:
        config: sizes.
        head_vocab: token ids that the output head covers (a draft's reduced
            vocabulary); logits of all others are ``-inf``.  None is all.
    """

    def __init__(
        self, config: LlamaConfig, head_vocab: Tensor | None = None
    ) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size = c.vocab_size
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Layer(c) for _ in range(c.num_hidden_layers)
        )
        for i, layer in enumerate(self.layers):
            layer.index = i
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        rows = c.vocab_size if head_vocab is None else len(head_vocab)
        self.head = Linear(c.hidden_size, rows)
        if head_vocab is None and c.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.register_buffer("head_vocab", head_vocab, persistent=False)
        self.eos: tuple[int, ...] = ()
        self.angles = Angles(c)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    def new_cache(
        self, batch: int, capacity: int, static: bool = False
    ) -> StaticCache:
        """See `LM.new_cache`; ``static`` as in `StaticCache`."""
        return StaticCache(
            self.config, batch, capacity, self.device, self.dtype, static
        )

    def forward(
        self,
        tokens: Tensor,
        cache: StaticCache | None = None,
        parents: Tensor | None = None,
        taps: Sequence[int] = (),
        logits: bool = True,
        layers: int | None = None,
    ) -> Output:
        """See `LM.forward`.

        ``cache=None`` runs the rows as plain causal sequences (training).
        ``layers=k`` leaves after the first ``k`` layers (early exit).
        """
        x, cos, sin, allowed = self.begin(tokens, cache, parents)
        hidden, kept = self.core(x, cos, sin, allowed, cache, taps, layers)
        if cache is not None:
            cache.close(tokens.shape[1])
        out = self.logits(hidden) if logits else None
        return Output(out, hidden, kept)

    def begin(
        self, tokens: Tensor, cache: StaticCache | None, parents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Embeddings, rotations and mask: all that depends on lengths."""
        if cache is None:
            positions, allowed = _causal(tokens, self.config.sliding_window)
        else:
            positions, allowed = cache.open(tokens, parents)
        cos, sin = self.angles(positions, self.dtype)
        return self.embed(tokens), cos, sin, allowed

    def core(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        allowed: Tensor | None,
        cache: StaticCache | None,
        taps: Sequence[int] = (),
        layers: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layers and the last norm; compiles without a graph break."""
        at = Attend(cos, sin, allowed, cache)
        kept = {}
        for i, layer in enumerate(self.layers[:layers]):
            if i in taps:
                kept[i] = x
            x = layer(x, at)
        kept[len(self.layers)] = x
        return self.norm(x), tuple(kept[t] for t in taps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head: ``[..., d]`` -> ``[..., V]``."""
        out = self.head(hidden)
        if self.head_vocab is None:
            return out
        full = out.new_full((*out.shape[:-1], self.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.head_vocab, out)

    def pack(self) -> Llama:
        """Lay every weight out once for this CPU (inference only)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        return self


def _causal(tokens: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    batch, n = tokens.shape
    where = torch.arange(n, device=tokens.device)
    back = where[:, None] - where
    allowed = back >= 0 if window is None else (back >= 0) & (back < window)
    return where.expand(batch, n), allowed.expand(batch, n, n)
