"""ReDrafter's layout (``recurrent_drafting_drafter``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specref.heads.redrafter import ReDrafter
from specref.interchange import parts
from specref.interchange.layouts import Entry, fill, linear, plain
from specref.lm.llama import Llama

FIELDS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers")


def redrafter_table(head: ReDrafter) -> list[Entry]:
    """The tensors of a checkpoint; the blocks and the output are one
    list there."""
    out = []
    if head.input_proj is not None:
        out += linear("input_proj", "input_proj", head.input_proj)
    for j, block in enumerate(head.blocks):
        names = f"lm_head.{j}.linear", f"blocks.{j}.linear"
        out += linear(*names, block.linear)
    out += plain([(f"lm_head.{len(head.blocks)}", "head")])
    if head.rnn_u is not None:
        out += linear("rnn_u", "rnn_u", head.rnn_u)
        out += linear("rnn_w", "rnn_w", head.rnn_w)
    return out


def read_redrafter(
    raw: Mapping[str, Any], tensors: dict[str, Tensor], target: Llama
) -> ReDrafter:
    """A ReDrafter head.

    Raises:
        ValueError: see `specref.interchange.load.load_head`.
    """
    for name in FIELDS:
        if name not in raw:
            raise ValueError(f"config.json lacks {name!r}")
    parts.same("vocab_size", raw["vocab_size"], target.vocab_size)
    parts.same("hidden_size", raw["hidden_size"], target.config.hidden_size)
    head = ReDrafter(
        target,
        parts.all_words(target),
        blocks=raw["num_draft_layers"],
        exit_dim=raw["exit_dim"],
        rnn=bool(raw.get("rnn", False)),
    ).to(target.device, target.dtype)
    return fill(head, redrafter_table(head), tensors)
