"""Weights for `Llama`: from safetensors, or from a live transformers model.

Every tensor of the source must be known and every tensor of the model must
be found, with its exact shape; anything else is an error that names it.
Does not handle: pickled checkpoints, quantised checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.lm.llama import Llama, LlamaConfig
from specref.lm.rotary import rotary

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Their names, ours; "#" is the layer.  Fused targets list their parts.
_PLAIN = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.layers.#.input_layernorm.weight": "layers.#.input_norm.weight",
    "model.layers.#.post_attention_layernorm.weight": (
        "layers.#.post_norm.weight"
    ),
    "model.layers.#.self_attn.o_proj.weight": "layers.#.o.weight",
    "model.layers.#.self_attn.o_proj.bias": "layers.#.o.bias",
    "model.layers.#.self_attn.q_norm.weight": "layers.#.q_norm.weight",
    "model.layers.#.self_attn.k_norm.weight": "layers.#.k_norm.weight",
    "model.layers.#.mlp.down_proj.weight": "layers.#.down.weight",
}
_FUSED = {
    "layers.#.qkv": [f"model.layers.#.self_attn.{x}_proj" for x in "qkv"],
    "layers.#.gate_up": [
        f"model.layers.#.mlp.{x}_proj" for x in ("gate", "up")
    ],
}
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Buffers; and the heads that Medusa-2 keeps beside its backbone.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^medusa_head\.")


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """A `LlamaConfig` from the fields of a transformers ``config.json``.

    Raises:
        ValueError: a model family or an option that `Llama` lacks.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {FAMILIES}, got {family!r}: use "
            "specref.lm.HF for other architectures"
        )
    for field in _NEEDED:
        if field not in raw:
            raise ValueError(f"the model's config lacks {field!r}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"hidden_act must be 'silu', got {raw['hidden_act']!r}"
        )
    heads = raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    config = LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate_size=raw["intermediate_size"],
        rope_theta=rope.get("rope_theta", raw.get("rope_theta") or 10_000.0),
        rope_scaling=None if kind == "default" else rope,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        max_position_embeddings=raw.get("max_position_embeddings", 8192),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=raw.get("attention_bias", family == "qwen2"),
        o_bias=raw.get("attention_bias", False),
        qk_norm=family == "qwen3",
        sliding_window=_window(raw),
    )
    rotary(config, "cpu")  # refuses a scaling that it lacks
    return config


def _window(raw: Mapping[str, Any]) -> int | None:
    """The sliding window of all layers, or None.

    Raises:
        ValueError: when layers differ.
    """
    window = raw.get("sliding_window")
    qwen = raw["model_type"].startswith("qwen")
    if window is None or (qwen and not raw.get("use_sliding_window")):
        return None
    layers = raw["num_hidden_layers"]
    kinds = raw.get("layer_types")
    if kinds is None:
        full = raw.get("max_window_layers", 28) if qwen else 0
        kinds = ["full" if i < full else "sliding" for i in range(layers)]
    if len(set(kinds)) > 1:
        raise ValueError(
            "layers must all have the sliding window or none, got "
            f"layer_types {kinds}: use specref.lm.HF"
        )
    return window if kinds[0].startswith("sliding") else None


def _take(source: dict[str, Tensor], name: str) -> Tensor:
    if name not in source:
        raise ValueError(f"weights lack tensor {name!r}")
    return source.pop(name)


def translate(source: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """transformers names -> ours, with q/k/v and gate/up fused.

    Raises:
        ValueError: a tensor that no rule knows, or half of a fused group.
    """
    left, out = dict(source), {}
    for name in [n for n in left if _IGNORED.search(n)]:
        del left[name]
    spots = ["", *map(str, range(layers))]
    for theirs, ours in _PLAIN.items():
        for i in spots[1:] if "#" in theirs else spots[:1]:
            if theirs.replace("#", i) in left:
                out[ours.replace("#", i)] = left.pop(theirs.replace("#", i))
    for ours, parts in _FUSED.items():
        for i in spots[1:]:
            names = [p.replace("#", i) for p in parts]
            for end in ("weight", "bias"):
                if end == "weight" or f"{names[0]}.bias" in left:
                    fused = [_take(left, f"{n}.{end}") for n in names]
                    out[f"{ours.replace('#', i)}.{end}"] = torch.cat(fused)
    if left:
        raise ValueError(f"weights have unknown tensor {min(left)!r}")
    return out


def assign(model: Llama, state: Mapping[str, Tensor]) -> Llama:
    """Copy ``state`` (our names) into ``model``, dtype converted.

    Raises:
        ValueError: missing or unknown tensor, or a wrong shape (both named).
    """
    own = dict(model.named_parameters())
    if model.head.weight is model.embed.weight:
        own.pop("head.weight", None)
        state = {k: v for k, v in state.items() if k != "head.weight"}
    copy_named(own, state)
    return model


def copy_named(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Copy tensors by name, all of them, dtype converted.

    Raises:
        ValueError: missing or unknown tensor, or a wrong shape (both named).
    """
    for name in sorted(own.keys() - state.keys()):
        raise ValueError(f"weights lack tensor {name!r}")
    for name in sorted(state.keys() - own.keys()):
        raise ValueError(f"weights have unknown tensor {name!r}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"tensor {name!r} must have shape {tuple(tensor.shape)}, "
                    f"got {tuple(state[name].shape)}"
                )
            tensor.copy_(state[name])


def empty(config: LlamaConfig, dtype: torch.dtype, device: str) -> Llama:
    """A `Llama` with uninitialised weights (no time spent on random ones)."""
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.head.weight = model.embed.weight
    return model.requires_grad_(False).eval()


def read_safetensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of the model in a folder.

    The files are those of ``model.safetensors.index.json``, else
    ``model.safetensors``, else all ``*.safetensors`` (some repositories
    keep a second copy in another layout).

    Raises:
        ValueError: no file, or a missing, truncated or altered one (named).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = _weight_files(Path(folder))
    if not files:
        raise ValueError(f"no *.safetensors file in {folder}")
    out: dict[str, Tensor] = {}
    for file in files:
        try:
            out.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(
                f"weight file {file.name} is truncated or altered ({error}); "
                f"delete the folder {folder} and fetch the model again"
            ) from error
    return out


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        parts = sorted(set(_read_json(index)["weight_map"].values()))
        for part in parts:
            if not (folder / part).exists():
                raise ValueError(
                    f"weight file {part} of {index.name} is not in {folder}: "
                    "fetch the model again"
                )
        return [folder / part for part in parts]
    if single.exists():
        return [single]
    return sorted(folder.glob("*.safetensors"))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"no {file.name} in {file.parent}: a model folder holds "
            "config.json, safetensors and tokenizer files"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{file.name} in {file.parent} is no JSON ({error}): fetch the "
            "model again"
        ) from error


def from_folder(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Llama:
    """A `Llama` from ``config.json`` and safetensors in ``folder``."""
    raw = _read_json(Path(folder) / "config.json")
    config = config_from_hf(raw)
    model = empty(config, dtype, device)
    state = translate(read_safetensors(folder), config.num_hidden_layers)
    model.eos = eos_ids(raw)
    return assign(model, state)


def from_transformers(
    model: Any, dtype: torch.dtype | None = None, device: str | None = None
) -> Llama:
    """A `Llama` with the weights of a live transformers model."""
    raw = model.config.to_dict()
    config = config_from_hf(raw)
    weight: Callable = model.get_input_embeddings().weight
    out = empty(config, dtype or weight.dtype, device or str(weight.device))
    state = translate(model.state_dict(), config.num_hidden_layers)
    out.eos = eos_ids(raw)
    return assign(out, state)


def eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids of a config: one, several or none."""
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)
