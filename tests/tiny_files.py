"""Tiny models on disk: a GGUF file, and the folder it is converted to."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import tiny
import torch
import transformers
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END]
MERGES = ["t h", "th e", "Ġ the"]
WORDS = [
    *SPECIAL,
    *sorted(ByteLevel.alphabet()),
    *(m.replace(" ", "") for m in MERGES),
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\\n' }}"
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def model(tied: bool = True) -> transformers.PreTrainedModel:
    """A transformers Llama whose matrices fit quantisation groups."""
    return tiny.hf_model(
        vocab_size=len(WORDS),
        intermediate_size=64,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    ).float()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them: i, i + d/2 side by side."""
    rows = weight.reshape(heads, -1, weight.shape[1])
    half = rows.shape[1] // 2
    out = np.empty_like(rows)
    out[:, 0::2], out[:, 1::2] = rows[:, :half], rows[:, half:]
    return out.reshape(weight.shape)


def gguf_name(name: str) -> str:
    base = name.removesuffix(".weight")
    if not base.startswith("model.layers."):
        return f"{NAMES[base]}.weight"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def write_gguf(
    file: Path,
    source: transformers.PreTrainedModel,
    kind: gguf.GGMLQuantizationType | None = None,
    architecture: str = "llama",
) -> dict[str, bytes]:
    """A GGUF file with the model's weights, matrices quantised to ``kind``.

    Returns the raw bytes of each quantised tensor, by its name there.
    """
    c = source.config
    w = gguf.GGUFWriter(file, architecture)
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(10_000.0)
    w.add_tokenizer_model("gpt2")
    w.add_token_list(WORDS)
    w.add_token_types([3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)))
    w.add_token_merges(MERGES)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_pad_token_id(2)
    w.add_chat_template(CHAT)
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    raw = {}
    for name, tensor in source.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        theirs, value = gguf_name(name), tensor.float().numpy()
        part = theirs.split(".")[-2]
        if part in heads:
            value = interleave(value, heads[part])
        if kind is None or value.ndim == 1:
            w.add_tensor(theirs, value)
            continue
        packed = quantize(value, kind)
        raw[theirs] = packed.tobytes()
        w.add_tensor(theirs, packed, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return raw


def write_folder(folder: Path) -> Path:
    """A model folder with a tokenizer, as `specref.load` takes it."""
    from specref.lm.gguf import convert

    file = folder.with_suffix(".gguf")
    write_gguf(file, model())
    convert(file, folder)
    file.unlink()
    return folder


def logits(
    source: transformers.PreTrainedModel, ids: torch.Tensor
) -> torch.Tensor:
    with torch.inference_mode():
        return source(ids).logits
