"""From `Llama` to transformers: the same weights as a `LlamaForCausalLM`.

For peers that need a transformers model, such as assisted generation with a
draft trained here.  A reduced output vocabulary stays reduced: the head of
the exported model gives every other token the logit ``-inf``.

Does not handle: query/key norms, attention biases, sliding windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specref.lm.llama import Llama


class ReducedHead(nn.Module):
    """An output head over some of the vocabulary, ``-inf`` elsewhere."""

    def __init__(self, weight: Tensor, words: Tensor, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("words", words)
        self.size = size

    def forward(self, hidden: Tensor) -> Tensor:
        out = nn.functional.linear(hidden, self.weight)
        full = out.new_full((*out.shape[:-1], self.size), -torch.inf)
        return full.index_copy_(-1, self.words, out)


def to_transformers(lm: Llama) -> Any:
    """A transformers model with the same logits, on the same device.

    Raises:
        ValueError: a feature that the export does not handle.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    c = lm.config
    if c.qk_norm or c.qkv_bias or c.o_bias or c.sliding_window:
        raise ValueError(
            "export handles plain Llama layers only: this model has query/"
            "key norms, attention biases or a sliding window"
        )
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={
            "rope_type": "default",
            **(c.rope_scaling or {}),
            "rope_theta": c.rope_theta,
        },
        tie_word_embeddings=False,
        eos_token_id=list(lm.eos) or None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(lm.dtype)
    state = _state(lm)
    if lm.head_vocab is None:
        state["lm_head.weight"] = lm.head.weight
    model.load_state_dict(state, strict=lm.head_vocab is None)
    if lm.head_vocab is not None:
        model.lm_head = ReducedHead(
            lm.head.weight.detach(), lm.head_vocab, c.vocab_size
        )
    return model.to(lm.device).eval()


def _state(lm: Llama) -> dict[str, Tensor]:
    c = lm.config
    sizes = [c.num_attention_heads, c.num_key_value_heads]
    heads = [sizes[0] * c.head_dim, sizes[1] * c.head_dim]
    out = {
        "model.embed_tokens.weight": lm.embed.weight,
        "model.norm.weight": lm.norm.weight,
    }
    for i, layer in enumerate(lm.layers):
        to = f"model.layers.{i}."
        q, k, v = layer.qkv.weight.split([heads[0], heads[1], heads[1]])
        gate, up = layer.gate_up.weight.chunk(2)
        out |= {
            f"{to}self_attn.q_proj.weight": q,
            f"{to}self_attn.k_proj.weight": k,
            f"{to}self_attn.v_proj.weight": v,
            f"{to}self_attn.o_proj.weight": layer.o.weight,
            f"{to}mlp.gate_proj.weight": gate,
            f"{to}mlp.up_proj.weight": up,
            f"{to}mlp.down_proj.weight": layer.down.weight,
            f"{to}input_layernorm.weight": layer.input_norm.weight,
            f"{to}post_attention_layernorm.weight": layer.post_norm.weight,
        }
    return out
