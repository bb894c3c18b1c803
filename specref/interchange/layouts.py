"""Allow-lists: which tensor of a layout is which parameter of a head.

A layout is a list of `Entry` made for one built head, whose parameters give
every shape.  Loading walks the list one way and exporting the other, so a
tensor is known to both or to neither.  Whatever a file holds beyond its
list, or lacks of it, is an error that names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specref.heads.base import Head
from specref.heads.eagle3 import WideLayer
from specref.lm.llama import Layer, RMSNorm

# Buffers that old trainers saved and nothing reads.
UNREAD = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout.

    Attributes:
        theirs: its name in the file.
        ours: the head's parameter.
        rows: the part of it, where ours fuses several of theirs.
    """

    theirs: str
    ours: str
    rows: tuple[int, int] | None = None

    def part(self, own: Mapping[str, Tensor]) -> Tensor:
        """The place in the head's parameters ``own``."""
        whole = own[self.ours]
        return whole if self.rows is None else whole[slice(*self.rows)]


def decoder(theirs: str, ours: str, layer: Layer) -> list[Entry]:
    """A decoder layer, in transformers' names behind the prefix ``theirs``.

    A `WideLayer` has EAGLE-3's ``hidden_norm`` too; a first layer without
    a norm at its entrance has no ``input_layernorm``.
    """
    c = layer.config
    q, kv = (
        n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads)
    )
    mlp = layer.down.weight.shape[1]
    fused = [
        ("self_attn.q_proj", "qkv", (0, q)),
        ("self_attn.k_proj", "qkv", (q, q + kv)),
        ("self_attn.v_proj", "qkv", (q + kv, q + 2 * kv)),
        ("self_attn.o_proj", "o", None),
        ("mlp.gate_proj", "gate_up", (0, mlp)),
        ("mlp.up_proj", "gate_up", (mlp, 2 * mlp)),
        ("mlp.down_proj", "down", None),
    ]
    out = []
    for name, mine, rows in fused:
        out.append(
            Entry(f"{theirs}{name}.weight", f"{ours}{mine}.weight", rows)
        )
        if getattr(layer, mine).bias is not None:
            out.append(
                Entry(f"{theirs}{name}.bias", f"{ours}{mine}.bias", rows)
            )
    norms = [("post_attention_layernorm", "post_norm")]
    if isinstance(layer.input_norm, RMSNorm):
        norms.append(("input_layernorm", "input_norm"))
    if isinstance(layer, WideLayer):
        norms.append(("hidden_norm", "feature_norm"))
    if c.qk_norm:
        norms += [(f"self_attn.{x}_norm", f"{x}_norm") for x in "qk"]
    return out + plain(norms, theirs, ours)


def plain(
    pairs: Iterable[tuple[str, str]],
    theirs: str = "",
    ours: str = "",
    ends: Sequence[str] = ("weight",),
) -> list[Entry]:
    """Modules whose parameters have the same names in both."""
    return [
        Entry(f"{theirs}{a}.{end}", f"{ours}{b}.{end}")
        for a, b in pairs
        for end in ends
    ]


def linear(theirs: str, ours: str, module: Any) -> list[Entry]:
    """A linear layer, with its bias if it has one."""
    ends = ("weight",) if module.bias is None else ("weight", "bias")
    return plain([(theirs, ours)], ends=ends)


def parameters(head: Head) -> dict[str, nn.Parameter]:
    """All parameters by every name that they have."""
    return dict(head.named_parameters(remove_duplicate=False))


def fill(
    head: Head,
    table: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    hints: Mapping[str, str] | None = None,
) -> Head:
    """Copy a checkpoint into a head, dtype converted.

    Args:
        hints: what to say besides, when a tensor of this name is missing.
    Raises:
        ValueError: a tensor that the table lacks, one that the file lacks,
            a wrong shape (both shapes named), or two tensors that the
            layout ties and that differ.
    """
    own, hints = parameters(head), hints or {}
    known = {e.theirs for e in table}
    for name in sorted(known - tensors.keys()):
        more = f": {hints[name]}" if name in hints else ""
        raise ValueError(f"checkpoint lacks tensor {name!r}{more}")
    for name in sorted(tensors.keys() - known):
        if not UNREAD.search(name):
            raise ValueError(
                f"checkpoint has unknown tensor {name!r} of shape "
                f"{list(tensors[name].shape)}: this layout has no place "
                "for it"
            )
    done: dict[tuple[int, tuple[int, int] | None], str] = {}
    with torch.no_grad():
        for entry in table:
            place = entry.part(own)
            given = expect(tensors, entry.theirs, place.shape)
            # Tied modules have one parameter and a name for every level.
            spot = id(own[entry.ours]), entry.rows
            first = done.setdefault(spot, entry.theirs)
            if not torch.equal(tensors[first], given):
                raise ValueError(
                    f"tensors {first!r} and {entry.theirs!r} differ, but "
                    "this layout ties them"
                )
            place.copy_(given)
    return head


def dump(head: Head, table: Sequence[Entry]) -> dict[str, Tensor]:
    """The head's parameters under the layout's names, copied."""
    own = parameters(head)
    return {e.theirs: e.part(own).detach().clone().contiguous() for e in table}


def expect(
    tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]
) -> Tensor:
    """The tensor of that name and shape.

    Raises:
        ValueError: missing, or another shape.
    """
    if name not in tensors:
        raise ValueError(f"checkpoint lacks tensor {name!r}")
    found = tensors[name]
    if tuple(found.shape) != tuple(shape):
        raise ValueError(
            f"tensor {name!r} must have shape {list(shape)}, got "
            f"{list(found.shape)}"
        )
    return found


def numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The numbers that ``pattern``'s group takes in the names, from 0 up.

    Raises:
        ValueError: none, or a gap.
    """
    found = {int(m[1]) for n in tensors if (m := re.search(pattern, n))}
    count = len(found)
    if not count or found != set(range(count)):
        raise ValueError(
            f"tensors named like {pattern!r} must be numbered from 0 "
            f"without a gap, got {sorted(found)}"
        )
    return sorted(found)
