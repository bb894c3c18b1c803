"""The ``speculators`` layout: one nested config, several kinds of head.

``eagle3`` has the tensors of EAGLE-3 with ``layers.0`` for ``midlayer``,
one or more layers, and flags for where norms stand.  ``eagle`` (the first
releases) is EAGLE-1 with other names.

Does not handle: the kinds that draft in blocks or in parallel (``peagle``,
``dflash``, ``dspark``, ``xpress``), ``mtp``; ``eagle`` with ``layernorms``,
whose last norm the format's own code puts before the output head and vLLM
before the first matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from specref.heads.base import Head
from specref.interchange import parts
from specref.interchange.eagle import FLAGS, build_eagle3, read_eagle
from specref.lm.llama import Llama

KIND = "speculators_model_type"
RENAMED = {"fusion_fc.": "fc.", "transformer.": "layers.0."}
# The trainer keeps the target's own norm and head; they are not the head's.
VERIFIER = ("verifier_norm.weight", "verifier_lm_head.weight")


def read_speculators(
    raw: Mapping[str, Any],
    tensors: dict[str, Tensor],
    target: Llama,
    taps: Sequence[int] | None = None,
) -> Head:
    """A head of a kind that is handled.

    Raises:
        ValueError: another kind, or a config that two readers of this
            format read differently.
    """
    kind = raw.get(KIND)
    readers = {"eagle3": _eagle3, "eagle": _eagle}
    if kind not in readers:
        raise ValueError(
            f"{KIND} must be one of {', '.join(readers)}, the kinds that are "
            f"handled, got {kind!r}"
        )
    layer = raw.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise ValueError("config.json lacks 'transformer_layer_config'")
    return readers[kind](raw, layer, tensors, target, taps)


def _eagle3(
    raw: Mapping[str, Any],
    layer: Mapping[str, Any],
    tensors: dict[str, Tensor],
    target: Llama,
    taps: Sequence[int] | None,
) -> Head:
    if "norm_before_residual" not in raw:
        raise ValueError(
            "config.json lacks 'norm_before_residual', which speculators "
            "then takes for false and vLLM for true: add it"
        )
    for name in VERIFIER:
        tensors.pop(name, None)
    if taps is None:
        layers = target.config.num_hidden_layers
        taps = parts.taps(raw, layers, entering=True)
    flags = {name: bool(raw.get(name)) for name in (*FLAGS, "norm_output")}
    return build_eagle3(raw, layer, tensors, target, taps, flags)


def _eagle(
    raw: Mapping[str, Any],
    layer: Mapping[str, Any],
    tensors: dict[str, Tensor],
    target: Llama,
    taps: Sequence[int] | None,
) -> Head:
    parts.refuse(raw, [("layernorms", False)])
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in RENAMED.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        renamed[name] = tensor
    fields = {**layer, "bias": bool(raw.get("fusion_bias", False))}
    return read_eagle(fields, renamed, target)
