"""EAGLE's own layouts: EAGLE-1 and -2 (one file format), HASS, EAGLE-3.

EAGLE-1 has no norm at the entrance of its first layer, none at its end, and
no output head: features go in and out as the target's head reads them.  A
config that says nothing about ``bias`` means one in ``fc``.  EAGLE-3 has
both norms, an output head over a draft vocabulary, and reads three taps.

Does not handle: ``use_aux_hidden_state`` false; quantised checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from specref.heads.eagle import Eagle
from specref.heads.eagle3 import Eagle3
from specref.interchange import parts
from specref.interchange.layouts import (
    Entry,
    decoder,
    expect,
    fill,
    linear,
    numbers,
    plain,
)
from specref.lm.llama import Llama

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm")
NO_BIAS = {
    "fc.bias": 'a config without "bias" means one; add "bias": false if '
    "the head was trained without"
}


def eagle_table(head: Eagle) -> list[Entry]:
    """The tensors of an EAGLE-1 checkpoint, its embedding left out."""
    out = linear("fc", "fc", head.fc)
    for i, layer in enumerate(head.layers):
        out += decoder(f"layers.{i}.", f"layers.{i}.", layer)
    if head.norms is not None:
        names = ("embedding_layernorm", "hidden_states_layernorm")
        out += plain((n, f"norms.{i}") for i, n in enumerate(names))
    return out


def eagle3_table(head: Eagle3, first: str = "midlayer.") -> list[Entry]:
    """The tensors of an EAGLE-3 checkpoint, but embedding and vocabulary.

    Args:
        first: how the wide layer is called.
    """
    out = linear("fc", "fc", head.fc) + decoder(first, "layer.", head.layer)
    for i, layer in enumerate(head.more):
        out += decoder(f"layers.{i + 1}.", f"more.{i}.", layer)
    out += plain([("norm", "norm"), ("lm_head", "head")])
    if head.input_norm is not None:
        out += plain([("input_norm", "input_norm")])
    if head.tap_norms is not None:
        names = [f"fc_norm.{i}" for i in range(len(head.tap_norms))]
        out += plain((n, f"tap_norms.{i}") for i, n in enumerate(names))
    return out


def read_eagle(
    raw: Mapping[str, Any], tensors: dict[str, Tensor], target: Llama
) -> Eagle:
    """An EAGLE-1 or -2 head, or HASS's.

    A ``token_map`` (with ``truncated_vocab_size``) is the head's draft
    vocabulary: tokens it may say, the most frequent first.

    Raises:
        ValueError: see `specref.interchange.load.load_head`.
    """
    config = parts.sizes(raw, target)
    parts.same("hidden_size", config.hidden_size, target.config.hidden_size)
    words = tensors.pop("token_map", None)
    if words is not None and "truncated_vocab_size" in raw:
        size = raw["truncated_vocab_size"]
        expect({"token_map": words}, "token_map", (size,))
    head = Eagle(
        target,
        parts.all_words(target) if words is None else words.long(),
        layers=len(numbers(tensors, r"^layers\.(\d+)\.")),
        bias=raw.get("bias", True),
        norms=bool(raw.get("add_para_norm", False)),
        config=config,
    ).to(target.device, target.dtype)
    parts.take_embedding(head, tensors, target)
    given = tensors.pop("lm_head.weight", None)
    if given is not None:
        _targets_own(given, target)
    return fill(head, eagle_table(head), tensors, NO_BIAS)


def _targets_own(given: Tensor, target: Llama) -> None:
    """Raises ValueError for an output head that is not the target's."""
    theirs = target.head.weight
    expect({"lm_head.weight": given}, "lm_head.weight", theirs.shape)
    if not given.to(theirs.device, theirs.dtype).equal(theirs):
        raise ValueError(
            "tensor 'lm_head.weight' differs from the target's output head, "
            "which EAGLE-1 drafts with: it was trained for another target"
        )


def read_eagle3(
    raw: Mapping[str, Any],
    tensors: dict[str, Tensor],
    target: Llama,
    taps: Sequence[int] | None = None,
) -> Eagle3:
    """An EAGLE-3 head in EAGLE's or vLLM's names.

    Raises:
        ValueError: see `specref.interchange.load.load_head`.
    """
    # SpecForge's flag of this name says that the output is normed before
    # the head reads it, which it always is here.
    parts.refuse(raw, [("norm_output", True)])
    if taps is None:
        taps = parts.taps(raw, target.config.num_hidden_layers)
    flags = {name: bool(raw.get(name, False)) for name in FLAGS}
    flags["bias"] = bool(raw.get("bias", False))
    return build_eagle3(raw, raw, tensors, target, taps, flags)


def build_eagle3(
    raw: Mapping[str, Any],
    layer: Mapping[str, Any],
    tensors: dict[str, Tensor],
    target: Llama,
    taps: Sequence[int],
    flags: Mapping[str, bool],
) -> Eagle3:
    """An EAGLE-3 head from the fields that its layouts share.

    Args:
        layer: the config of its decoder layers.
        flags: options of `Eagle3`.
    """
    config = parts.sizes(layer, target)
    parts.same(
        "target_hidden_size",
        raw.get("target_hidden_size") or target.config.hidden_size,
        target.config.hidden_size,
    )
    words = parts.draft_words(raw, tensors, target)
    head = Eagle3(
        target,
        words,
        taps,
        layers=config.num_hidden_layers,
        config=config,
        **flags,
    ).to(target.device, target.dtype)
    parts.take_embedding(head, tensors, target)
    if "lm_head.weight" not in tensors and len(words) == target.vocab_size:
        # The target's own rows stand in the head already.
        tensors["lm_head.weight"] = head.head.weight.detach().clone()
    # vLLM and speculators count the wide layer as the first of several.
    own = any(name.startswith("midlayer.") for name in tensors)
    first = "midlayer." if own else "layers.0."
    return fill(head, eagle3_table(head, first), tensors)
