"""Hydra's layouts: ``mlp`` (Hydra) and ``prefix-mlp`` (Hydra++).

Hydra++ was saved with its dropouts in the sequence, so that every index is
shifted, and its decoder layer is spelt ``prefix_embeding_layer``.  The skip
of the first block is one matrix there; here it is the identity on the first
inputs plus a matrix, so that the identity is taken off.

Does not handle: ungrounded heads, ``hidden_state_offset`` other than 0, the
``eagle-attn`` and ``cross-attn`` kinds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specref.heads.hydra import Hydra
from specref.interchange import parts
from specref.interchange.layouts import (
    Entry,
    decoder,
    fill,
    linear,
    numbers,
    plain,
)
from specref.lm.llama import Llama

PREFIX = "prefix_embeding_layer."
SKIP = re.compile(r"^hydra_mlp\.\d+\.\d+\.res_connection\.weight$")
KINDS = ("mlp", "prefix-mlp")


def hydra_table(head: Hydra) -> list[Entry]:
    """The tensors of a checkpoint; Hydra++ where there is a prefix."""
    shifted = head.prefix is not None
    out = []
    for i, blocks in enumerate(head.blocks):
        for j, block in enumerate(blocks):
            place = 2 * j + 1 if shifted else j
            theirs, ours = f"hydra_mlp.{i}.{place}.", f"blocks.{i}.{j}."
            out += linear(f"{theirs}linear", f"{ours}linear", block.linear)
            if block.skip is not None:
                names = f"{theirs}res_connection", f"{ours}skip"
                out += linear(*names, block.skip)
        theirs = f"hydra_lm_head.{i}" + (".1" if shifted else "")
        out += linear(theirs, f"outputs.{i}", head.outputs[i])
    if shifted:
        out += decoder(f"{PREFIX}layers.0.", "prefix.", head.prefix)
        out += plain([(f"{PREFIX}norm", "prefix_norm")])
    return out


def read_hydra(
    raw: Mapping[str, Any], tensors: dict[str, Tensor], target: Llama
) -> Hydra:
    """Hydra or Hydra++.

    Raises:
        ValueError: see `specref.interchange.load.load_head`.
    """
    parts.refuse(raw, [("grounded_heads", True), ("hidden_state_offset", 0)])
    kind = raw.get("hydra_head_arch", "mlp")
    if kind not in KINDS:
        raise ValueError(
            f"hydra_head_arch must be one of {', '.join(KINDS)}, the kinds "
            f"that are handled, got {kind!r}"
        )
    shifted = any(n.startswith(PREFIX) for n in tensors)
    if shifted != (kind == "prefix-mlp"):
        raise ValueError(
            f"hydra_head_arch is {kind!r}, but the checkpoint has "
            f"{'a' if shifted else 'no'} {PREFIX.rstrip('.')}"
        )
    # The layer is fed features: the embedding of its module is not read.
    tensors.pop(f"{PREFIX}embed_tokens.weight", None)
    places = {
        int(m[1])
        for n in tensors
        if (m := re.match(r"hydra_mlp\.0\.(\d+)\.linear\.weight$", n))
    }
    head = Hydra(
        target,
        parts.all_words(target),
        heads=len(numbers(tensors, r"^hydra_mlp\.(\d+)\.")),
        blocks=max(len(places), 1),
        own_head=True,
        head_bias=True,
        prefix=shifted,
        prefix_norm=shifted,
    ).to(target.device, target.dtype)
    for name in filter(SKIP.match, tensors):
        whole = tensors[name]
        tensors[name] = whole - torch.eye(*whole.shape, dtype=whole.dtype)
    return fill(head, hydra_table(head), tensors)
