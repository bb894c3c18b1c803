"""The training corpus: prompts, responses and features, read from shards.

Batches hold rows of similar length; which rows, and in which order, depends
on the seed and the step only, so that a run can be resumed anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specref.train.features import tap_file
from specref.train.templates import pick


@dataclass
class Row:
    """One answered prompt: ``tokens`` ``[n]``, ``hidden`` ``[n - 1, d]``,
    the index of the first response token, and where the features of more
    layers lie (see `specref.train.features`), if they were made."""

    tokens: Tensor
    hidden: Tensor
    answer: int
    taps: tuple[Path, int] | None = None


@dataclass
class Batch:
    """Padded rows and the positions to learn from.

    Attributes:
        tokens: ``[B, n]``, padded behind with 0.
        rows, columns: ``[m]`` the positions, as an index into ``[B, n]``.
        hidden: ``[m, d]`` the target's features there.
        answer: ``[m]`` bool, whether the position predicts a response
            token.
    """

    tokens: Tensor
    rows: Tensor
    columns: Tensor
    hidden: Tensor
    answer: Tensor


@dataclass
class Corpus:
    """All rows of some shards."""

    rows: list[Row]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def response_tokens(self) -> int:
        return sum(len(r.tokens) - r.answer for r in self.rows)

    def head(self, tokens: int) -> Corpus:
        """The first rows with at least ``tokens`` response tokens."""
        out: list[Row] = []
        for row in self.rows:
            if tokens <= 0:
                break
            out.append(row)
            tokens -= len(row.tokens) - row.answer
        return Corpus(out)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """The rows ``chosen`` as one batch."""
        rows = [self.rows[i] for i in chosen]
        width = max(len(r.tokens) for r in rows) - 1  # the last has no label
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for b, r in enumerate(rows):
            tokens[b, : len(r.tokens) - 1] = r.tokens[:-1]
        size = [len(r.hidden) for r in rows]
        answer = [torch.arange(n) >= r.answer - 1 for n, r in zip(size, rows)]
        return Batch(
            tokens,
            torch.arange(len(rows)).repeat_interleave(torch.tensor(size)),
            torch.cat([torch.arange(n) for n in size]),
            torch.cat([r.hidden for r in rows]),
            torch.cat(answer),
        )


def load_corpus(folder: Path) -> Corpus:
    """Read every shard of ``folder``, in order.

    Raises:
        FileNotFoundError: no shard there.
    """
    from safetensors.torch import load_file

    files = sorted(folder.glob("responses-*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no responses in {folder}: make them with `specref train "
            "responses`"
        )
    rows: list[Row] = []
    for file in files:
        t = load_file(file)
        m, n = t["prompt_len"].tolist(), t["length"].tolist()
        prompts = t["prompt"].long().split(m)
        answers = t["tokens"].long().split(n)
        hidden = t["hidden"].split([a + b - 1 for a, b in zip(m, n)])
        at = 0
        for p, a, h in zip(prompts, answers, hidden, strict=True):
            taps = (tap_file(file), at)
            rows.append(Row(torch.cat((p, a)), h, len(p), taps))
            at += len(h)
    return Corpus(rows)


def ranked(corpus: Corpus, size: int) -> Tensor:
    """The ``size`` most frequent response tokens, the most frequent first.

    Ids that never occur fill up from the lowest: they are the shortest.
    """
    count = torch.zeros(1 << 20, dtype=torch.long)
    for row in corpus.rows:
        tokens = row.tokens[row.answer :]
        count.index_add_(0, tokens, torch.ones_like(tokens))
    return count.argsort(descending=True, stable=True)[:size]


def frequent(corpus: Corpus, size: int) -> Tensor:
    """The words of `ranked`, ids in rising order."""
    return ranked(corpus, size).sort().values


def batches(
    corpus: Corpus, size: int, seed: int, start: int, end: int
) -> Iterator[Batch]:
    """Batches number ``start`` to ``end - 1`` of an endless stream.

    Every epoch shuffles the rows, sorts windows of 256 by length and cuts
    them into batches of about ``size`` token positions.
    """
    for group in groups(corpus, size, seed, start, end):
        yield corpus.batch(group)


def groups(
    corpus: Corpus, size: int, seed: int, start: int, end: int
) -> Iterator[list[int]]:
    """The rows of each batch of `batches`."""
    number, epoch = 0, 0
    while True:
        for group in _epoch(corpus, size, seed, epoch):
            if number >= end:
                return
            if number >= start:
                yield group
            number += 1
        epoch += 1


def _epoch(
    corpus: Corpus, size: int, seed: int, epoch: int
) -> list[list[int]]:
    length = [len(r.tokens) for r in corpus.rows]
    order = _shuffled(len(corpus), seed, epoch, "rows")
    out: list[list[int]] = []
    for at in range(0, len(order), 256):
        window = sorted(order[at : at + 256], key=lambda i: (length[i], i))
        group: list[int] = []
        for i in window:
            if group and (len(group) + 1) * length[i] > size:
                out.append(group)
                group = []
            group.append(i)
        out.append(group)
    return [out[i] for i in _shuffled(len(out), seed, epoch, "groups")]


def _shuffled(n: int, *key: object) -> list[int]:
    return sorted(range(n), key=lambda i: (pick(2**63, *key, i), i))
