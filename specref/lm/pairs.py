"""A draft with a tokenizer of its own: by name, from a file, from a user.

``other`` is trained for the embedded target (`specref.train.other`): a
small `Llama` with its own embedding, in bf16 safetensors, and its tokenizer
beside it in the format of the ``tokenizers`` package.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from specref.lm.drafts import WEIGHTS, resolve
from specref.lm.llama import Llama, LlamaConfig
from specref.lm.vocab import Vocab, vocab_of
from specref.lm.wrap import unwrap

OTHERS = {"other": "draft-other"}
_made: dict[tuple, tuple[Llama, Vocab]] = {}


@dataclass(frozen=True)
class Pair:
    """A draft `LM` and both vocabularies, the target's first."""

    lm: Any
    source: Vocab
    into: Vocab


def pair(
    target: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any = None
) -> Pair:
    """What ``draft`` means for this target.

    Args:
        target: an `LM`.
        draft: ``other``; the path of a ``.safetensors`` file of `save_own`;
            what `specref.load` returns; any name of `drafts.resolve` (the
            target's tokenizer); or an `LM` with ``draft_tokenizer``.
        tokenizer: the target's, as `vocab_of` takes it.
        draft_tokenizer: the draft's, where it is not known.
    Raises:
        ValueError: a tokenizer is missing or has more tokens than its
            model.
    """
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be the target's for a draft with another one: "
            "pass tokenizer=..., or a target from specref.load"
        )
    source = vocab_of(tokenizer)
    _fits("tokenizer", source, "target", target.vocab_size)
    lm, own = _model(draft, target)
    known = own if draft_tokenizer is None else draft_tokenizer
    if known is None and isinstance(draft, str | Path):
        known = source  # drafts by name share the target's
    if known is None:
        raise ValueError(
            "draft_tokenizer must be given with a draft that has none of "
            "its own: pass draft_tokenizer=..., or what specref.load returns"
        )
    into = vocab_of(known)
    _fits("draft_tokenizer", into, "draft", lm.vocab_size)
    return Pair(lm, source, into)


def _fits(name: str, vocab: Vocab, owner: str, size: int) -> None:
    if len(vocab) > size:
        raise ValueError(
            f"{name} has {len(vocab)} tokens, the {owner} {size}: give the "
            f"tokenizer that belongs to the {owner}"
        )


def _model(draft: Any, target: Any) -> tuple[Any, Any]:
    """The draft `LM` and its tokenizer, None where it is not known."""
    if not isinstance(draft, str | Path):
        return unwrap(draft)
    name = str(draft)
    file = WEIGHTS / f"{OTHERS[name]}.safetensors" if name in OTHERS else None
    if file is None and name.endswith(".safetensors"):
        file = Path(name) if tokenizer_file(Path(name)).exists() else None
    if file is None:
        return resolve(draft, target), None
    dtype = getattr(target, "dtype", torch.float32)
    key = (str(file), str(target.device), dtype)
    if key not in _made:
        _made[key] = load_own(file, target.device, dtype)
    return _made[key]


def tokenizer_file(file: Path) -> Path:
    """Where the tokenizer of a weight file lies."""
    return file.with_name(f"{file.stem}.tokenizer.json")


def load_own(
    file: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Llama, Vocab]:
    """A draft with its own embedding, and its vocabulary.

    Raises:
        ValueError: a file is missing, altered or of another kind.
    """
    from safetensors import SafetensorError, safe_open
    from tokenizers import Tokenizer

    from specref.lm.weights import assign, empty

    for part in (file, tokenizer_file(file)):
        if not part.exists():
            raise ValueError(
                f"draft file {part} does not exist: train one with `specref "
                "train other`, or give the path of one"
            )
    try:
        with safe_open(file, "pt") as f:
            meta = f.metadata() or {}
            state = {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"weight file {file.name} is truncated or altered ({error})"
        ) from error
    try:
        config = LlamaConfig(**json.loads(meta["config"]))
        eos = tuple(json.loads(meta["eos"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"weight file {file.name} holds no draft of its own tokenizer "
            f"({error}): it was not written by specref train other"
        ) from error
    model = assign(empty(config, dtype, str(device)), state)
    model.eos = eos
    if model.device.type == "cpu":
        model.pack()
    tokenizer = Tokenizer.from_file(str(tokenizer_file(file)))
    return model, vocab_of(tokenizer)


def save_own(
    model: Llama,
    tokenizer: Any,
    file: Path,
    about: dict[str, Any] | None = None,
) -> None:
    """Write a draft with its own embedding, in bf16, and its tokenizer.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        about: kept in the header, for people.
    """
    from safetensors.torch import save_file

    named = dict(model.named_parameters())  # a tied head is no second one
    state = {n: w.detach().bfloat16().contiguous() for n, w in named.items()}
    meta = {
        "config": json.dumps(asdict(model.config)),
        "eos": json.dumps(list(model.eos)),
        "about": json.dumps(about or {}),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file(state, part, meta)
    tokenizer.save(str(tokenizer_file(file)), pretty=False)
    part.rename(file)
