"""A draft of its own: another tokenizer and a small model from scratch.

The texts are the target's responses.  A byte-level BPE is learnt from
them, they are encoded again with it, and a small `Llama` learns to predict
their response tokens.  It shares nothing with the target but control
tokens.  Its embedding starts from the target's: each token at the mean of
the target's tokens that spell it, on the leading principal axes.

Does not handle: prompts (only responses are learnt).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.lm.llama import Llama, LlamaConfig
from specref.lm.vocab import Vocab, vocab_of
from specref.train.data import Batch, Corpus, batches
from specref.train.other_texts import (
    CONTROL,
    as_texts,
    encode_again,
    first_tokens,
    learn_tokenizer,
    lessons,
)
from specref.train.trainer import Trainer

HELD = 40  # every such row is kept for scoring


@dataclass(frozen=True)
class Other:
    """How the draft is made; names as in `recipes.Recipe`.

    Attributes:
        vocab: entries of the tokenizer.
        top: tokens kept of the target's law at a position.
        soft: weight of that law beside the token that was drawn.
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
    top: int = 24
    soft: float = 0.8
    drop: float = 0.1
    decay: float = 0.1
    rate: float = 3e-3
    visits: int = 2_400_000
    batch: int = 1_024
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
    chance, f64 = torch.Generator().manual_seed(recipe.seed), torch.float64
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=chance, dtype=f64)
                size = 0.5 if name.endswith(("o.weight", "down.weight")) else 1
                weight.copy_(size * noise / weight.shape[1] ** 0.5)
        model.embed.weight.copy_(embedding)
    return model


@dataclass
class Score:
    """What a batch says.

    Attributes:
        loss: cross-entropy with the lesson, a scalar to minimise.
        agree: how often the draft's first choice is the next token.
        hard: cross-entropy of the next tokens, in nats.
    """

    loss: Tensor
    agree: float
    hard: float

    def record(self) -> dict[str, float]:
        """See `trainer.Result`."""
        return {"agree": round(self.agree, 4), "hard": round(self.hard, 4)}


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
    ids, prob = batch.hidden[mine].chunk(2, -1)
    ids, drawn = ids.long(), ids[:, -1].long()
    x, cos, sin, allowed = draft.begin(batch.tokens, None, None)
    if drop:
        chance = torch.Generator().manual_seed(step)
        kept = torch.rand(x.shape, generator=chance, dtype=torch.float64)
        x = x * (kept >= drop) / (1 - drop)
    hidden, _ = draft.core(x, cos, sin, allowed, None)
    logq = draft.head(hidden[rows, columns]).log_softmax(-1)
    loss = -(prob * logq.gather(1, ids)).sum(-1).mean()
    with torch.no_grad():
        agree = (logq.argmax(-1) == drawn).float().mean()
        hard = -logq.gather(1, drawn[:, None]).mean()
    return Score(loss, float(agree), float(hard))


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
        into = self._tokenizer(corpus, source, folder, recipe)
        self.corpus = again = self._encoded(
            target, source, into, corpus, folder, recipe
        )
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

    def _tokenizer(
        self, corpus: Corpus, source: Vocab, folder: Path, recipe: Other
    ) -> Vocab:
        from tokenizers import Tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tokenizer.json"
        if not file.exists():
            texts = as_texts(corpus, source)
            words = [(a + b).decode("utf-8", "replace") for a, b in texts]
            learn_tokenizer(words, recipe.vocab).save(str(file))
        self.tokenizer = Tokenizer.from_file(str(file))
        return vocab_of(self.tokenizer)

    def _encoded(
        self,
        target: Llama,
        source: Vocab,
        into: Vocab,
        corpus: Corpus,
        folder: Path,
        recipe: Other,
    ) -> Corpus:
        """The lessons take minutes: they are made once."""
        file = folder / "lessons.pt"
        if not file.exists():
            size = len(target.embed.weight)
            first = first_tokens(source, into, size)
            laws = list(lessons(target, corpus, first, recipe.top))
            torch.save(laws, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        laws = torch.load(file, weights_only=True)
        return encode_again(
            corpus, source, into, laws, recipe.soft, recipe.positions
        )


@torch.no_grad()
def evaluate(draft: Llama, corpus: Corpus) -> dict[str, float]:
    """``tokens`` of the responses, ``agree`` and ``hard`` as in `Score`."""
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(0, len(corpus), 8):
        batch = corpus.batch(range(i, min(i + 8, len(corpus))))
        score, n = judge(draft, batch), int(batch.answer.sum())
        total += torch.tensor([n, n * score.agree, n * score.hard])
    n, agree, hard = total.tolist()
    return {"tokens": n, "agree": agree / n, "hard": hard / n}


def train_other(
    loaded: Any,
    corpus: Corpus,
    out: Path,
    recipe: Other,
    steps: int | None = None,
) -> OtherTrainer:
    """Learn the tokenizer, train, score on rows kept apart, write both.

    Args:
        loaded: the target, as `specref.load` returns it.
        out: gets ``draft-other.safetensors`` and its tokenizer.
    """
    source = vocab_of(loaded.tokenizer)
    rest = Corpus([r for i, r in enumerate(corpus.rows) if i % HELD])
    trainer = OtherTrainer(
        recipe, loaded.lm, source, rest, out / recipe.name
    )
    trainer.run(steps)
    held = Corpus(corpus.rows[::HELD])
    finish(trainer, loaded.lm, source, held, out)
    return trainer


def finish(
    done: OtherTrainer, target: Llama, source: Vocab, held: Corpus, out: Path
) -> None:
    """Score on ``held`` and write the draft, in bf16, and its tokenizer."""
    from specref.lm.pairs import save_own

    recipe, into = done.recipe, vocab_of(done.tokenizer)
    size = len(target.embed.weight)
    first = first_tokens(source, into, size)
    laws = list(lessons(target, held, first, recipe.top))
    again = encode_again(
        held, source, into, laws, recipe.soft, recipe.positions
    )
    found = evaluate(done.model, again)
    ends = [done.tokenizer.token_to_id(t) for t in (CONTROL[2], CONTROL[0])]
    done.model.eos = tuple(ends)
    about = {
        "recipe": asdict(recipe),
        "steps": done.step,
        "rows": len(done.corpus),
        "response_tokens": done.corpus.response_tokens,
        "held_out": {k: round(v, 4) for k, v in found.items()},
    }
    file = out / f"draft-{recipe.name}.safetensors"
    save_own(done.model, done.tokenizer, file, about)
    print(f"draft written to {file}: {about['held_out']}")
