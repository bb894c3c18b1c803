"""What several layouts need: sizes, vocabularies, embeddings, taps.

**Taps.**  A tap is an index into transformers' ``hidden_states``: tap ``t``
is what *enters* layer ``t`` (`specref.lm.base.Output`), which is what comes
out of layer ``t - 1``.  Files say it in two ways.  EAGLE's own code, vLLM and
speculators count what enters; SpecForge and the NVIDIA heads name the layer
that it comes out of, so that one is added here.  A list that begins with 1
is of the second kind (the rule of SGLang, pull request 25454), except in the
speculators format, which defines the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from specref.heads.base import Head
from specref.heads.eagle3 import default_taps
from specref.interchange.layouts import expect
from specref.lm.llama import Llama, LlamaConfig
from specref.lm.weights import config_from_hf

TAPS = "eagle_aux_hidden_state_layer_ids"


def sizes(raw: Mapping[str, Any], target: Llama) -> LlamaConfig:
    """The config of the head's layers.

    Biases are what the file says, whatever the family: EAGLE's code reads
    ``qkv_bias``, others ``attention_bias``.

    Raises:
        ValueError: another vocabulary than the target's, or an option that
            the library's layers lack.
    """
    every = raw.get("attention_bias", False)
    config = replace(
        config_from_hf(raw),
        qkv_bias=bool(raw.get("qkv_bias", every)),
        o_bias=bool(every),
    )
    same("vocab_size", config.vocab_size, target.vocab_size)
    if config.sliding_window is not None:
        raise ValueError(
            "a head with a sliding window is not handled, got "
            f"{config.sliding_window}"
        )
    return config


def same(name: str, mine: int, theirs: int) -> None:
    """Raises ValueError when a size of the head is not the target's."""
    if mine != theirs:
        raise ValueError(
            f"the head has {name} {mine}, the target {theirs}: it was "
            "trained for another target"
        )


def taps(
    raw: Mapping[str, Any], layers: int, entering: bool = False
) -> tuple[int, ...]:
    """The head's taps in the library's convention (see the module).

    Args:
        layers: of the target.
        entering: the format counts what enters, whatever the first is.
    """
    nested = raw.get("eagle_config") or {}
    if not nested.get("use_aux_hidden_state", True):
        raise ValueError(
            "a head with use_aux_hidden_state false reads the last feature "
            "only: this kind is not handled"
        )
    ids = raw.get(TAPS) or nested.get(TAPS)
    if not ids:
        return default_taps(layers)
    leaving = ids[0] == 1 and not entering
    return tuple(i + 1 if leaving else i for i in ids)


def all_words(target: Llama) -> Tensor:
    """``[V]`` every token, in order."""
    return torch.arange(target.vocab_size)


def from_offsets(d2t: Tensor) -> Tensor:
    """``[v]`` token ids of a draft vocabulary: number ``i`` is the token
    ``i + d2t[i]`` (an offset, not an id)."""
    return torch.arange(len(d2t)) + d2t.long().cpu()


def to_offsets(words: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """``d2t`` ``[v]`` int64 and ``t2d`` ``[V]`` bool of ascending words."""
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[words] = True
    return words - torch.arange(len(words)), t2d


def draft_words(
    raw: Mapping[str, Any], tensors: dict[str, Tensor], target: Llama
) -> Tensor:
    """``[v]`` the draft vocabulary; takes ``d2t`` and ``t2d`` out.

    Raises:
        ValueError: sizes that do not fit, ids outside the vocabulary, or
            maps that contradict each other.
    """
    top = target.vocab_size
    size = raw.get("draft_vocab_size") or top
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if d2t is None:
        if size != top:
            raise ValueError(
                f"checkpoint lacks tensor 'd2t', which a draft vocabulary "
                f"of {size} needs beside a target's {top}"
            )
        return all_words(target)
    expect({"d2t": d2t}, "d2t", (size,))
    words = from_offsets(d2t)
    if t2d is not None:
        expect({"t2d": t2d}, "t2d", (top,))
        said = t2d.cpu().nonzero().squeeze(-1)
        if torch.equal(said, d2t.long().cpu()) and not torch.equal(
            said, words
        ):
            raise ValueError(
                "d2t must hold offsets (token id minus draft number), got "
                "the token ids themselves"
            )
        if not torch.equal(said, words.sort().values):
            raise ValueError("d2t and t2d name different draft vocabularies")
    if (
        len(words.unique()) != size
        or not 0 <= words.min() <= words.max() < top
    ):
        raise ValueError(
            f"d2t must map to different token ids below {top}, got ids from "
            f"{int(words.min())} to {int(words.max())}"
        )
    return words


def take_embedding(
    head: Head,
    tensors: dict[str, Tensor],
    target: Llama,
    name: str = "embed_tokens.weight",
) -> None:
    """Give the head its embedding: the target's, or the checkpoint's own
    where that differs.

    Raises:
        ValueError: a wrong shape, or none where the widths differ.
    """
    given = tensors.pop(name, None)
    theirs = target.embed.weight
    if given is None:
        if head.width != theirs.shape[1]:
            raise ValueError(
                f"checkpoint lacks tensor {name!r}, which a head of width "
                f"{head.width} needs beside a target's {theirs.shape[1]}"
            )
        return
    expect({name: given}, name, (target.vocab_size, head.width))
    given = given.to(theirs.device, theirs.dtype)
    if given.shape == theirs.shape and torch.equal(given, theirs):
        return
    head.embed = nn.Embedding.from_pretrained(given, freeze=True)


def refuse(raw: Mapping[str, Any], wanted: Sequence[tuple[str, Any]]) -> None:
    """Raises ValueError for a field whose value is another than the one
    that is handled (absent is fine)."""
    for name, value in wanted:
        if raw.get(name, value) != value:
            raise ValueError(
                f"{name} must be {value!r}, the only kind that is handled, "
                f"got {raw[name]!r}"
            )
