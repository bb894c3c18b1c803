"""Drafts by name: the target's own quantised copies and trained weights.

Trained drafts are safetensors files in bf16 with their config in the
header.  They share the target's embedding, the rows of its output head for
a reduced vocabulary and, if the header says so, its first layers: the files
hold what was trained only.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.lm.linear import Linear
from specref.lm.llama import Llama, LlamaConfig
from specref.lm.wrap import unwrap

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
        lm, _ = unwrap(draft)
    if lm.vocab_size != target.vocab_size:
        raise ValueError(
            f"draft vocabulary {lm.vocab_size} differs from target "
            f"vocabulary {target.vocab_size}: give a draft that shares the "
            "target's tokenizer, or method='universal' or 'tli'"
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


def quantized_copy(
    target: Llama, bits: int | None = 8, wide: bool = True
) -> Llama:
    """The target with bfloat16 activations and rounded weights.

    Args:
        bits: 8 or 4 for weight-only integers (CPU kernels); None for
            bfloat16 weights.
        wide: send prompts through the target's own layers, which take many
            tokens at once faster than the kernels of rounded weights do.
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
    pairs = zip(copy.modules(), target.modules(), strict=True)
    for mine, theirs in pairs:
        if isinstance(mine, Linear):
            mine.quantize(bits, theirs if wide else None)
    return copy


def clone(target: Llama, dtype: torch.dtype) -> Llama:
    """A copy of the weights in another dtype."""
    from specref.lm.weights import assign, empty

    copy = empty(target.config, dtype, str(target.device))
    copy.eos = target.eos
    return assign(copy, dict(target.named_parameters()))


def read_trained(
    file: Path, what: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file that ``specref train`` wrote.

    Raises:
        ValueError: no such file, or an altered one; it says ``what`` it is.
    """
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise ValueError(
            f"{what} file {file} does not exist: train one with `specref "
            "train`, or give the path of one"
        )
    try:
        with safe_open(file, "pt") as f:
            return f.metadata() or {}, {n: f.get_tensor(n) for n in f.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{what} file {file.name} is truncated or altered ({error})"
        ) from error


def load_draft(file: Path, target: Llama) -> Llama:
    """A trained draft, in the target's dtype, with the target's embedding.

    Raises:
        ValueError: no such file, truncated or altered weights, or a draft
            that was trained for another target.
    """
    from specref.lm.weights import copy_named

    meta, state = read_trained(file, "draft")
    if "config" not in meta:
        raise ValueError(
            f"weight file {file.name} holds no draft config: it was not "
            "written by specref train"
        )
    try:
        config = LlamaConfig(**json.loads(meta["config"]))
        shared = list(json.loads(meta.get("shared", "[]")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"weight file {file.name} holds a draft config that does not "
            f"fit ({error})"
        ) from error
    if "head_vocab" not in state:
        raise ValueError(f"weight file {file.name} lacks tensor 'head_vocab'")
    words = state.pop("head_vocab").long()
    _check_shares(file, config, words, shared, target)
    model = skeleton(config, words, target)
    for mine, i in zip(model.layers, shared, strict=False):
        _share(mine, target.layers[i])
    copy_named(_own(model, shared, "head.weight" in state), state)
    return model.pack() if target.device.type == "cpu" else model


def header(file: Path) -> dict[str, Any]:
    """``config``, ``shared`` and ``about`` of a draft file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        meta = f.metadata() or {}
    return {name: json.loads(text) for name, text in meta.items()}


def skeleton(config: LlamaConfig, head_vocab: Tensor, target: Llama) -> Llama:
    """A draft with the target's embedding and head rows, layers empty."""
    with torch.device("meta"):
        model = Llama(config, head_vocab)
    model.embed = target.embed
    weight = target.head.weight.detach()
    model.head_vocab = head_vocab.to(weight.device)
    model = model.to(target.dtype)
    for part in (model.layers, model.norm, model.head):
        part.to_empty(device=weight.device)
    with torch.no_grad():
        model.head.weight.copy_(weight[model.head_vocab])
    model.eos = target.eos
    return model.requires_grad_(False).eval()


def _share(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Let a layer read another's weights (packed ones too)."""
    for a, b in zip(mine.modules(), theirs.modules(), strict=True):
        a._parameters.update(b._parameters)
        if isinstance(a, Linear):
            a._packed = b._packed


def _own(model: Llama, shared: list[int], head: bool) -> dict[str, Tensor]:
    """The parameters that are the draft's own, by name."""
    theirs = ("embed.", *(f"layers.{i}." for i in range(len(shared))))
    theirs = theirs if head else (*theirs, "head.")
    named = model.named_parameters()
    return {n: w for n, w in named if not n.startswith(theirs)}


def save_draft(
    draft: Llama,
    file: Path,
    shared: Sequence[int] = (),
    about: dict[str, Any] | None = None,
    head: bool = False,
) -> None:
    """Write what a draft does not share with its target, in bf16.

    Args:
        shared: the target's layers that the draft's first ones are.
        about: kept in the header, for people.
        head: whether the draft has an output head of its own.
    """
    from safetensors.torch import save_file

    own = _own(draft, list(shared), head)
    state = {n: w.detach().bfloat16().contiguous() for n, w in own.items()}
    state["head_vocab"] = draft.head_vocab.to(torch.int32).cpu()
    meta = {
        "config": json.dumps(asdict(draft.config)),
        "shared": json.dumps(list(shared)),
        "about": json.dumps(about or {}),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file(state, part, meta)
    part.rename(file)


def _check_shares(
    file: Path,
    config: LlamaConfig,
    words: Tensor,
    shared: Sequence[int],
    target: Llama,
) -> None:
    """Refuse a draft whose shared parts the target does not have."""
    for name in ("vocab_size", "hidden_size"):
        mine, theirs = getattr(config, name), getattr(target.config, name)
        if mine != theirs:
            raise ValueError(
                f"draft {file.name} has {name} {mine}, the target {theirs}: "
                "it was trained for another target"
            )
    if not bool(((words >= 0) & (words < config.vocab_size)).all()):
        raise ValueError(
            f"head_vocab of {file.name} must hold token ids in [0, "
            f"{config.vocab_size}), got up to {int(words.max())}"
        )
    most = target.config.num_hidden_layers
    for layer in shared:
        if not 0 <= layer < most:
            raise ValueError(
                f"draft {file.name} shares layer {layer} of a target that "
                f"has {most} layers: it was trained for another target"
            )
