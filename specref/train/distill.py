"""Distil a Llama-style draft from the target's own responses.

The draft is made of some of the target's layers, in order; the first few
can stay as they are (and need not be shipped).  It shares the target's
embedding, its last norm's place in the output and the rows of its head for
a reduced vocabulary, so what is learnt is the layers and the norm.  The law
to match comes from the stored features of `specref.train.respond`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from specref.lm.llama import Llama
from specref.train import trainer
from specref.train.data import Batch, Corpus, batches, frequent
from specref.train.recipes import Recipe


def divergence(p: Tensor, logq: Tensor, loss: str) -> Tensor:
    """``[n]`` losses of laws ``p`` ``[n, V]`` and log-laws ``logq``."""
    if loss == "forward":
        return (torch.xlogy(p, p) - p * logq).sum(-1)
    q = logq.exp()
    if loss == "tv":
        return 1.0 - torch.minimum(p, q).sum(-1)
    return (q * (logq - p.clamp(min=1e-12).log())).sum(-1)


def start(recipe: Recipe, target: Llama, head_vocab: Tensor) -> Llama:
    """The untrained draft: copied layers, shared embedding and head rows.

    Raises:
        ValueError: a layer that the target lacks.
    """
    from specref.lm.drafts import skeleton

    most = target.config.num_hidden_layers
    if not all(0 <= i < most for i in recipe.layers):
        raise ValueError(
            f"layers must be in [0, {most}), got {list(recipe.layers)}"
        )
    config = replace(target.config, num_hidden_layers=len(recipe.layers))
    draft = skeleton(config, head_vocab, target)
    for mine, i in zip(draft.layers, recipe.layers, strict=True):
        mine.load_state_dict(target.layers[i].state_dict())
    draft.norm.load_state_dict(target.norm.state_dict())
    for layer in draft.layers[recipe.frozen :]:
        layer.requires_grad_(True)
    draft.norm.requires_grad_(True)
    draft.head.requires_grad_(recipe.head)
    return draft


@dataclass
class Score:
    """What a batch says about a draft.

    Attributes:
        loss: the recipe's loss, a scalar to minimise.
        agree: how often the draft's first choice is the target's.
        alpha: mean acceptance at temperature 1, ``sum min(p, q)``.
    """

    loss: Tensor
    agree: float
    alpha: float

    def record(self) -> dict[str, float]:
        """See `trainer.Result`."""
        both = {"agree": self.agree, "alpha": self.alpha}
        return {name: round(value, 4) for name, value in both.items()}


def judge(
    draft: Llama, batch: Batch, recipe: Recipe, rows: Tensor
) -> Score:
    """Loss and acceptance on one batch (its responses, for the latter).

    Args:
        rows: ``[v, d]`` the target's head for the reduced vocabulary.
    """
    out = draft.forward(batch.tokens, logits=False).hidden
    hidden, goal = out[batch.rows, batch.columns], batch.hidden.float()
    mine = batch.answer
    with torch.no_grad():
        p = F.linear(goal[mine], rows).softmax(-1)
    logq = draft.head(hidden[mine]).log_softmax(-1)
    loss = divergence(p, logq, recipe.loss).mean()
    if recipe.feature:
        gap = F.smooth_l1_loss(hidden, goal, reduction="none").mean(-1)
        weight = torch.where(mine, 1.0, recipe.prompt_weight)
        loss = loss + recipe.feature * (gap * weight).sum() / weight.sum()
    with torch.no_grad():
        agree = p.argmax(-1) == logq.argmax(-1)
        alpha = torch.minimum(p, logq.exp()).sum(-1)
    return Score(loss, float(agree.float().mean()), float(alpha.mean()))


class Trainer(trainer.Trainer):
    """Trains the draft of one recipe; see `specref.train.trainer`.

    Args:
        folder: holds ``state.pt`` (to resume) and ``log.jsonl``.
    """

    def __init__(
        self, recipe: Recipe, target: Llama, corpus: Corpus, folder: Path
    ) -> None:
        self.corpus = corpus
        words = frequent(corpus, recipe.vocab)
        self.rows = target.head.weight.detach()[words]
        self.draft = start(recipe, target, words)
        size, seed = recipe.batch, recipe.seed
        super().__init__(
            recipe,
            self.draft,
            lambda start, end: batches(corpus, size, seed, start, end),
            lambda batch: judge(self.draft, batch, recipe, self.rows),
            folder,
        )


@torch.inference_mode()
def evaluate(
    draft: Llama, target: Llama, corpus: Corpus, recipe: Recipe
) -> dict[str, float]:
    """Agreement and acceptance over the responses of ``corpus``, within
    the draft's vocabulary."""
    total = torch.zeros(3, dtype=torch.float64)
    rows = target.head.weight[draft.head_vocab]
    for part in _once(corpus, 4_096):
        score, n = judge(draft, part, recipe, rows), int(part.answer.sum())
        total += torch.tensor([n, n * score.agree, n * score.alpha])
    n, agree, alpha = total.tolist()
    return {"tokens": n, "agree": agree / n, "alpha": alpha / n}


def _once(corpus: Corpus, size: int) -> Iterator[Batch]:
    sizes = [len(row.tokens) for row in corpus.rows]
    order = sorted(range(len(corpus)), key=sizes.__getitem__)
    group: list[int] = []
    for i in order:
        group.append(i)
        if len(group) * len(corpus.rows[i].tokens) >= size:
            yield corpus.batch(group)
            group = []
    if group:
        yield corpus.batch(group)


def finish(done: Trainer, out: Path) -> None:
    """Write the trained draft as bf16 safetensors."""
    from specref.lm.drafts import save_draft

    recipe = done.recipe
    shared = recipe.layers[: recipe.frozen]
    file = out / f"draft-{recipe.name}.safetensors"
    about = {
        "recipe": asdict(recipe),
        "steps": done.step,
        "rows": len(done.corpus),
        "response_tokens": done.corpus.response_tokens,
    }
    save_draft(done.draft, file, shared, about, head=recipe.head)
    print(f"draft written to {file}")
