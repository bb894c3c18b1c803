"""Loading a published head: find its layout, build it, fill it.

The layout is told by config and tensor names together; a folder that fits
none, or two, is refused.  Nothing is skipped in silence: see
`specref.interchange.layouts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specref.heads.base import Head
from specref.interchange import files
from specref.interchange.eagle import read_eagle, read_eagle3
from specref.interchange.hydra import read_hydra
from specref.interchange.medusa import SECOND, read_medusa, read_vllm
from specref.interchange.mlp_speculator import read_mlp
from specref.interchange.redrafter import read_redrafter
from specref.interchange.speculators import KIND, read_speculators
from specref.lm.llama import Llama

EAGLE1 = r"^layers\.0\.self_attn\.q_proj\.weight$"
EAGLE3 = r"^(midlayer\.|layers\.0\.hidden_norm\.)"


@dataclass(frozen=True)
class Layout:
    """How a layout is told, and what reads it.

    Attributes:
        read: ``read(raw, tensors, target)`` builds the head; those with
            ``taps`` take a fourth argument.
        fits: whether config and tensor names are of this layout.
        taps: whether the head reads taps.
    """

    read: Callable[..., Head]
    fits: Callable[[Mapping[str, Any], Iterable[str]], bool]
    taps: bool = False


def _has(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, n) for n in names)


def _bare(raw: Mapping[str, Any]) -> bool:
    return KIND not in raw


LAYOUTS: dict[str, Layout] = {
    "eagle": Layout(
        read_eagle,
        lambda raw, names: (
            _bare(raw)
            and _has(EAGLE1, names)
            and _has(r"^fc\.weight$", names)
            and not _has(EAGLE3, names)
        ),
    ),
    "eagle3": Layout(
        read_eagle3,
        lambda raw, names: _bare(raw) and _has(EAGLE3, names),
        taps=True,
    ),
    "speculators": Layout(
        read_speculators, lambda raw, names: not _bare(raw), taps=True
    ),
    "medusa": Layout(
        read_medusa,
        lambda raw, names: _has(
            rf"^({re.escape(SECOND)})?\d+\.\d+\.linear\.weight$", names
        ),
    ),
    "medusa-vllm": Layout(
        read_vllm,
        lambda raw, names: _has(r"^(medusa_heads\.)?blocks\.\d+\.", names),
    ),
    "hydra": Layout(
        read_hydra, lambda raw, names: _has(r"^hydra_mlp\.", names)
    ),
    "redrafter": Layout(
        read_redrafter,
        lambda raw, names: (
            raw.get("model_type") == "recurrent_drafting_drafter"
        ),
    ),
    "mlp_speculator": Layout(
        read_mlp,
        lambda raw, names: raw.get("model_type") == "mlp_speculator",
    ),
}


def detect(raw: Mapping[str, Any], names: Iterable[str]) -> str:
    """The name of the layout.

    Raises:
        ValueError: none fits, or more than one.
    """
    names = list(names)
    found = [k for k, layout in LAYOUTS.items() if layout.fits(raw, names)]
    if len(found) != 1:
        why = f"fits {' and '.join(found)}" if found else "fits none"
        raise ValueError(
            f"the checkpoint's layout is not clear: it {why} of "
            f"{', '.join(LAYOUTS)}; its first tensors are "
            f"{sorted(names)[:3]}; pass layout="
        )
    return found[0]


def load_head(
    path: str | Path,
    target: Llama,
    layout: str | None = None,
    taps: Sequence[int] | None = None,
) -> Head:
    """A published head, in the target's dtype and on its device.

    Args:
        path: a folder with config.json and weights, or its weight file.
        target: the model that it drafts for.
        layout: a name of `LAYOUTS`; found out unless given.
        taps: what the head reads, as indices into ``hidden_states``,
            against what its config says (see `specref.interchange.parts`).
    Raises:
        ValueError: no such files; an unclear layout; a tensor that is
            unknown, missing or of another shape; sizes of another target;
            an option that is not handled.
        TypeError: a target without features.
    """
    if not isinstance(target, Llama):
        raise TypeError(
            "a head needs a specref Llama as target, got "
            f"{type(target).__name__}: load it with specref.load"
        )
    raw, tensors = files.read(path)
    name = detect(raw, tensors) if layout is None else layout
    if name not in LAYOUTS:
        raise ValueError(
            f"layout must be one of {', '.join(LAYOUTS)}, got {name!r}"
        )
    chosen = LAYOUTS[name]
    if taps is not None and not chosen.taps:
        raise ValueError(f"a head of layout {name!r} reads no taps")
    extra = (taps,) if chosen.taps else ()
    head = chosen.read(raw, tensors, target, *extra)
    return head.requires_grad_(False).eval()
