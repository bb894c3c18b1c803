"""The fixed evaluation prompts, and what a prompt is.

The set travels with the library; every number of the book that names a
prompt kind was run on it.  Training never sees its sources: see
`specref.train.prompts` for the other side and ``data/LICENCES.md`` for
where each line comes from.

Does not handle: chat formatting or tokens (a tokenizer's business).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

KINDS = ("chat", "code", "summarise", "arithmetic")


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Attributes:
        id: unique in its set.
        kind: one of `KINDS`.
        source: where the text comes from; no source serves both training
            and evaluation.
        licence: SPDX name, or ``public-domain``.
        prompt: the text of the message.
    """

    id: str
    kind: str
    source: str
    licence: str
    prompt: str


@lru_cache(maxsize=1)
def _load() -> tuple[Prompt, ...]:
    file = files("specref") / "data" / "eval_prompts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(Prompt(**json.loads(line)) for line in lines)


def eval_prompts(kind: str | None = None) -> list[Prompt]:
    """The evaluation set, in its fixed order.

    Kinds alternate, so that the first ``4 n`` prompts hold ``n`` of each.

    Args:
        kind: one of `KINDS`; None for all.
    Raises:
        ValueError: for another kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS} or None, got {kind!r}")
    return [p for p in _load() if kind in (None, p.kind)]
