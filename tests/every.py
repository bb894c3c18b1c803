"""Every method of the registry on small models, and what they must equal.

A method that is added to the registry is tested here without a change.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import heads
import tiny
import torch
import toy_vocab

from specref.heads import files
from specref.heads.base import Head
from specref.lm.llama import Llama
from specref.lm.weights import from_transformers
from specref.registry import methods

ACCEPT = [0.6, 0.2, 0.1, 0.05]


def near(
    noise: float = 0.03, seed: int = 1, family: str = "llama", **sizes: Any
) -> Any:
    """transformers' side of `tiny.llama` with noise: a draft that agrees
    with it often, not always."""
    model = tiny.hf_model(family, **sizes)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(
                torch.randn(
                    weight.shape, generator=source, dtype=torch.float64
                ),
                alpha=noise,
            )
    return model


def draft(noise: float = 0.03, seed: int = 1) -> Llama:
    """`near` as our own decoder."""
    return from_transformers(near(noise, seed))


def calls(
    model_draft: Any, lossless: bool = True, copies: bool = True
) -> dict[str, dict[str, Any]]:
    """Name -> options of every method, small enough for tiny models.

    Args:
        copies: include methods that need a `Llama`: they quantise it, cut
            it or read its features.
    """
    out = {}
    for m in methods():
        if m.lossless is not lossless:
            continue
        own = {"int4", "int8", "early_exit"} & {m.name}
        headed = "head" in m.options
        if (own or headed) and not copies:
            continue
        options: dict[str, Any] = {}
        if headed:
            options |= headed_options(m.name, m.options)
        if "draft" in m.options and not own:
            options["draft"] = model_draft
        if "layers" in m.options:
            options["layers"] = 2
        if "accept" in m.options and not headed:
            options["accept"] = ACCEPT
        if "tokenizer" in m.options:
            options |= toy_vocab.pair23()
        out[m.name] = options
    return out


@functools.cache
def head_for(kind: str, **sizes: Any) -> Head:
    """A random head of the kind that a method uses, on `tiny.llama`."""
    target = tiny.llama(**sizes)
    words = torch.arange(target.vocab_size).flip(0)[: target.vocab_size - 1]
    options = {
        "eagle3": {"taps": (0, 1, 2)},
        "medusa": {"heads": 2},
        "hydra": {"heads": 2},
        "hydra_pp": {"heads": 2, "prefix": True},
    }.get(kind, {})
    family = {"hydra_pp": "hydra", "hass": "eagle"}.get(kind, kind)
    return heads.randomised(files.build(family, target, words, options))


def headed_options(name: str, takes: Sequence[str]) -> dict[str, Any]:
    """Options of a method that drafts with a head."""
    kind = {"eagle2": "eagle", "fr_spec": "eagle", "glide_cape": "glide",
            "medusa_typical": "medusa"}.get(name, name)
    out: dict[str, Any] = {"head": copy.deepcopy(head_for(kind))}
    if "vocab" in takes:
        out["vocab"] = 15 if name == "fr_spec" else None
    if "shape" in takes:
        out["shape"] = (-1, -1, 0, 0, 1)
    return out


@torch.inference_mode()
def greedy_reference(lm: Any, prompt: list[int], count: int) -> list[int]:
    """Plain greedy decoding, each token from a forward over everything."""
    row = list(prompt)
    for _ in range(count):
        cache = lm.new_cache(1, len(row))
        logits = lm.forward(torch.tensor([row]), cache).logits[0, -1]
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


class Counting:
    """An `LM` that counts its forwards, prefill apart."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.vocab_size, self.device = lm, lm.vocab_size, lm.device
        self.eos = getattr(lm, "eos", ())
        self.calls = self.prefills = 0

    def new_cache(self, batch: int, capacity: int) -> Any:
        return self.lm.new_cache(batch, capacity)

    def forward(self, tokens, cache, parents=None, taps=(), logits=True):
        if logits:
            self.calls += 1
        else:
            self.prefills += 1
        return self.lm.forward(tokens, cache, parents, taps, logits)
