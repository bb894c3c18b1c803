"""How well drafts agree with the target on the evaluation prompts.

The target answers the prompts greedily; a draft reads the same text and is
asked at every response position.  ``agree`` is how often its first choice
is the target's, ``alpha`` its mean acceptance at temperature 1.

Does not handle: drafts with features of the target (heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specref.prompts import KINDS, eval_prompts
from specref.train.data import Corpus, Row
from specref.train.respond import Responder


def eval_corpus(
    target: Any, prompts: int = 96, tokens: int = 96
) -> dict[str, Corpus]:
    """The target's greedy answers to the first ``prompts``, by kind."""
    items = eval_prompts()[:prompts]
    ids = [target.encode(p.prompt) for p in items]
    width = min(len(ids), 48)
    answers = Responder(
        target.lm, width, tokens, max(map(len, ids)), temperatures=(0.0,)
    ).answer(ids)
    out = {kind: Corpus([]) for kind in KINDS}
    for r in answers:
        row = Row(
            torch.tensor(r.prompt + r.tokens),
            torch.cat([h.reshape(-1, h.shape[-1]) for h in r.hidden]),
            len(r.prompt),
        )
        out[items[r.number].kind].rows.append(row)
    return out


def everything(target: Any, prompts: int = 96, tokens: int = 96) -> Corpus:
    """The answers of `eval_corpus` as one corpus."""
    parts = eval_corpus(target, prompts, tokens).values()
    return Corpus([r for c in parts for r in c.rows])


@torch.inference_mode()
def agreement(draft: Any, target: Any, corpus: Corpus) -> dict[str, float]:
    """``tokens``, ``agree`` and ``alpha`` over the responses of a corpus.

    Args:
        draft, target: `LM` models of one vocabulary.
    """
    total = torch.zeros(3, dtype=torch.float64)
    for row in corpus.rows:
        spot = slice(row.answer - 1, len(row.tokens) - 1)
        p = target.head(row.hidden[spot].to(target.dtype)).float()
        q = _logits(draft, row.tokens[:-1])[spot].float()
        agree = (p.argmax(-1) == q.argmax(-1)).double().sum()
        alpha = torch.minimum(p.softmax(-1), q.softmax(-1)).double().sum()
        total += torch.stack((torch.tensor(float(len(p))), agree, alpha))
    n, agree, alpha = total.tolist()
    return {"tokens": int(n), "agree": agree / n, "alpha": alpha / n}


def _logits(lm: Any, tokens: Tensor) -> Tensor:
    cache = lm.new_cache(1, len(tokens))
    return lm.forward(tokens[None].to(lm.device), cache).logits[0]


def score(
    target: Any, drafts: dict[str, Any], prompts: int = 96, tokens: int = 96
) -> list[dict[str, Any]]:
    """One record per draft and prompt kind, ``all`` included.

    Args:
        target: what `specref.load` returns.
        drafts: label -> `LM`.
    """
    corpora = eval_corpus(target, prompts, tokens)
    whole = Corpus([r for c in corpora.values() for r in c.rows])
    table = []
    for label, lm in drafts.items():
        for kind, corpus in {"all": whole, **corpora}.items():
            found = agreement(lm, target.lm, corpus)
            rounded = {k: round(v, 4) for k, v in found.items()}
            table.append({"draft": label, "kind": kind, **rounded})
    return table


def show(table: Sequence[dict[str, Any]]) -> None:
    """A plain table."""
    for row in table:
        print(
            f"{row['draft']:<24} {row['kind']:<12} {row['tokens']:>6} "
            f"agree {row['agree']:.3f} alpha {row['alpha']:.3f}"
        )
