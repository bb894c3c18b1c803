"""What a transformers model must be for `HF`, read off its configuration.

Does not handle: anything that only a forward pass would show.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

FULL, SLIDING = "full_attention", "sliding_attention"


def text_config(model: Any) -> Any:
    """The configuration of the text decoder.

    Raises:
        TypeError: not a transformers model with embeddings.
    """
    if not hasattr(model, "get_input_embeddings") or not hasattr(
        model, "config"
    ):
        raise TypeError(
            "model must be a transformers causal language model, got "
            f"{type(model).__name__}"
        )
    return model.config.get_text_config(decoder=True)


def check(model: Any, config: Any) -> dict[str, str]:
    """Refuse what cannot follow a tree.

    Returns:
        The forward's argument names, each under itself, and under "cache"
        the one that takes the cache.
    Raises:
        ValueError: the message says what the model has or lacks.
    """
    name = type(model).__name__
    known = {key: key for key in inspect.signature(model.forward).parameters}
    known["cache"] = "cache" if "cache" in known else "past_key_values"
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: not supported")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps a recurrent state, which cannot be rolled back "
            "to the accepted tokens: use an attention-only model"
        )
    odd = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if odd:
        raise ValueError(
            f"{name} has layers of type {sorted(odd)}, whose state cannot "
            "be rolled back to the accepted tokens: use a model of full "
            "and sliding attention only"
        )
    lacks = {"attention_mask", "position_ids", known["cache"]} - known.keys()
    if lacks or getattr(config, "alibi", False):
        raise ValueError(
            f"{name} takes no {' or '.join(sorted(lacks)) or 'position_ids'}"
            ", without which a tree of tokens cannot be run"
        )
    kind = getattr(config, "_attn_implementation", "eager")
    if kind not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {kind!r} takes no tree mask: load the model with "
            "attn_implementation='sdpa'"
        )
    _check_dropout(model)
    return known


def _check_dropout(model: Any) -> None:
    rates = [
        m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)
    ] + [getattr(model.config, "attention_dropout", 0.0)]
    if model.training and any(rates):
        raise ValueError("model is in training mode: call model.eval() first")


def windows(config: Any) -> tuple[int | None, set[str]]:
    """The sliding window (None for none) and the kinds of layers."""
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if not types:
        types = {SLIDING} if window else {FULL}
    return (window if SLIDING in types else None), types


def eos_of(model: Any) -> tuple[int, ...]:
    """Tokens that end a text; empty when the model names none."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config(decoder=True).eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
