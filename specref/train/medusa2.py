"""Medusa-2: the backbone is tuned together with its heads.

Cai et al. 2024, 2401.10774, sections 2.2.2 and 2.3.2 (self-distillation).
The teacher is the model as it was, whose features are stored with its
responses; the loss is ``KL(teacher, tuned)`` plus ``weight`` times the
loss of the heads, which start from Medusa-1's.  What comes out is another
target, a little away from the first, and heads that know it better.

Does not handle: two learning rates (the paper's heads have four times the
backbone's), quantised backbones, several devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.draws import Seeded
from specref.heads import files
from specref.heads.base import Head, Text
from specref.lm import lora
from specref.lm.drafts import WEIGHTS
from specref.lm.llama import Llama
from specref.lm.weights import copy_named
from specref.train import trainer
from specref.train.data import Corpus, groups
from specref.train.lessons import Depth, Lesson, follow, lesson


@dataclass(frozen=True)
class Medusa2Recipe:
    """How the backbone is tuned.

    Attributes:
        rank, alpha: of the LoRAs, one per matrix of every layer; a large
            alpha lets them move faster than the heads at one rate.
        weight: of the heads' loss, the paper's lambda_0; the heads' is the
            sum over depths, depth ``s`` weighed by ``decay ** s``.
        rate: peak learning rate; warmed up, then a cosine to a tenth.
        visits: token positions to train on, prompts included.
        batch: token positions per step.
    """

    name: str = "medusa2"
    rank: int = 8
    alpha: float = 32.0
    weight: float = 0.2
    decay: float = 0.8
    depth: int = 3
    rate: float = 2e-4
    visits: int = 120_000
    batch: int = 512
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(self.visits // self.batch, 1)


class Tuned(nn.Module):
    """A backbone with LoRAs and the heads that are trained with it."""

    def __init__(self, target: Llama, head: Head, recipe: Medusa2Recipe):
        super().__init__()
        target.requires_grad_(False)
        self.target, self.head = target, head
        self.loras = lora.attach(target, recipe.rank, recipe.alpha)
        lora.fill(self.loras, Seeded(recipe.seed))
        for weight in head.trained().values():
            weight.requires_grad_(True)


@dataclass
class Marks:
    """What a batch says.

    Attributes:
        loss: the recipe's loss, a scalar to minimise.
        kl: KL(teacher, tuned) in nats, mean over positions.
        same: how often their first choices agree.
        depths: of the heads, see `lessons.follow`.
    """

    loss: Tensor
    kl: float
    same: float
    depths: list[Depth]

    def record(self) -> dict[str, Any]:
        """See `trainer.Result`."""
        agree = [float(d.agree.mean()) for d in self.depths]
        return {
            "kl": round(self.kl, 5),
            "same": round(self.same, 4),
            "agree": [round(x, 4) for x in agree],
        }


def mark(model: Tuned, given: Lesson, recipe: Medusa2Recipe) -> Marks:
    """Loss of one batch; ``given`` holds the teacher's features."""
    target, head = model.target, model.head
    tokens = given.text.tokens
    tuned = target.forward(tokens[:, :-1], logits=False).hidden
    with torch.no_grad():
        goal = target.head(given.hidden).log_softmax(-1)
    logp = target.head(tuned[given.rows, given.columns]).log_softmax(-1)
    kl = (goal.exp() * (goal - logp)).sum(-1).mean()
    seen = replace(given, text=Text(tokens, tuned))
    rows = target.head.weight[head.words]
    depths = follow(head, seen, rows, recipe.depth)
    weight = [recipe.decay**s for s in range(len(depths))]
    heads = sum(w * d.loss.mean() for w, d in zip(weight, depths, strict=True))
    same = (goal.argmax(-1) == logp.argmax(-1)).float().mean()
    loss = kl + recipe.weight * heads
    return Marks(loss, float(kl.detach()), float(same), depths)


class Medusa2Trainer(trainer.Trainer):
    """Seeded, resumable; see `specref.train.trainer`.

    Args:
        target: an unpacked copy that is changed in place.
        start: the file of the Medusa-1 heads.
        corpus: the responses of ``target`` with features.
        folder: holds ``state.pt`` (to resume) and ``log.jsonl``.
    """

    def __init__(
        self,
        recipe: Medusa2Recipe,
        target: Llama,
        start: Path,
        corpus: Corpus,
        folder: Path,
    ) -> None:
        self.corpus = corpus
        self.about, state = files.read(start)
        words = state.pop("words").long()
        head = files.build(
            self.about["kind"], target, words, self.about["options"]
        )
        copy_named(head.trained(), state)
        self.tuned = Tuned(target, head, recipe)
        super().__init__(
            recipe,
            self.tuned,
            self._lessons,
            lambda given: mark(self.tuned, given, recipe),
            folder,
        )

    def _lessons(self, start: int, end: int) -> Iterator[Lesson]:
        r = self.recipe
        for chosen in groups(self.corpus, r.batch, r.seed, start, end):
            yield lesson(self.corpus, chosen)


def finish(done: Medusa2Trainer, out: Path) -> tuple[Path, Path]:
    """Write LoRA and heads as bf16 safetensors; returns both files."""
    recipe, head = done.recipe, done.tuned.head
    about = {
        "recipe": asdict(recipe),
        "steps": done.step,
        "rows": len(done.corpus),
        "response_tokens": done.corpus.response_tokens,
    }
    change = out / f"lora-{recipe.name}.safetensors"
    heads = out / f"head-{recipe.name}.safetensors"
    lora.save(done.tuned.loras, change, about)
    made = done.about
    files.save_head(head, heads, made["kind"], made["options"], about)
    return change, heads


def train_medusa2(
    recipe: Medusa2Recipe,
    target: Llama,
    corpus: Corpus,
    out: Path,
    until: int | None = None,
) -> None:
    """Train to the end (or to step ``until``), then write both files.

    The Medusa-1 heads are those in ``out``, or the shipped ones.
    """
    start = out / "head-medusa.safetensors"
    if not start.exists():
        start = WEIGHTS / start.name
    done = Medusa2Trainer(recipe, target, start, corpus, out / recipe.name)
    done.run(until)
    if done.step == recipe.steps:
        change, heads = finish(done, out)
        print(f"change written to {change}, heads to {heads}")
    else:
        print(f"step {done.step} of {recipe.steps}; run again to go on")


def drift(before: Llama, after: Llama, corpus: Corpus) -> dict[str, float]:
    """How far the tuned model is from the first, on its responses.

    Returns:
        ``tokens``; ``kl`` in nats; ``tv`` mean total variation of the next
        token's law at temperature 1; ``same``: first choices agree.
    """
    total = torch.zeros(3, dtype=torch.float64)
    count = 0
    with torch.inference_mode():
        for row in corpus.rows:
            ids, at = row.tokens[None, :-1], slice(row.answer - 1, None)
            p, q = (
                lm.forward(ids, lm.new_cache(1, ids.shape[1]))
                .logits[0, at]
                .log_softmax(-1)
                for lm in (before, after)
            )
            kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            tv = 0.5 * (p.exp() - q.exp()).abs().sum(-1)
            same = p.argmax(-1) == q.argmax(-1)
            parts = torch.stack((kl, tv, same.to(kl)), -1)
            total += parts.double().sum(0)
            count += len(kl)
    kl, tv, same = (total / max(count, 1)).tolist()
    return {"tokens": count, "kl": kl, "tv": tv, "same": same}
