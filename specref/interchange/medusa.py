"""Medusa's layouts: its trainer's, Medusa-2's, and the one vLLM reads.

Uploaded configs say how many heads there are and are often wrong; the
tensors are counted instead.

Does not handle: Medusa-2's tuned backbone, which is another target: load it
with `specref.load` and give it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specref.heads.medusa import Medusa
from specref.interchange import parts
from specref.interchange.layouts import Entry, fill, linear, numbers, plain
from specref.lm.llama import Llama

SECOND = "medusa_head."
BACKBONE = ("model.", "lm_head.")


def medusa_table(head: Medusa) -> list[Entry]:
    """The trainer's names: ``{head}.{block}.linear``, the output last.

    A head that reads the target's output has none of its own.
    """
    out = []
    for i, blocks in enumerate(head.blocks):
        for j in range(len(blocks)):
            ours = f"blocks.{i}.{j}.linear"
            out += linear(f"{i}.{j}.linear", ours, blocks[j].linear)
        if head.outputs is not None:
            theirs = f"{i}.{len(blocks)}"
            out += linear(theirs, f"outputs.{i}", head.outputs[i])
    return out


def vllm_table(head: Medusa, bias: bool, shared: bool) -> list[Entry]:
    """vLLM's names.

    Args:
        bias: whether blocks have biases (``medusa_fc_bias``).
        shared: one output for all heads (``original_lm_head``).
    """
    out = []
    ends = ("weight", "bias") if bias else ("weight",)
    for i, blocks in enumerate(head.blocks):
        for j in range(len(blocks)):
            pair = f"blocks.{i}.layers.{j}", f"blocks.{i}.{j}.linear"
            out += plain([pair], ends=ends)
        output = f"lm_heads.{0 if shared else i}"
        out += plain([(output, f"outputs.{i}")])
    return out


def read_medusa(
    raw: Mapping[str, Any], tensors: dict[str, Tensor], target: Llama
) -> Medusa:
    """Medusa-1's heads, or the ones of a Medusa-2 model.

    Raises:
        ValueError: see `specref.interchange.load.load_head`; a Medusa-2
            model whose backbone is not the target.
    """
    if any(n.startswith(SECOND) for n in tensors):
        tensors = _second(tensors, target)
    heads = len(numbers(tensors, r"^(\d+)\."))
    blocks = len(numbers(tensors, r"^0\.(\d+)\.linear\.weight$"))
    output = f"0.{blocks}.weight" in tensors
    head = Medusa(
        target,
        parts.all_words(target),
        heads=heads,
        blocks=blocks,
        own_head=output,
    ).to(target.device, target.dtype)
    return fill(head, medusa_table(head), tensors)


def _second(tensors: dict[str, Tensor], target: Llama) -> dict[str, Tensor]:
    """The heads of a Medusa-2 model, its backbone compared and dropped."""
    given = tensors.get("model.norm.weight")
    theirs = target.norm.weight
    if given is not None and not (
        given.shape == theirs.shape
        and given.to(theirs.device, theirs.dtype).equal(theirs)
    ):
        raise ValueError(
            "this Medusa-2 checkpoint was trained with a backbone of its "
            "own: give that as the target, specref.load(<the folder>)"
        )
    return {
        n.removeprefix(SECOND): t
        for n, t in tensors.items()
        if not n.startswith(BACKBONE)
    }


def read_vllm(
    raw: Mapping[str, Any], tensors: dict[str, Tensor], target: Llama
) -> Medusa:
    """The layout that vLLM's Medusa reads.

    Raises:
        ValueError: see `specref.interchange.load.load_head`.
    """
    tensors = {n.removeprefix("medusa_heads."): t for n, t in tensors.items()}
    shared = bool(raw.get("original_lm_head", False))
    if shared and "lm_head.weight" in tensors:
        tensors["lm_heads.0.weight"] = tensors.pop("lm_head.weight")
    words = tensors.pop("token_map", None)
    words = parts.all_words(target) if words is None else words.long()
    for name, tensor in tensors.items():
        whole = len(tensor) == target.vocab_size
        if name.startswith("lm_heads.") and whole:
            tensors[name] = tensor[words]
    head = Medusa(
        target,
        words,
        heads=len(numbers(tensors, r"^blocks\.(\d+)\.")),
        blocks=len(numbers(tensors, r"^blocks\.0\.layers\.(\d+)\.")),
        own_head=True,
    ).to(target.device, target.dtype)
    # Without medusa_fc_bias the biases stay at zero, where they start.
    table = vllm_table(head, bool(raw.get("medusa_fc_bias")), shared)
    return fill(head, table, tensors)
