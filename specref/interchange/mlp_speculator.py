"""The MLP speculator's layout (``mlp_speculator``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specref.heads.mlp_speculator import MLPSpeculator
from specref.interchange import parts
from specref.interchange.layouts import Entry, fill, plain
from specref.lm.llama import Llama

PREFIX = "speculator."
FIELDS = ("vocab_size", "emb_dim", "inner_dim", "n_predict")


def mlp_table(head: MLPSpeculator) -> list[Entry]:
    """The tensors of a checkpoint; tied ones stand there once a level."""
    out = []
    for i in range(head.levels):
        names = [(f"emb.{i}", f"emb.{i}"), (f"proj.{i}", f"proj.{i}")]
        names.append((f"head.{i}", f"outputs.{i}"))
        out += plain(names, PREFIX)
        ends = ("weight", "bias")
        out += plain([(f"ln.{i}", f"ln.{i}")], PREFIX, ends=ends)
    return out


def read_mlp(
    raw: Mapping[str, Any], tensors: dict[str, Tensor], target: Llama
) -> MLPSpeculator:
    """An MLP speculator.

    Raises:
        ValueError: see `specref.interchange.load.load_head`.
    """
    for name in FIELDS:
        if name not in raw:
            raise ValueError(f"config.json lacks {name!r}")
    parts.same("vocab_size", raw["vocab_size"], target.vocab_size)
    parts.same("emb_dim", raw["emb_dim"], target.config.hidden_size)
    head = MLPSpeculator(
        target,
        parts.all_words(target),
        heads=raw["n_predict"],
        inner=raw["inner_dim"],
        tie=bool(raw.get("tie_weights", False)),
        scale_input=bool(raw.get("scale_input", False)),
    ).to(target.device, target.dtype)
    named = {
        n if n.startswith(PREFIX) else PREFIX + n: t
        for n, t in tensors.items()
    }
    return fill(head, mlp_table(head), named)
