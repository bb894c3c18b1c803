"""Heads by name and by file.

A head file is safetensors in bf16: what was trained, the head's words (the
most frequent first), and in the header its kind and options.  Published
checkpoints come through `specref.interchange`.
"""

from __future__ import annotations

import copy
import importlib
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.heads.base import Head
from specref.lm.drafts import WEIGHTS, read_trained
from specref.lm.llama import Llama
from specref.lm.weights import copy_named

# Kind -> module and class.
KINDS = {
    "medusa": ("medusa", "Medusa"),
    "hydra": ("hydra", "Hydra"),
    "eagle": ("eagle", "Eagle"),
    "eagle3": ("eagle3", "Eagle3"),
    "mtp": ("mtp", "MTP"),
    "glide": ("glide", "Glide"),
    "redrafter": ("redrafter", "ReDrafter"),
    "mlp_speculator": ("mlp_speculator", "MLPSpeculator"),
}
# One head per target and name: reading and packing one takes time.
_made: weakref.WeakKeyDictionary[Any, dict[Any, Head]] = (
    weakref.WeakKeyDictionary()
)


def build(
    kind: str, target: Llama, words: Tensor, options: Mapping[str, Any]
) -> Head:
    """An untrained head of a kind.

    Raises:
        ValueError: a kind that is none, or a target without features.
    """
    if kind not in KINDS:
        raise ValueError(
            f"kind of head must be one of {', '.join(KINDS)}, got {kind!r}"
        )
    if not isinstance(target, Llama):
        raise TypeError(
            "a head needs a specref Llama as target, got "
            f"{type(target).__name__}: load it with specref.load"
        )
    module, name = KINDS[kind]
    made = getattr(importlib.import_module(f"specref.heads.{module}"), name)
    return made(target, words, **options)


def save_head(
    head: Head,
    file: Path,
    kind: str,
    options: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write what is the head's own.

    Args:
        options: what `build` was called with (scales are folded here).
        about: kept in the header, for people.
    """
    from safetensors.torch import save_file

    if hasattr(head, "fold"):
        head.fold()
    options = {k: v for k, v in options.items() if k != "scales"}
    own = head.trained()
    state = {n: w.detach().bfloat16().contiguous() for n, w in own.items()}
    state["words"] = head.words.to(torch.int32).cpu()
    meta = {
        "kind": kind,
        "options": json.dumps(options),
        "target": json.dumps(_sizes(head)),
        "about": json.dumps(about or {}),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file(state, part, meta)
    part.rename(file)


def _sizes(head: Head) -> dict[str, int]:
    return {"vocab_size": head.vocab_size, "hidden_size": head.width}


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header (JSON fields parsed) and tensors of a head file.

    Raises:
        ValueError: no such file, no head file, or an altered one.
    """
    meta, state = read_trained(file, "head")
    if "kind" not in meta or "words" not in state:
        raise ValueError(
            f"{file.name} is no head of specref train: published "
            "checkpoints are read from their folder"
        )
    fields = {k: json.loads(meta[k]) for k in ("options", "target", "about")}
    return {"kind": meta["kind"], **fields}, state


def load_head(file: Path, target: Llama) -> Head:
    """A trained head in the target's dtype, on its device, for inference.

    Raises:
        ValueError: as `read`; a head for another target; a tensor that is
            missing, unknown or of another shape.
    """
    about, state = read(file)
    words = state.pop("words").long()
    for name, size in about["target"].items():
        mine = getattr(target.config, name)
        if mine != size:
            raise ValueError(
                f"head {file.name} is for a target of {name} {size}, this "
                f"one has {mine}: it was trained for another target"
            )
    options = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in about["options"].items()
    }
    head = build(about["kind"], target, words, options)
    head.to(target.device, target.dtype)
    copy_named(head.trained(), state)
    if hasattr(head, "merge"):
        head.merge()
    return ready(head, target)


def ready(head: Head, target: Llama) -> Head:
    """Frozen, in the target's dtype, on its device, weights laid out.

    The embedding is the target's own and stays as it is.
    """
    head.to(target.device, target.dtype)
    return head.requires_grad_(False).eval().pack()


def resolve_head(
    head: Any, target: Llama, vocab: int | None = None
) -> Head:
    """The head that ``head`` means for this target.

    Args:
        head: a `Head`; the name of a shipped one (``eagle3``); a file of
            ``specref train``; or the folder of a published checkpoint.
        vocab: keep that many of its most frequent words (FR-Spec).
    """
    if isinstance(head, Head):
        if vocab is None:
            return head
        # A copy, but for the embedding: the caller's head stays whole.
        own = copy.deepcopy(head, {id(head.embed): head.embed})
        return own.truncate(vocab)
    made = _made.setdefault(target, {})
    key = str(head), vocab
    if key not in made:
        found = _find(str(head), target)
        if vocab is not None:
            found = found.truncate(vocab).pack()
        made[key] = found
    return made[key]


def _find(name: str, target: Llama) -> Head:
    shipped = WEIGHTS / f"head-{name}.safetensors"
    if shipped.exists():
        return load_head(shipped, target)
    path = Path(name)
    if path.is_dir():
        from specref import interchange

        return ready(interchange.load_head(path, target), target)
    if name.endswith(".safetensors"):
        return load_head(path, target)
    known = sorted(
        f.stem.removeprefix("head-") for f in WEIGHTS.glob("head-*")
    )
    raise ValueError(
        f"unknown head {name!r}: give one of {', '.join(known)}, the "
        ".safetensors file of a head that `specref train` made, the folder "
        "of a published checkpoint, or a Head"
    )
