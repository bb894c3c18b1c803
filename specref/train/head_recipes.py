"""Recipes of the heads: one small record per method.

Compared heads have three to five and a half million trained parameters, one
draft vocabulary and the same responses; not the same number of visits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# SmolLM2's embedding rows have a root mean square of 0.13, its features
# after the last norm 2.0: these bring both to about one.
SCALES = ("scales", (7.5, 0.5))
# The streams that enter layers 2, 15 and 27 have 2.7, 6.3 and 22.
TAP_SCALES = (0.35, 0.16, 0.045)


@dataclass(frozen=True)
class HeadRecipe:
    """How one head is made.

    Attributes:
        kind: see `specref.heads.files.KINDS`.
        options: of the head's constructor.
        depth: steps of the unroll that are trained.
        decay: weight of step ``s`` is ``decay ** s``.
        feature: weight of the smooth L1 distance to the target's feature.
        topk, topk_weight: HASS's extra loss; 0 leaves it out.
        noise: features are moved by up to this (uniform) in training.
        vocab: draft vocabulary.
        rate: peak learning rate; warmed up, then a cosine to a tenth.
        visits: token positions to train on, prompts included.
        batch: token positions per step.
        start_from: a shipped head (or a head file) whose fitting tensors
            it starts from.
    """

    name: str
    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    depth: int = 1
    decay: float = 0.8
    feature: float = 0.0
    topk: int = 0
    topk_weight: float = 0.0
    noise: float = 0.0
    vocab: int = 8_192
    rate: float = 1e-3
    visits: int = 700_000
    batch: int = 1_024
    start_from: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "vocab", "visits", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )

    @property
    def steps(self) -> int:
        return max(self.visits // self.batch, 1)


HEAD_RECIPES = {
    r.name: r
    for r in (
        HeadRecipe(
            "medusa", "medusa",
            (("heads", 3), ("blocks", 3), ("mix", True), SCALES), depth=3,
        ),
        HeadRecipe(
            "hydra", "hydra",
            (("heads", 3), ("blocks", 1), ("skip", False), ("mix", True),
             SCALES),
            depth=3,
        ),
        # The prefix layer is trained, the heads are Hydra's own.
        HeadRecipe(
            "hydra_pp", "hydra",
            (("heads", 3), ("blocks", 1), ("skip", False), ("mix", True),
             ("prefix", True), ("base", "hydra")),
            depth=3, visits=250_000,
        ),
        # The paper weighs its losses 1 and 0.1; only the ratio matters.
        HeadRecipe("eagle", "eagle", (SCALES,), feature=10.0, noise=0.1),
        # HASS goes on from EAGLE's head (whose scales are folded by then).
        HeadRecipe(
            "hass", "eagle", depth=3, feature=1.0, topk=10, topk_weight=1.0,
            rate=6e-4, visits=600_000, start_from="eagle",
        ),
        HeadRecipe("mtp", "mtp", depth=2, visits=300_000),
        HeadRecipe("glide", "glide", depth=3, visits=200_000),
        HeadRecipe(
            "eagle3", "eagle3", (("mix", True), ("scales", TAP_SCALES)),
            depth=3, rate=1.5e-3, visits=1_400_000,
        ),
    )
}
