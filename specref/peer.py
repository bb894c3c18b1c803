"""transformers as the peer: the same weights, its own decoding.

Does not handle: batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


def transformers_peer(
    target: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    **extra: Any,
) -> tuple[Any, Callable[[list[int]], list[int]]]:
    """The same weights in transformers, and its plain decoding."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(
        target.folder, dtype=target.lm.dtype
    ).to(target.lm.device)
    peer.eval()
    return peer, _decoder(peer, max_new_tokens, temperature, **extra)


def _decoder(
    peer: Any, max_new_tokens: int, temperature: float, **extra: Any
) -> Callable[[list[int]], list[int]]:
    warm = {"do_sample": False}
    if temperature > 0:
        warm = {"do_sample": True, "temperature": temperature, "top_k": 0}

    def run(ids: list[int]) -> list[int]:
        x = torch.tensor([ids], device=peer.device)
        out = peer.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            **warm,
            **extra,
        )
        return out[0, len(ids) :].tolist()

    return run


def pass_steps(
    peer: Any, sizes: Sequence[int], past: int = 128
) -> dict[int, Callable[[], Any]]:
    """As `timing.pass_steps`, for a transformers model and its cache."""
    from transformers import DynamicCache

    ids = torch.arange(past + max(sizes), device=peer.device)[None] % 1000
    cache = DynamicCache()

    def step(k: int) -> None:
        out = peer(ids[:, past : past + k], past_key_values=cache)
        out.logits[0, -1, 0].item()
        cache.crop(-k)

    with torch.inference_mode():
        peer(ids[:, :past], past_key_values=cache)
    return {k: partial(step, k) for k in sizes}
