"""Seeded, resumable training with progress: drafts and heads share it.

Does not handle: several devices, mixed precision.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm


class Plan(Protocol):
    """What the trainer reads of a recipe (a dataclass)."""

    rate: float
    steps: int


class Result(Protocol):
    """What a batch says about a model."""

    loss: Tensor

    def record(self) -> dict[str, Any]:
        """Numbers for the log."""


Batches = Callable[[int, int], Iterator[Any]]


def rate_at(recipe: Plan, step: int) -> float:
    """Learning rate: 5 % of the steps up, then a cosine to a tenth."""
    warm = max(recipe.steps // 20, 1)
    if step < warm:
        return recipe.rate * (step + 1) / warm
    part = (step - warm) / max(recipe.steps - warm, 1)
    return recipe.rate * (0.55 + 0.45 * math.cos(math.pi * part))


class Trainer:
    """Trains the parameters of ``model`` that require gradients.

    Args:
        recipe: a frozen dataclass, see `Plan`; a state of another recipe
            is refused.
        batches: ``batches(start, end)`` yields those of these steps.
        score: a batch to its `Result`.
        folder: holds ``state.pt`` (to resume) and ``log.jsonl``.
    """

    def __init__(
        self,
        recipe: Any,
        model: nn.Module,
        batches: Batches,
        score: Callable[[Any], Result],
        folder: Path,
    ) -> None:
        self.recipe, self.model, self.folder = recipe, model, folder
        self.batches, self.score = batches, score
        folder.mkdir(parents=True, exist_ok=True)
        self.weights = [w for w in model.parameters() if w.requires_grad]
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
        for batch in self.batches(self.step, end):
            score = self._update(batch)
            bar.update()
            bar.set_postfix(loss=f"{float(score.loss.detach()):.3f}")
            if self.step % save_every == 0 or self.step == end:
                self.save()

    def _update(self, batch: Any) -> Result:
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.recipe, self.step)
        score = self.score(batch)
        self.optimizer.zero_grad(set_to_none=True)
        score.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        line = {
            "step": self.step,
            "loss": round(float(score.loss.detach()), 5),
            **score.record(),
            "seconds": round(time.perf_counter() - began, 2),
        }
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        return score
