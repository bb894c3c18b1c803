"""What heads learn from: texts with features, and the laws to match.

A head drafts from every position of a text at once (`Head.rollout`).  What
it says at depth ``s`` from pair ``t`` is compared with the target's law
after token ``x_{t+s+1}``, which the stored features give.

Does not handle: the order of batches, see `specref.train.data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from specref.heads.base import Head, Text
from specref.train.data import Corpus, Row


@dataclass
class Lesson:
    """A batch.

    Attributes:
        text: what the head reads.
        rows, columns: ``[m]`` positions ``(b, u)`` of the features whose
            laws are to be matched: those that predict response tokens.
        hidden: ``[m, d]`` these features.
    """

    text: Text
    rows: Tensor
    columns: Tensor
    hidden: Tensor

    def spots(self, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which goals a draft of that depth (0 first) can reach: a mask
        ``[m]`` and the index ``(b, t)`` of the drafts, ``t = u - depth - 1``.
        """
        reach = self.columns > depth
        return reach, self.rows[reach], self.columns[reach] - depth - 1


def lesson(
    corpus: Corpus, chosen: Sequence[int], taps: Sequence[int] = ()
) -> Lesson:
    """The rows ``chosen`` as one batch, with features of layers ``taps``.

    Raises:
        FileNotFoundError, ValueError: the taps were not made.
    """
    rows = [corpus.rows[i] for i in chosen]
    n, d = max(len(r.hidden) for r in rows), rows[0].hidden.shape[-1]
    tokens = torch.zeros(len(rows), n + 1, dtype=torch.long)
    hidden = torch.zeros(len(rows), n, d)
    extra = torch.zeros(len(rows), n, len(taps), d)
    spots = []
    for b, r in enumerate(rows):
        size = len(r.hidden)
        tokens[b, : size + 1] = r.tokens
        hidden[b, :size] = r.hidden
        if taps:
            extra[b, :size] = read_taps(r, taps)
        where = torch.arange(max(r.answer - 1, 1), size)
        spots.append(torch.stack((torch.full_like(where, b), where)))
    at, column = torch.cat(spots, 1)
    text = Text(tokens, hidden, extra.unbind(2))
    return Lesson(text, at, column, hidden[at, column])


def read_taps(row: Row, taps: Sequence[int]) -> Tensor:
    """``[n, len(taps), d]`` stored features of one row."""
    if row.taps is None or not Path(row.taps[0]).exists():
        raise FileNotFoundError(
            f"no features of layers {list(taps)}: make them with `specref "
            "train features`"
        )
    from safetensors import safe_open

    file, at = row.taps
    with safe_open(file, "pt") as f:
        have = f.get_tensor("layers").tolist()
        missing = [t for t in taps if t not in have]
        if missing:
            raise ValueError(
                f"{file.name} has features of layers {have}, layers "
                f"{missing} are missing: delete the file and make it again"
            )
        some = f.get_slice("taps")[at : at + len(row.hidden)]
    return some[:, [have.index(t) for t in taps]]


@dataclass
class Depth:
    """How drafts of one depth fare: ``[m]`` each, see `follow`."""

    loss: Tensor
    agree: Tensor
    alpha: Tensor
    feature: Tensor


def follow(
    head: Head,
    lesson: Lesson,
    rows: Tensor,
    depth: int,
    topk: tuple[int, float] = (0, 0.0),
    match: float = 0.0,
) -> list[Depth]:
    """Compare a head's drafts with the target, per depth and goal.

    Args:
        rows: ``[v, d]`` of the target's head for the head's words.
        topk: size and weight of an extra cross entropy over the target's
            most likely words (HASS, Zhang et al. 2024, 2408.15766, eq. 3).
        match: weight of the smooth L1 distance between draft and feature
            (EAGLE, 2401.15077, eq. 2); 0 leaves it out.
    Returns:
        per depth: forward KL in nats, whether the first choices agree,
        ``sum min(p, q)`` within the words, and the feature distance.
    """
    with torch.no_grad():
        truth = F.linear(lesson.hidden, rows).log_softmax(-1)
        p = truth.exp()
        first = truth.argmax(-1)
    out = []
    for s, drafts in enumerate(head.rollout(lesson.text, depth)):
        reach, b, t = lesson.spots(s)
        draft = drafts[b, t]
        logq = head.project(draft, s).log_softmax(-1)
        goal = p[reach]
        loss = (goal * (truth[reach] - logq)).sum(-1)
        if topk[0]:
            best = goal.topk(topk[0])
            likely = logq.gather(1, best.indices)
            loss = loss - topk[1] * (best.values * likely).sum(-1)
        gap = loss.new_zeros(len(loss))
        if match:
            gap = F.smooth_l1_loss(
                draft, lesson.hidden[reach], reduction="none"
            ).mean(-1)
        with torch.no_grad():
            alpha = torch.minimum(goal, logq.exp()).sum(-1)
            agree = (logq.argmax(-1) == first[reach]).float()
        out.append(Depth(loss + match * gap, agree, alpha, gap.detach()))
    return out
