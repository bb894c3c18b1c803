"""Published heads in plain torch, written apart from the library.

Each class keeps the module names of the published code, so that its
``state_dict`` is a checkpoint, and has a plain forward to compare with.
``forward(target, tokens, hidden, taps)`` returns logits of what follows
``tokens[:, 1:]``, one tensor per depth; tokens beyond the text are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from specref.lm.llama import Llama


def hf_config(target: Llama, **changes: object) -> LlamaConfig:
    """A transformers config of one layer like the target's."""
    c = target.config
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    config = LlamaConfig(**{**sizes, **changes})
    config._attn_implementation = "eager"
    return config


def plain_config(config: LlamaConfig) -> dict[str, object]:
    """The JSON that goes beside the weights."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    out = {name: getattr(config, name) for name in names}
    return {**out, "model_type": "llama", "attention_bias": False}


def causal(n: int, dtype: torch.dtype) -> Tensor:
    mask = torch.full((n, n), -torch.inf, dtype=dtype).triu(1)
    return mask[None, None]


class Eagle1(nn.Module):
    """EAGLE-1: ``fc``, a decoder layer without its first norm."""

    def __init__(self, target: Llama, bias: bool = True) -> None:
        super().__init__()
        self.config = hf_config(target)
        d = self.config.hidden_size
        self.embed_tokens = nn.Embedding(target.vocab_size, d)
        self.fc = nn.Linear(2 * d, d, bias)
        self.layers = nn.ModuleList([LlamaDecoderLayer(self.config, 0)])
        self.layers[0].input_layernorm = nn.Identity()
        self.turn = LlamaRotaryEmbedding(self.config)

    def forward(self, target, tokens, hidden, taps=()):
        e = self.embed_tokens(tokens[:, 1:])
        x = self.fc(torch.cat((e, hidden), -1))
        spots = torch.arange(x.shape[1])[None]
        x = self.layers[0](
            x,
            attention_mask=causal(x.shape[1], x.dtype),
            position_embeddings=self.turn(x, spots),
        )
        return [F.linear(x, target.head.weight)]


class Eagle3(nn.Module):
    """EAGLE-3 in EAGLE's own names."""

    def __init__(
        self, target: Llama, words: list[int], width: int | None = None
    ) -> None:
        super().__init__()
        d_in = target.config.hidden_size
        d = d_in if width is None else width
        c = self.config = hf_config(target, hidden_size=d)
        self.fc = nn.Linear(3 * d_in, d, False)
        self.midlayer = LlamaDecoderLayer(c, 0)
        for name in "qkv":
            old = getattr(self.midlayer.self_attn, f"{name}_proj")
            new = nn.Linear(2 * d, old.out_features, False)
            setattr(self.midlayer.self_attn, f"{name}_proj", new)
        self.midlayer.hidden_norm = LlamaRMSNorm(d, c.rms_norm_eps)
        self.norm = LlamaRMSNorm(d, c.rms_norm_eps)
        self.lm_head = nn.Linear(d, len(words), False)
        self.words, self.turn = words, LlamaRotaryEmbedding(c)
        if d != d_in:
            self.embed_tokens = nn.Embedding(target.vocab_size, d)
        ids = torch.tensor(words)
        self.register_buffer("d2t", ids - torch.arange(len(words)))
        self.register_buffer(
            "t2d", torch.isin(torch.arange(target.vocab_size), ids)
        )

    def forward(self, target, tokens, hidden, taps=()):
        embed = getattr(self, "embed_tokens", target.embed)
        e, f = embed(tokens[:, 1:]), self.fc(torch.cat(taps, -1))
        layer = self.midlayer
        both = (layer.input_layernorm(e), layer.hidden_norm(f))
        spots = torch.arange(e.shape[1])[None]
        x = (
            f
            + layer.self_attn(
                torch.cat(both, -1),
                attention_mask=causal(e.shape[1], e.dtype),
                position_embeddings=self.turn(e, spots),
            )[0]
        )
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        some = self.lm_head(self.norm(x))
        full = some.new_full((*some.shape[:-1], target.vocab_size), -1e300)
        full[..., self.words] = some
        return [full.masked_fill(full == -1e300, -torch.inf)]


class Block(nn.Module):
    """Medusa's and Hydra's residual block."""

    def __init__(self, size: int, told: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(size * (told + 1), size)
        self.res_connection = nn.Identity()
        if told:
            self.res_connection = nn.Linear(size * (told + 1), size)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_connection(x) + F.silu(self.linear(x))


def medusa(target: Llama, heads: int = 3, blocks: int = 2) -> nn.ModuleList:
    """Medusa-1 as its trainer saves it."""
    d, v = target.config.hidden_size, target.vocab_size
    return nn.ModuleList(
        nn.Sequential(
            *(Block(d) for _ in range(blocks)), nn.Linear(d, v, False)
        )
        for _ in range(heads)
    )


def medusa_logits(heads: nn.ModuleList, hidden: Tensor) -> list[Tensor]:
    return [head(hidden) for head in heads]


class Hydra(nn.Module):
    """Hydra, or Hydra++ with its dropouts and its spelling."""

    def __init__(
        self, target: Llama, heads: int = 3, blocks: int = 3, pre: bool = False
    ) -> None:
        super().__init__()
        d, v = target.config.hidden_size, target.vocab_size

        def row(*modules: nn.Module) -> list[nn.Module]:
            return [
                m
                for x in modules
                for m in ([nn.Dropout(0.0), x] if pre else [x])
            ]

        # The square blocks are one module again and again, as released.
        self.hydra_mlp = nn.ModuleList(
            nn.Sequential(*row(Block(d, i + 1)), *row(Block(d)) * (blocks - 1))
            for i in range(heads)
        )
        outputs = [nn.Linear(d, v) for _ in range(heads)]
        self.hydra_lm_head = nn.ModuleList(
            [nn.Sequential(nn.Dropout(0.0), o) for o in outputs]
            if pre
            else outputs
        )
        if pre:
            self.prefix_embeding_layer = LlamaModel(hf_config(target))

    def forward(self, target, tokens, hidden, taps=()):
        n, out = hidden.shape[1], []
        if hasattr(self, "prefix_embeding_layer"):
            hidden = self.prefix_embeding_layer(
                inputs_embeds=hidden, use_cache=False
            ).last_hidden_state
        for i, (mlp, head) in enumerate(
            zip(self.hydra_mlp, self.hydra_lm_head, strict=True)
        ):
            left = n - i
            seen = [hidden[:, :left]] + [
                target.embed(tokens[:, 1 + s : 1 + s + left])
                for s in range(i + 1)
            ]
            out.append(head(mlp(torch.cat(seen, -1))))
        return out


class ReDrafter(nn.Module):
    """ReDrafter; ``lm_head`` is blocks and output in one list."""

    def __init__(self, target: Llama, exit_dim: int, blocks: int = 2) -> None:
        super().__init__()
        d, v = target.config.hidden_size, target.vocab_size
        if exit_dim != 2 * d:
            self.input_proj = nn.Linear(2 * d, exit_dim)
        self.lm_head = nn.Sequential(
            *(Block(exit_dim) for _ in range(blocks)),
            nn.Linear(exit_dim, v, False),
        )
        self.rnn_u, self.rnn_w = nn.Linear(d, d), nn.Linear(d, d, False)
        self.depth = 4

    def forward(self, target, tokens, hidden, taps=()):
        n, out = hidden.shape[1], []
        state = torch.zeros_like(hidden)
        for s in range(self.depth):
            left = n - s
            said = target.embed(tokens[:, 1 + s : 1 + s + left])
            state = F.silu(self.rnn_w(said) + self.rnn_u(state[:, :left]))
            x = torch.cat((hidden[:, :left], state), -1)
            x = self.input_proj(x) if hasattr(self, "input_proj") else x
            out.append(self.lm_head(x))
        return out


class Norm(nn.Module):
    """The MLP speculator's norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x + self.bias


class Speculator(nn.Module):
    """The MLP speculator; tensors are saved behind ``speculator.``."""

    def __init__(
        self,
        target: Llama,
        inner: int,
        heads: int = 3,
        tie: bool = False,
        scale: bool = False,
    ) -> None:
        super().__init__()
        d, v = target.config.hidden_size, target.vocab_size
        self.inner, self.scale = inner, scale

        def many(make):
            one = make()
            return nn.ModuleList(one if tie else make() for _ in range(heads))

        self.emb = many(lambda: nn.Embedding(v, inner))
        later = nn.Linear(inner, inner, False)
        self.proj = nn.ModuleList([nn.Linear(d, inner, False)])
        for _ in range(heads - 1):
            same = later if tie else nn.Linear(inner, inner, False)
            self.proj.append(same)
        self.head = many(lambda: nn.Linear(inner, v, False))
        self.ln = many(lambda: Norm(inner))

    def forward(self, target, tokens, hidden, taps=()):
        heads = len(self.emb)
        kept = 0.5 ** (0.5 / heads)
        emb_weight = ((1 - kept**2) * self.inner / 2) ** 0.5
        n, out, state = hidden.shape[1], [], hidden
        if self.scale:
            state = state * torch.rsqrt(
                state.pow(2).mean(-1, keepdim=True) + 1e-6
            )
            state = state / 2**0.5
        for s in range(heads):
            left = n - s
            said = self.emb[s](tokens[:, 1 + s : 1 + s + left])
            x = self.proj[s](state[:, :left]) + said * emb_weight / kept
            state = F.gelu(self.ln[s](x))
            out.append(self.head[s](state))
        return out
