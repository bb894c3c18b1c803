"""The one place that tells apart what users pass as a model."""

from __future__ import annotations

from typing import Any


def unwrap(target: Any) -> tuple[Any, Any]:
    """The `LM` and the tokenizer (or None) of whatever users pass."""
    if hasattr(target, "lm") and hasattr(target, "tokenizer"):
        return target.lm, target.tokenizer
    if hasattr(target, "new_cache"):
        return target, None
    if hasattr(target, "get_input_embeddings"):
        from specref.lm.hf import HF

        return HF(target), None
    raise TypeError(
        "target must be what specref.load returns, a specref.lm model or a "
        f"transformers causal language model, got {type(target).__name__}"
    )
