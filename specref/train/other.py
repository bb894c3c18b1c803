"""A draft of its own: another tokenizer and a small model from scratch.

The texts are the target's responses.  A byte-level BPE is learnt from
them, they are encoded again with it, and a small `Llama` learns to predict
their response tokens.  It shares nothing with the target but control
tokens; its embedding starts from the target's (each token at the mean of
the target's tokens that spell it, on the leading principal axes), which is
worth more than many epochs over so few texts.

Does not handle: matching the target's law, which is over other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specref.lm.llama import Llama, LlamaConfig
from specref.lm.vocab import Vocab, vocab_of
from specref.train.data import Batch, Corpus, Row, batches
from specref.train.trainer import Trainer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Other:
    """How the draft is made; names as in `recipes.Recipe`.

    Attributes:
        vocab: entries of the tokenizer.
        drop: dropout of the embedding while training.
        decay: weight decay.
    """

    name: str = "other"
    vocab: int = 6_000
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    middle: int = 640
    positions: int = 2_048
    drop: float = 0.1
    decay: float = 0.1
    rate: float = 2e-3
    visits: int = 4_000_000
    batch: int = 2_048
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(self.visits // self.batch, 1)

    @property
    def config(self) -> LlamaConfig:
        """Sizes of the model."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            intermediate_size=self.middle,
            max_position_embeddings=self.positions,
        )


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


def encode_again(
    texts: Sequence[tuple[bytes, bytes]], into: Vocab, most: int
) -> Corpus:
    """The texts as a corpus of other tokens.

    Prompt and response are encoded apart, so that no token spans both; rows
    end after ``most`` tokens.  In place of features a row holds what it is
    to predict, the next token of every position, ``[n - 1, 1]``.
    """
    rows = []
    for prompt, answer in texts:
        head = into.encode(prompt)
        tokens = torch.tensor((head + into.encode(answer))[:most])
        if len(tokens) > len(head):
            rows.append(Row(tokens, tokens[1:, None], len(head)))
    return Corpus(rows)


def initial_embedding(
    target: Llama, source: Vocab, into: Vocab, recipe: Other
) -> Tensor:
    """``[vocab, width]``: means of target embeddings on their leading
    principal axes, with rows of unit mean square over ``width``."""
    table = target.embed.weight.detach().float()
    rows = torch.zeros(recipe.vocab, table.shape[1])
    for token in range(recipe.vocab):
        data = into.piece(token)
        known = source.encode(data) if token < len(into) else []
        if known:
            rows[token] = table[known].mean(0)
    rows -= rows.mean(0)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    out = rows @ axes[: recipe.width].T
    return out / out.square().mean().sqrt() / recipe.width**0.5


def start(recipe: Other, embedding: Tensor) -> Llama:
    """The untrained model; weights from the recipe's seed."""
    model = Llama(recipe.config)
    chance = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                noise = torch.randn(
                    weight.shape, generator=chance, dtype=torch.float64
                )
                size = 0.5 if name.endswith(("o.weight", "down.weight")) else 1
                weight.copy_(size * noise / weight.shape[1] ** 0.5)
        model.embed.weight.copy_(embedding)
    return model


@dataclass
class Score:
    """What a batch says: cross-entropy of its response tokens, how often
    the draft's first choice is the next one, and its mean probability."""

    loss: Tensor
    agree: float
    sure: float

    def record(self) -> dict[str, float]:
        """See `trainer.Result`."""
        return {"agree": round(self.agree, 4), "sure": round(self.sure, 4)}


def judge(
    draft: Llama, batch: Batch, drop: float = 0.0, step: int = 0
) -> Score:
    """Score one batch.

    Args:
        drop: part of the embedding to drop; which one depends on ``step``
            only, so that a resumed run is the same run.
    """
    mine = batch.answer
    rows, columns = batch.rows[mine], batch.columns[mine]
    goal = batch.hidden[mine, 0]
    x, cos, sin, allowed = draft.begin(batch.tokens, None, None)
    if drop:
        chance = torch.Generator().manual_seed(step)
        kept = torch.rand(x.shape, generator=chance, dtype=torch.float64)
        x = x * (kept >= drop) / (1 - drop)
    hidden, _ = draft.core(x, cos, sin, allowed, None)
    logits = draft.head(hidden[rows, columns])
    loss = F.cross_entropy(logits, goal)
    with torch.no_grad():
        agree = (logits.argmax(-1) == goal).float().mean()
        sure = logits.softmax(-1).gather(1, goal[:, None]).mean()
    return Score(loss, float(agree), float(sure))


class OtherTrainer(Trainer):
    """Trains the draft; keeps its tokenizer in ``folder`` too.

    Args:
        target: gives its embedding.
        source: its vocabulary.
        corpus: its responses.
    """

    def __init__(
        self,
        recipe: Other,
        target: Llama,
        source: Vocab,
        corpus: Corpus,
        folder: Path,
    ) -> None:
        from tokenizers import Tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        texts = as_texts(corpus, source)
        file = folder / "tokenizer.json"
        if not file.exists():
            words = [(a + b).decode("utf-8", "replace") for a, b in texts]
            learn_tokenizer(words, recipe.vocab).save(str(file))
        self.tokenizer = Tokenizer.from_file(str(file))
        into = vocab_of(self.tokenizer)
        again = encode_again(texts, into, recipe.positions)
        self.corpus = again
        first = initial_embedding(target, source, into, recipe)
        size, seed = recipe.batch, recipe.seed
        super().__init__(
            recipe,
            start(recipe, first),
            lambda start, end: batches(again, size, seed, start, end),
            lambda batch: judge(self.model, batch, recipe.drop, self.step),
            folder,
        )
        for group in self.optimizer.param_groups:
            group["weight_decay"] = recipe.decay
