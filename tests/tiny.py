"""Tiny random models in float64 that the tests share."""

from __future__ import annotations

import torch
import transformers

from specref.lm.llama import Llama
from specref.lm.weights import from_transformers

SIZES = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10_000.0,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 10_000.0,
            }
        },
    ),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "llama-heads": ("Llama", {"num_key_value_heads": 4, "head_dim": 12}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def hf_model(
    family: str = "llama", seed: int = 0, **changes: object
) -> transformers.PreTrainedModel:
    """A float64 transformers model with random weights, norms included."""
    name, extra = FAMILIES[family]
    sizes = {**SIZES, **extra, **changes}
    config = getattr(transformers, f"{name}Config")(**sizes)
    return randomise(
        getattr(transformers, f"{name}ForCausalLM")(config), seed
    )


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights from a seed; vectors too, since ones and zeros hide bugs."""
    source = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(
                weight.shape, generator=source, dtype=torch.float64
            )
            if weight.dim() == 1:
                weight.add_(noise, alpha=0.2)
            else:
                weight.copy_(0.3 * noise)
    return model


def llama(family: str = "llama", seed: int = 0, **changes: object) -> Llama:
    """Our decoder with the same weights."""
    return from_transformers(hf_model(family, seed, **changes))
