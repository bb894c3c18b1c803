"""Heads trained here, in the layouts that serving engines read.

A head's words lie in order of frequency here; files want ascending token
ids, so the rows of the output head are put in that order and the draft
vocabulary is written as offsets (``d2t``) and a mask (``t2d``).

Does not handle: multi-token prediction, Hydra, GLIDE, ReDrafter and the MLP
speculator, which no engine would read back with another vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.heads.base import Head
from specref.heads.eagle import Eagle
from specref.heads.eagle3 import Eagle3, default_taps
from specref.heads.medusa import Medusa
from specref.interchange import files, parts
from specref.interchange.eagle import FLAGS, eagle3_table, eagle_table
from specref.interchange.layouts import dump
from specref.interchange.medusa import medusa_table, vllm_table
from specref.interchange.speculators import KIND
from specref.lm.llama import Llama, LlamaConfig

FORMAT_VERSION = "0.9.0"  # of speculators, whose loader the tests run
ARCHITECTURE = "LlamaForCausalLM"
EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"  # as vLLM and SGLang know it


def export_head(
    head: Head,
    target: Llama,
    folder: str | Path,
    layout: str = "speculators",
    dtype: torch.dtype | None = None,
    verifier: str | None = None,
    draft_tokens: int = 3,
) -> Path:
    """Write a head as config.json and weights; returns the folder.

    Args:
        head: an `Eagle` (``eagle``), `Eagle3` (``eagle3``,
            ``speculators``) or `Medusa` (``medusa``, ``medusa-vllm``).
            Scales and mixes are folded into its weights, which changes
            nothing else.
        target: the model that it drafts for.
        layout: see `specref.interchange.load.LAYOUTS`.
        dtype: of the tensors; the head's own unless given.
        verifier: name or path of the target, for the config.
        draft_tokens: how many tokens a round should draft, for the config.
    Raises:
        ValueError: a layout that cannot hold this head.
    """
    kinds: dict[str, tuple[type, Callable[..., tuple[Any, Any, str]]]] = {
        "eagle": (Eagle, _eagle),
        "eagle3": (Eagle3, _eagle3),
        "speculators": (Eagle3, _speculators),
        "medusa": (Medusa, _medusa),
        "medusa-vllm": (Medusa, _vllm),
    }
    if layout not in kinds:
        raise ValueError(
            f"layout must be one of {', '.join(kinds)}, got {layout!r}"
        )
    kind, make = kinds[layout]
    if not isinstance(head, kind):
        raise ValueError(
            f"layout {layout!r} holds heads of type {kind.__name__}, got "
            f"{type(head).__name__}"
        )
    for step in ("fold", "merge"):
        if hasattr(head, step):
            getattr(head, step)()
    note = {"verifier": verifier, "draft_tokens": draft_tokens}
    raw, tensors, name = make(head, target, note)
    if dtype is not None:
        tensors = {
            k: v.to(dtype) if v.is_floating_point() else v
            for k, v in tensors.items()
        }
    kept = head.dtype if dtype is None else dtype
    raw.setdefault("torch_dtype", str(kept).removeprefix("torch."))
    return files.write(folder, raw, tensors, name)


def layer_fields(c: LlamaConfig) -> dict[str, Any]:
    """A transformers config of the head's layers.

    Raises:
        ValueError: query, key and value have biases and the output has
            none (Qwen2), which no Llama config says.
    """
    if c.qkv_bias != c.o_bias:
        raise ValueError(
            "export handles heads whose attention has biases everywhere or "
            "nowhere: this one has them in "
            f"{'query, key and value' if c.qkv_bias else 'the output'} only"
        )
    rope = c.rope_scaling or {"rope_type": "default"}
    return {
        "model_type": "qwen3" if c.qk_norm else "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},
        "attention_bias": c.qkv_bias,
        "tie_word_embeddings": False,
    }


def _eagle(
    head: Eagle, target: Llama, note: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    tensors = dump(head, eagle_table(head))
    tensors["embed_tokens.weight"] = head.embed.weight.detach().clone()
    raw = layer_fields(head.config)
    raw |= {"architectures": [ARCHITECTURE], "bias": head.fc.bias is not None}
    if head.norms is not None:
        raw["add_para_norm"] = True
    if len(head.words) < head.vocab_size:
        raw["truncated_vocab_size"] = len(head.words)
        tensors["token_map"] = head.words.clone()
    return raw, tensors, "model.safetensors"


def _wide(
    head: Eagle3, target: Llama, first: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What both EAGLE-3 layouts hold."""
    tensors = dump(head, eagle3_table(head, first))
    order = head.words.argsort()
    tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
    if len(order) < head.vocab_size:
        maps = parts.to_offsets(head.words[order].cpu(), head.vocab_size)
        tensors["d2t"], tensors["t2d"] = maps
    theirs = target.config.hidden_size
    raw = {
        "draft_vocab_size": len(order),
        "target_hidden_size": None if head.width == theirs else theirs,
        "norm_before_residual": head.layer.normed,
        "norm_before_fc": head.input_norm is not None,
        "fc_norm": head.tap_norms is not None,
    }
    return raw, tensors


def _eagle3(
    head: Eagle3, target: Llama, note: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    if head.norm_output:
        raise ValueError(
            "layout 'eagle3' cannot say norm_output: use 'speculators'"
        )
    extra, tensors = _wide(head, target, "midlayer.")
    raw = layer_fields(head.config)
    raw |= {"architectures": [EAGLE3_ARCHITECTURE]}
    raw |= {k: v for k, v in extra.items() if k not in FLAGS or v}
    if raw["target_hidden_size"] is None:
        del raw["target_hidden_size"]
    if head.fc.bias is not None:
        raw["bias"] = True
    if head.taps != _defaults(target):
        # A list that begins with 1 would be read as layers left.
        if head.taps[0] == 1:
            raise ValueError(
                "layout 'eagle3' cannot say taps that begin with 1, got "
                f"{list(head.taps)}: use 'speculators'"
            )
        raw[parts.TAPS] = list(head.taps)
    if head.embed is not target.embed:
        tensors["embed_tokens.weight"] = head.embed.weight.detach().clone()
    return raw, tensors, "model.safetensors"


def _defaults(target: Llama) -> tuple[int, ...]:
    layers = target.config.num_hidden_layers
    return default_taps(layers) if layers >= 6 else ()


def _speculators(
    head: Eagle3, target: Llama, note: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    if head.fc.bias is not None:
        raise ValueError("layout 'speculators' has no bias in fc")
    if head.width != target.config.hidden_size:
        raise ValueError(
            f"layout 'speculators' needs the target's width "
            f"{target.config.hidden_size}, the head has {head.width}"
        )
    raw, tensors = _wide(head, target, "layers.0.")
    tensors["embed_tokens.weight"] = head.embed.weight.detach().clone()
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": note["draft_tokens"],
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    raw |= {
        KIND: "eagle3",
        "speculators_version": FORMAT_VERSION,
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": layer_fields(head.config),
        "norm_output": head.norm_output,
        "embed_requires_grad": False,
        parts.TAPS: list(head.taps),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": note["verifier"],
                "architectures": [ARCHITECTURE],
            },
        },
    }
    return raw, tensors, "model.safetensors"


def _outputs(head: Medusa) -> list[Tensor]:
    """The output matrix ``[v, d]`` of every Medusa head."""
    if head.outputs is not None:
        if any(o.bias is not None for o in head.outputs):
            raise ValueError("Medusa's layouts have no bias in the outputs")
        return [o.weight.detach().clone() for o in head.outputs]
    rows = head.head.weight.detach()
    if head.mix is None:
        return [rows.clone() for _ in head.blocks]
    wide = rows.double()
    return [
        (wide + wide @ m.weight.detach().double()).to(rows.dtype)
        for m in head.mix
    ]


def _medusa(
    head: Medusa, target: Llama, note: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    if len(head.words) < head.vocab_size:
        raise ValueError(
            f"layout 'medusa' needs all {head.vocab_size} words, the head "
            f"has {len(head.words)}: use 'medusa-vllm'"
        )
    tensors = dump(head, medusa_table(head))
    order, blocks = head.words.argsort(), len(head.blocks[0])
    for i, output in enumerate(_outputs(head)):
        tensors[f"{i}.{blocks}.weight"] = output[order]
    raw = {
        "medusa_num_heads": len(head.blocks),
        "medusa_num_layers": blocks,
        "base_model_name_or_path": note["verifier"],
        "hidden_size": head.width,
        "vocab_size": head.vocab_size,
    }
    return raw, tensors, "medusa_lm_head.pt"


def _vllm(
    head: Medusa, target: Llama, note: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    table = vllm_table(head, bias=True, shared=False)
    table = [e for e in table if not e.theirs.startswith("lm_heads.")]
    tensors = dump(head, table)
    whole = len(head.words) == head.vocab_size
    order = head.words.argsort()
    for i, output in enumerate(_outputs(head)):
        tensors[f"lm_heads.{i}.weight"] = output[order] if whole else output
    if not whole:
        tensors["token_map"] = head.words.clone()
    raw = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": head.width,
        "vocab_size": head.vocab_size,
        "truncated_vocab_size": len(head.words),
        "num_heads": len(head.blocks),
        "num_hidden_layers": len(head.blocks[0]),
        "medusa_fc_bias": True,
        "original_lm_head": False,
    }
    return raw, tensors, "model.safetensors"
