"""The target's responses in other tokens, for a draft with a tokenizer.

Where a token of both tokenizers begins at the same byte, the target's law
is a better lesson than the one token that was drawn: each of its tokens
counts for the first draft token that spells it.

Does not handle: the law at bytes where only one tokenizer begins a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from specref.lm.llama import Llama
from specref.lm.vocab import Vocab
from specref.train.data import Corpus, Row, frequent

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FREQUENT = 4_096  # target tokens whose probabilities are looked at


def learn_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A byte-level BPE of ``size`` entries as a ``tokenizers.Tokenizer``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_texts(corpus: Corpus, source: Vocab) -> list[tuple[bytes, bytes]]:
    """Prompt and response of every row, as bytes."""
    return [
        (source.decode(t[:n]), source.decode(t[n:]))
        for t, n in ((row.tokens.tolist(), row.answer) for row in corpus.rows)
    ]


@torch.no_grad()
def lessons(
    target: Llama, corpus: Corpus, first: Tensor, top: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per row, the target's law at each response token in draft tokens.

    Args:
        first: ``[V]`` the first draft token of each target token.
        top: tokens kept of a law, of the most frequent ones.
    Yields:
        ids and probabilities, ``[m, top]``; the probabilities add up to
        one over the target tokens that are kept.
    """
    size = min(FREQUENT, len(target.head.weight))
    words = frequent(corpus, size)
    head = target.head.weight.detach()[words].float()
    for row in corpus.rows:
        feature = row.hidden[row.answer - 1 :].float()
        best = (feature @ head.T).topk(top)
        yield first[words[best.indices]], best.values.softmax(-1)


def encode_again(
    corpus: Corpus,
    source: Vocab,
    into: Vocab,
    laws: Sequence[tuple[Tensor, Tensor]],
    soft: float,
    most: int,
) -> Corpus:
    """The texts in other tokens.

    Prompt and response are encoded apart, so that no token spans both.  In
    place of features a row holds what it is to predict, ``[n - 1, 2 top]``:
    ids and their probabilities.

    Args:
        laws: of `lessons`, one per row.
        soft: weight of the law beside the token that was drawn.
        most: tokens of a row; what is longer is cut.
    """
    rows, top = [], laws[0][0].shape[1]
    texts = as_texts(corpus, source)
    for row, law, (prompt, answer) in zip(
        corpus.rows, laws, texts, strict=True
    ):
        head, tail = into.encode(prompt), into.encode(answer)
        tail = tail[: max(most - len(head), 0)]
        if not tail:
            continue
        theirs = row.tokens[row.answer :].tolist()
        spots = {x: i for i, x in enumerate(_starts(source, theirs))}
        goal = torch.zeros(len(head) + len(tail) - 1, 2, top)
        here = goal[len(head) - 1 :]
        at = torch.tensor([spots.get(x, -1) for x in _starts(into, tail)])
        meet = at >= 0
        here[meet, 0] = law[0][at[meet]].float()
        here[meet, 1] = law[1][at[meet]] * soft
        # The least of the law makes room for what was drawn.
        here[:, 0, -1] = torch.tensor(tail, dtype=goal.dtype)
        here[:, 1, -1] = 1.0 - here[:, 1, :-1].sum(-1)
        tokens = torch.tensor(head + tail)
        rows.append(Row(tokens, goal.flatten(1), len(head)))
    return Corpus(rows)


def _starts(vocab: Vocab, tokens: Sequence[int]) -> list[int]:
    sizes = [len(vocab.piece(t)) for t in tokens]
    return [0, *accumulate(sizes)][: len(sizes)]


def first_tokens(source: Vocab, into: Vocab, size: int) -> Tensor:
    """``[size]``: the draft token that begins each target token."""
    out = torch.zeros(size, dtype=torch.long)
    for token in range(min(size, len(source))):
        out[token] = (into.encode(source.piece(token)) or [0])[0]
    return out
