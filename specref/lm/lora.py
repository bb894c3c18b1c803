"""LoRA: low-rank changes of a decoder's matrices (Hu et al. 2021,
2106.09685).

Medusa-2 (Cai et al. 2024, 2401.10774, section 2.2.2) tunes the backbone
together with its heads.  The tuned backbone is another model: a drafter for
it is lossless with respect to it, not to the model it came from.  While it
is trained the change can be switched off, which gives the teacher; when it
is done the change is added to the weights and nothing is slower.

Does not handle: a change of the embedding or of a tied output head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.lm.linear import Linear
from specref.lm.llama import Llama

PARTS = ("qkv", "o", "gate_up", "down")


class LoRA(nn.Module):
    """``W x + scale * B (A x)``; ``A`` ``[r, inputs]``, ``B`` ``[outputs,
    r]``.  ``B`` starts at zero.

    Args:
        base: the layer that it changes; its weight is not trained.
        scale: alpha / r.
    """

    def __init__(self, base: Linear, rank: int, scale: float) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        self.base, self.scale, self.on = base, scale, True
        kind = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.a = nn.Parameter(torch.zeros(rank, inputs, **kind))
        self.b = nn.Parameter(torch.zeros(outputs, rank, **kind))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.on:
            return out
        return out + F.linear(F.linear(x, self.a), self.b) * self.scale


def attach(
    lm: Llama, rank: int = 8, alpha: float | None = None
) -> dict[str, LoRA]:
    """Give every matrix of every layer of ``lm`` a LoRA, in place.

    Args:
        alpha: the change is ``alpha / rank`` times ``B A``; None is twice
            the rank.
    Returns:
        The LoRAs by name; ``A`` is zero and needs values (`fill`).
    Raises:
        ValueError: a rank below 1, packed weights, or LoRAs already there.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    scale = (2.0 * rank if alpha is None else alpha) / rank
    found: dict[str, LoRA] = {}
    for i, layer in enumerate(lm.layers):
        for part in PARTS:
            base = getattr(layer, part)
            if not isinstance(base, Linear) or base._packed is not None:
                raise ValueError(
                    f"lm must have plain, unpacked layers, layers.{i}.{part} "
                    "is not: load it with pack=False, attach once"
                )
            base.requires_grad_(False)
            found[f"layers.{i}.{part}"] = LoRA(base, rank, scale)
            setattr(layer, part, found[f"layers.{i}.{part}"])
    return found


def fill(loras: dict[str, LoRA], source: Any) -> None:
    """Draw each ``A`` uniformly with deviation ``1 / sqrt(inputs)``.

    Args:
        source: with ``uniform(shape)``, such as `Seeded`.
    """
    with torch.no_grad():
        for lora in loras.values():
            reach = (3.0 / lora.a.shape[1]) ** 0.5
            lora.a.copy_((2.0 * source.uniform(lora.a.shape) - 1.0) * reach)


@contextmanager
def off(loras: dict[str, LoRA]) -> Iterator[None]:
    """The model as it was, inside the block."""
    for lora in loras.values():
        lora.on = False
    try:
        yield
    finally:
        for lora in loras.values():
            lora.on = True


def detach(lm: Llama, loras: dict[str, LoRA], merge: bool = True) -> Llama:
    """Take the LoRAs out again, their change added to the weights."""
    for name, lora in loras.items():
        _, i, part = name.split(".")
        if merge:
            with torch.no_grad():
                lora.base.weight.add_(lora.scale * (lora.b @ lora.a))
        setattr(lm.layers[int(i)], part, lora.base)
    return lm


def save(
    loras: dict[str, LoRA], file: Path, about: dict[str, Any] | None = None
) -> None:
    """Write ``A`` and ``B`` in bf16 safetensors."""
    from safetensors.torch import save_file

    state, scale = {}, None
    for name, lora in loras.items():
        scale = lora.scale
        for part, w in (("a", lora.a), ("b", lora.b)):
            state[f"{name}.{part}"] = w.detach().bfloat16().contiguous()
    meta = {"scale": json.dumps(scale), "about": json.dumps(about or {})}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file(state, part, meta)
    part.rename(file)


def merge_file(lm: Llama, file: Path) -> Llama:
    """Add the change of a LoRA file to the weights of ``lm``, in place.

    Raises:
        ValueError: no such file, an altered one, or one for another model.
    """
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise ValueError(f"LoRA file {file} does not exist: train it first")
    try:
        with safe_open(file, "pt") as f:
            meta = f.metadata() or {}
            state = {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"LoRA file {file.name} is truncated or altered ({error})"
        ) from error
    if "scale" not in meta:
        raise ValueError(f"{file.name} is no LoRA file of specref train")
    scale, weights = float(json.loads(meta["scale"])), _targets(lm)
    _check(state, weights, file)
    with torch.no_grad():
        for name, weight in weights.items():
            a, b = (state[f"{name}.{p}"].to(weight) for p in ("a", "b"))
            weight.data = weight + scale * (b @ a)  # may lie in a file
    return lm


def _targets(lm: Llama) -> dict[str, Tensor]:
    return {
        f"layers.{i}.{part}": getattr(layer, part).weight
        for i, layer in enumerate(lm.layers)
        for part in PARTS
    }


def _check(
    state: dict[str, Tensor], weights: dict[str, Tensor], file: Path
) -> None:
    """Every tensor is there, fits, and none is left over."""
    want = {f"{name}.{p}" for name in weights for p in ("a", "b")}
    for kind, odd in (
        ("lacks", want - set(state)),
        ("has unknown", set(state) - want),
    ):
        if odd:
            raise ValueError(
                f"LoRA file {file.name} {kind} tensors, such as "
                f"{min(odd)!r}: it is for another model"
            )
    for name, weight in weights.items():
        a, b = state[f"{name}.a"], state[f"{name}.b"]
        if [b.shape[0], a.shape[1]] != list(weight.shape):
            raise ValueError(
                f"tensors {name}.a and .b of {file.name} change a matrix of "
                f"shape {[b.shape[0], a.shape[1]]}, the model's is "
                f"{list(weight.shape)}: it is for another model"
            )
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"tensors {name}.a and .b of {file.name} have ranks "
                f"{a.shape[0]} and {b.shape[1]}: they must be equal"
            )
