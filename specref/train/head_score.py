"""How well heads agree with the target on the evaluation prompts.

Acceptance by depth: from every position of the target's answers the head
drafts as it would in the loop, the path above being the text's own, and its
law is compared with the target's.  EAGLE's papers call the curve n-alpha.

Does not handle: draft models, see `specref.train.score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specref.draft.measured_tree import head_accuracy
from specref.heads.base import Head, Text
from specref.heads.files import resolve_head
from specref.lm.llama import Llama
from specref.train.data import Corpus, Row
from specref.train.prompts import training_prompts
from specref.train.respond import Responder


def with_features(target: Llama, row: Row, taps: Sequence[int]) -> Text:
    """The row's text and all that heads read of the target."""
    ids = row.tokens[None, :-1].to(target.device)
    out = target.forward(ids, taps=tuple(taps), logits=False)
    return Text(row.tokens[None].to(target.device), out.hidden, out.taps)


@torch.inference_mode()
def by_depth(
    target: Llama, heads: Mapping[str, Head], corpus: Corpus, depth: int = 6
) -> dict[str, dict[str, Any]]:
    """Per head: ``tokens``, and ``agree``, ``alpha`` and ``sure`` lists.

    Returns:
        ``agree[s]`` is how often the first choice at depth ``s`` is the
        target's; ``alpha[s]`` the mean acceptance at temperature 1, over
        the whole vocabulary; ``sure[s]`` the mean probability that the
        head itself gives to its first choice.
    """
    taps = sorted({t for h in heads.values() for t in h.taps})
    totals = {
        name: torch.zeros(4, min(depth, h.levels or depth)).double()
        for name, h in heads.items()
    }
    for row in corpus.rows:
        text = with_features(target, row, taps)
        law = target.head(text.hidden[0]).float().softmax(-1)
        for name, head in heads.items():
            own = tuple(text.taps[taps.index(t)] for t in head.taps)
            mine = Text(text.tokens, text.hidden, own)
            totals[name] += _count(head, mine, law, row.answer, totals[name])
    return {name: _means(total) for name, total in totals.items()}


def _count(
    head: Head, text: Text, law: Tensor, answer: int, like: Tensor
) -> Tensor:
    """``[4, depth]``: positions and sums of the three measures."""
    out = torch.zeros_like(like)
    for s, drafts in enumerate(head.rollout(text, like.shape[1])):
        first = max(answer - 1, s + 1)
        p = law[first:]
        q = head.project(drafts[0, first - s - 1 : len(law) - s - 1], s)
        q = q.float().softmax(-1)
        sure, best = q.max(-1)
        agree = head.words[best] == p.argmax(-1)
        alpha = torch.minimum(p[:, head.words], q).sum(-1)
        sums = [agree.double().sum(), alpha.sum(), sure.sum()]
        out[:, s] = torch.tensor([float(len(p)), *map(float, sums)])
    return out


def _means(total: Tensor) -> dict[str, Any]:
    names = ("agree", "alpha", "sure")
    mean = total[1:] / total[0].clamp(min=1.0)
    return {"tokens": int(total[0, 0])} | {
        name: [round(float(x), 4) for x in row]
        for name, row in zip(names, mean, strict=True)
    }


def accuracies(
    loaded: Any, heads: Sequence[str], prompts: int = 48, tokens: int = 64
) -> dict[str, Any]:
    """``accept[head][depth][rank]`` at temperature 0.

    Measured on the target's greedy answers to the last prompts of the
    training pool, which no shipped head has seen.
    """
    ids = [loaded.encode(p.prompt) for p in training_prompts()[-prompts:]]
    answers = Responder(
        loaded.lm, 48, tokens, max(map(len, ids)), temperatures=(0.0,)
    ).answer(ids)
    texts = [(r.prompt + r.tokens, len(r.prompt)) for r in answers]
    table = {}
    for name in heads:
        head = resolve_head(name, loaded.lm)
        depth = min(head.levels or 5, 5)
        table[name] = head_accuracy(loaded.lm, head, texts, depth)
    return {"accept": table, "prompts": prompts, "tokens": tokens}


def calibration(
    target: Llama, head: Head, corpus: Corpus, bins: int = 10
) -> list[list[float]]:
    """Confidence beside truth at the first depth, greedy.

    Returns:
        per bin of the head's confidence in its first choice: its lower and
        upper edge, the mean confidence, how often the choice was the
        target's, and the number of positions.
    """
    total = torch.zeros(bins, 3, dtype=torch.float64)
    with torch.inference_mode():
        for row in corpus.rows:
            text = with_features(target, row, head.taps)
            first = max(row.answer - 1, 1)
            goal = target.head(text.hidden[0, first:]).argmax(-1)
            drafts = head.rollout(text, 1)[0][0, first - 1 : -1]
            sure, best = head.project(drafts).float().softmax(-1).max(-1)
            right = (head.words[best] == goal).double()
            spot = (sure * bins).long().clamp(max=bins - 1).cpu()
            new = torch.stack((sure.double(), right, torch.ones_like(right)))
            total.index_add_(0, spot, new.T.cpu())
    out = []
    for i, (sure, right, n) in enumerate(total.tolist()):
        if n:
            edges = [round(i / bins, 2), round((i + 1) / bins, 2)]
            out.append([*edges, round(sure / n, 4), round(right / n, 4), n])
    return out
