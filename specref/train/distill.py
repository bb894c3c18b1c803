"""Distil a Llama-style draft from the target's own responses.

The draft is made of some of the target's layers, in order; the first few
can stay as they are (and need not be shipped).  It shares the target's
embedding, its last norm's place in the output and the rows of its head for
a reduced vocabulary, so what is learnt is the layers and the norm.  The law
to match comes from the stored features of `specref.train.respond`.

Does not handle: several devices, mixed precision.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from specref.lm.llama import Llama
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


def rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate: 5 % of the steps up, then a cosine to a tenth."""
    warm = max(recipe.steps // 20, 1)
    if step < warm:
        return recipe.rate * (step + 1) / warm
    part = (step - warm) / max(recipe.steps - warm, 1)
    return recipe.rate * (0.55 + 0.45 * math.cos(math.pi * part))


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


class Trainer:
    """Seeded, resumable training of one recipe.

    Args:
        folder: holds ``state.pt`` (to resume) and ``log.jsonl``.
    """

    def __init__(
        self, recipe: Recipe, target: Llama, corpus: Corpus, folder: Path
    ) -> None:
        self.recipe, self.corpus, self.folder = recipe, corpus, folder
        folder.mkdir(parents=True, exist_ok=True)
        words = frequent(corpus, recipe.vocab)
        self.rows = target.head.weight.detach()[words]
        self.draft = start(recipe, target, words)
        self.weights = [w for w in self.draft.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.step = 0
        self._resume()

    def _resume(self) -> None:
        file = self.folder / "state.pt"
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        if state["recipe"] != json.dumps(asdict(self.recipe)):
            raise ValueError(
                f"{file} belongs to another recipe: give another folder"
            )
        with torch.no_grad():
            saves = state["weights"]
            for mine, saved in zip(self.weights, saves, strict=True):
                mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """Write the state, complete or not at all."""
        part = self.folder / "state.part"
        torch.save(
            {
                "recipe": json.dumps(asdict(self.recipe)),
                "weights": [w.detach() for w in self.weights],
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            },
            part,
        )
        part.rename(self.folder / "state.pt")

    def run(self, until: int | None = None, save_every: int = 100) -> None:
        """Train to step ``until`` (all of them by default)."""
        end = min(until or self.recipe.steps, self.recipe.steps)
        bar = tqdm(total=end, initial=self.step, unit="step", disable=None)
        r = self.recipe
        for batch in batches(self.corpus, r.batch, r.seed, self.step, end):
            score = self._update(batch)
            bar.update()
            bar.set_postfix(loss=f"{float(score.loss.detach()):.3f}")
            if self.step % save_every == 0 or self.step == end:
                self.save()

    def _update(self, batch: Batch) -> Score:
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.recipe, self.step)
        score = judge(self.draft, batch, self.recipe, self.rows)
        self.optimizer.zero_grad(set_to_none=True)
        score.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        line = {
            "step": self.step,
            "loss": round(float(score.loss.detach()), 5),
            "agree": round(score.agree, 4),
            "alpha": round(score.alpha, 4),
            "seconds": round(time.perf_counter() - began, 2),
        }
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        return score


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


def finish(trainer: Trainer, out: Path) -> None:
    """Write the trained draft as bf16 safetensors."""
    from specref.lm.drafts import save_draft

    recipe = trainer.recipe
    shared = recipe.layers[: recipe.frozen]
    file = out / f"draft-{recipe.name}.safetensors"
    about = {
        "recipe": asdict(recipe),
        "steps": trainer.step,
        "rows": len(trainer.corpus),
        "response_tokens": trainer.corpus.response_tokens,
    }
    save_draft(trainer.draft, file, shared, about, head=recipe.head)
    print(f"draft written to {file}")
