"""Drafts by name: the target's own quantised copies and trained weights.

Trained drafts are safetensors files in bf16 with their config in the
header; they share the target's embedding, so the files hold the layers and
a reduced output head only.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import torch

from specref.lm.linear import Linear
from specref.lm.llama import Llama, LlamaConfig

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
COPIES = {"int8": 8, "int4": 4, "bf16": None}
TRAINED = {"small": "draft-small", "middle": "draft-middle"}

# One copy per target and name: making one takes seconds and memory.
_made: weakref.WeakKeyDictionary[Any, dict[str, Any]] = (
    weakref.WeakKeyDictionary()
)


def resolve(draft: Any, target: Any) -> Any:
    """The draft `LM` that ``draft`` means for this target.

    Args:
        draft: an `LM`; what `specref.load` returns; ``int8``, ``int4`` or
            ``bf16`` (a copy of the target); ``small`` or ``middle``
            (trained for the embedded target); or a draft file's path.
    Raises:
        ValueError: unknown name, or another vocabulary than the target's.
    """
    if isinstance(draft, str | Path):
        lm = _by_name(str(draft), target)
    else:
        from specref.api import unwrap

        lm, _ = unwrap(draft)
    if lm.vocab_size != target.vocab_size:
        raise ValueError(
            f"draft vocabulary {lm.vocab_size} differs from target "
            f"vocabulary {target.vocab_size}: give a draft that shares the "
            "target's tokenizer"
        )
    return lm


def _by_name(name: str, target: Any) -> Any:
    made = _made.setdefault(target, {})
    if name in made:
        return made[name]
    if name in COPIES:
        lm = quantized_copy(target, COPIES[name])
    elif name in TRAINED:
        lm = load_draft(WEIGHTS / f"{TRAINED[name]}.safetensors", target)
    elif name.endswith(".safetensors"):
        lm = load_draft(Path(name), target)
    else:
        known = ", ".join([*COPIES, *TRAINED])
        raise ValueError(
            f"unknown draft {name!r}: give one of {known}, a .safetensors "
            "file of specref train, or a model"
        )
    made[name] = lm
    return lm


def quantized_copy(target: Llama, bits: int | None = 8) -> Llama:
    """The target with bfloat16 activations and rounded weights.

    Args:
        bits: 8 or 4 for weight-only integers (CPU kernels); None for
            bfloat16 weights.
    Raises:
        TypeError: the target is no `Llama`.
        ValueError: integers on another device than a CPU.
    """
    if not isinstance(target, Llama):
        raise TypeError(
            "a quantised copy needs a specref Llama as target, got "
            f"{type(target).__name__}: pass draft=<a model> instead"
        )
    if bits is not None and target.device.type != "cpu":
        raise ValueError(
            "int8 and int4 copies use CPU kernels; the target is on "
            f"{target.device}: use draft='bf16' or a draft model"
        )
    copy = clone(target, torch.bfloat16)
    if bits is None:
        return copy.pack()
    for module in copy.modules():
        if isinstance(module, Linear):
            module.quantize(bits)
    return copy


def clone(target: Llama, dtype: torch.dtype) -> Llama:
    """A copy of the weights in another dtype."""
    from specref.lm.weights import assign, empty

    copy = empty(target.config, dtype, str(target.device))
    copy.eos = target.eos
    return assign(copy, dict(target.named_parameters()))


def load_draft(file: Path, target: Llama) -> Llama:
    """A trained draft, in the target's dtype, with the target's embedding.

    Raises:
        ValueError: no such file, truncated or altered weights, or a draft
            that was trained for another target.
    """
    from safetensors import SafetensorError, safe_open

    from specref.lm.weights import assign

    if not file.exists():
        raise ValueError(
            f"draft file {file} does not exist: train one with `specref "
            "train`, or give the path of one"
        )
    try:
        with safe_open(file, "pt") as f:
            meta = f.metadata() or {}
            state = {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"weight file {file.name} is truncated or altered ({error})"
        ) from error
    if "config" not in meta:
        raise ValueError(
            f"weight file {file.name} holds no draft config: it was not "
            "written by specref train"
        )
    config = LlamaConfig(**json.loads(meta["config"]))
    _check_shares(file, config, target)
    head_vocab = state.pop("head_vocab").long()
    model = Llama(config, head_vocab).to(target.dtype)
    state["embed.weight"] = target.embed.weight.detach()
    assign(model, state)
    model.embed.weight = target.embed.weight  # shared, not copied
    model.eos = target.eos
    model = model.to(target.device).requires_grad_(False).eval()
    return model.pack() if target.device.type == "cpu" else model


def _check_shares(file: Path, config: LlamaConfig, target: Llama) -> None:
    for name in ("vocab_size", "hidden_size"):
        mine, theirs = getattr(config, name), getattr(target.config, name)
        if mine != theirs:
            raise ValueError(
                f"draft {file.name} has {name} {mine}, the target {theirs}: "
                "it was trained for another target"
            )
