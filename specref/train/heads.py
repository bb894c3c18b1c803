"""One trainer for every head, one recipe per method.

All heads start from nothing but the target (or from another head), read the
same responses in the same order, and are unrolled as they will draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.draws import Seeded
from specref.heads import files
from specref.heads.base import Head
from specref.lm.drafts import WEIGHTS
from specref.lm.llama import Llama
from specref.train import trainer
from specref.train.data import Corpus, groups, ranked
from specref.train.head_recipes import HeadRecipe
from specref.train.lessons import Depth, Lesson, follow, lesson

SMALL = ("o.", "down.", "mlp.")  # what a residual adds starts small


def begin(recipe: HeadRecipe, target: Llama, words: Tensor) -> Head:
    """The untrained head, its weights drawn from the recipe's seed.

    Matrices are uniform with standard deviation ``1 / sqrt(inputs)``, a
    fifth of that where their output is added to a residual; vectors stay
    (norms one, biases zero), and so do output heads (the target's rows) and
    matrices that a head has zeroed.
    """
    head = files.build(recipe.kind, target, words, dict(recipe.options))
    source = Seeded(recipe.seed)
    with torch.no_grad():
        for name, weight in head.trained().items():
            weight.requires_grad_(True)
            given = name == "head.weight" or name.startswith("outputs.")
            if weight.dim() < 2 or given or not weight.any():
                continue
            reach = (3.0 / weight.shape[1]) ** 0.5
            if any(part in name for part in SMALL):
                reach *= 0.2
            mark = source.uniform(weight.shape)
            weight.copy_((2.0 * mark - 1.0) * reach)
    head.start_near(target)
    head.embed.requires_grad_(False)
    if recipe.start_from:
        _inherit(head, recipe.start_from)
    return head


def _inherit(head: Head, name: str) -> None:
    """Take the tensors of another head that fit by name and shape."""
    shipped = WEIGHTS / f"head-{name}.safetensors"
    _, state = files.read(shipped if shipped.exists() else Path(name))
    own = head.trained()
    with torch.no_grad():
        for name, tensor in state.items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)


@dataclass
class Marks:
    """What a batch says about a head, per depth.

    Attributes:
        loss: the recipe's loss, a scalar to minimise.
        depths: see `lessons.follow`.
    """

    loss: Tensor
    depths: list[Depth]

    def record(self) -> dict[str, Any]:
        """See `trainer.Result`."""
        agree = [float(d.agree.mean()) for d in self.depths]
        alpha = [float(d.alpha.mean()) for d in self.depths]
        return {
            "agree": [round(x, 4) for x in agree],
            "alpha": [round(x, 4) for x in alpha],
            "feature": round(float(self.depths[0].feature.mean()), 4),
        }


def mark(
    head: Head, given: Lesson, recipe: HeadRecipe, rows: Tensor
) -> Marks:
    """Loss and acceptance by depth on one batch.

    Args:
        rows: ``[v, d]`` of the target's head for the head's words.
    """
    topk = (recipe.topk, recipe.topk_weight)
    depths = follow(head, given, rows, recipe.depth, topk, recipe.feature)
    weight = [recipe.decay**s for s in range(len(depths))]
    total = sum(
        w * d.loss.mean() for w, d in zip(weight, depths, strict=True)
    )
    return Marks(total / sum(weight), depths)


class HeadTrainer(trainer.Trainer):
    """Trains the head of one recipe; see `specref.train.trainer`.

    Args:
        corpus: responses with features (`specref.train.data`).
        folder: holds ``state.pt`` (to resume) and ``log.jsonl``.
    """

    def __init__(
        self, recipe: HeadRecipe, target: Llama, corpus: Corpus, folder: Path
    ) -> None:
        self.corpus, self.target = corpus, target
        words = ranked(corpus, recipe.vocab)
        self.rows = target.head.weight.detach()[words]
        self.head = begin(recipe, target, words)
        super().__init__(
            recipe,
            self.head,
            self._lessons,
            lambda given: mark(self.head, given, recipe, self.rows),
            folder,
        )

    def _lessons(self, start: int, end: int) -> Iterator[Lesson]:
        r = self.recipe
        stream = groups(self.corpus, r.batch, r.seed, start, end)
        for step, chosen in enumerate(stream, start):
            given = lesson(self.corpus, chosen, self.head.taps)
            yield noisy(given, r, step) if r.noise else given


def noisy(given: Lesson, recipe: HeadRecipe, step: int) -> Lesson:
    """The same goals, features moved by up to ``recipe.noise`` (EAGLE)."""
    shape = given.text.hidden.shape
    mark = Seeded(recipe.seed, step + 1).uniform(shape).float()
    moved = given.text.hidden + (2 * mark - 1) * recipe.noise
    return replace(given, text=replace(given.text, hidden=moved))


def finish(done: HeadTrainer, out: Path) -> Path:
    """Write the trained head as bf16 safetensors; returns the file."""
    recipe = done.recipe
    file = out / f"head-{recipe.name}.safetensors"
    about = {
        "recipe": asdict(recipe),
        "steps": done.step,
        "rows": len(done.corpus),
        "response_tokens": done.corpus.response_tokens,
    }
    options = dict(recipe.options)
    files.save_head(done.head, file, recipe.kind, options, about)
    return file


def train_head(
    recipe: HeadRecipe,
    target: Llama,
    corpus: Corpus,
    out: Path,
    until: int | None = None,
) -> None:
    """Train to the end (or to step ``until``), then write the head.

    A run that stops before its last step writes no head: its state waits
    in ``out`` for the rest.
    """
    done = HeadTrainer(recipe, target, corpus, out / recipe.name)
    done.run(until)
    if done.step == recipe.steps:
        print(f"head written to {finish(done, out)}")
    else:
        print(f"step {done.step} of {recipe.steps}; run again to go on")
