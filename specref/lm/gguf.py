"""From a Llama-family GGUF file to the files transformers writes.

Reading and dequantising are the ``gguf`` package's; here are only the
names, the rotary layout and the tokenizer.
Does not handle: architectures other than llama, vocabularies other than
byte-level BPE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def convert(gguf: Path, folder: Path) -> None:
    """Write config, float32 safetensors and tokenizer into ``folder``."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(
            f"{gguf.name} must hold a llama architecture, got "
            f"{fields['general.architecture']!r}"
        )
    folder.mkdir(parents=True)
    config = _config(fields, reader)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    state = _tensors(reader, config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(fields).save_pretrained(folder)


def _config(fields: dict[str, Any], reader: Any) -> dict[str, Any]:
    def size(key: str) -> Any:
        return fields[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": size("vocab_size"),
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": size("attention.head_count"),
        "num_key_value_heads": size("attention.head_count_kv"),
        "max_position_embeddings": size("context_length"),
        # The file stores float32; the configuration it came from says 1e-5.
        "rms_norm_eps": float(
            f"{size('attention.layer_norm_rms_epsilon'):.6g}"
        ),
        "rope_theta": size("rope.freq_base"),
        "tie_word_embeddings": not any(
            t.name == "output.weight" for t in reader.tensors
        ),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tensors(reader: Any, config: dict[str, Any]) -> dict[str, Tensor]:
    from gguf.quants import dequantize

    out = {}
    for t in reader.tensors:
        value = np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)
        base = t.name.removesuffix(".weight")
        if base.startswith("blk."):
            _, layer, part = base.split(".")
            name = f"model.layers.{layer}.{_LAYER[part]}.weight"
            heads = {
                "attn_q": config["num_attention_heads"],
                "attn_k": config["num_key_value_heads"],
            }.get(part)
            if heads:
                value = _half_split(value, heads)
        else:
            name = f"{_TOP[base]}.weight"
        out[name] = torch.from_numpy(np.ascontiguousarray(value))
    return out


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from interleaved rotary pairs (GGUF) to split halves."""
    rows, cols = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, cols)
    return pairs.swapaxes(1, 2).reshape(rows, cols)


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    vocab = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # The file records the pre-tokenizer by name ("smollm") only: digits one
    # by one, then byte level.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [
        words[i]
        for i, kind in enumerate(fields["tokenizer.ggml.token_type"])
        if kind == 3  # control tokens
    ]

    def name(key: str) -> str:
        return words[fields[f"tokenizer.ggml.{key}_token_id"]]

    out = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=name("bos"),
        eos_token=name("eos"),
        unk_token=name("unknown"),
        pad_token=name("padding"),
        additional_special_tokens=special,
    )
    out.chat_template = fields["tokenizer.chat_template"]
    return out
