"""Recipes: what a draft is made of and how it is trained.

Losses, of the target's law p and the draft's q over the reduced
vocabulary: ``forward`` KL(p, q), ``reverse`` KL(q, p), ``tv`` their total
variation, which is one minus the acceptance of a drafted token.
"""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("forward", "reverse", "tv")


@dataclass(frozen=True)
class Recipe:
    """How one draft is made.

    Attributes:
        layers: the target's layers that it starts from, in order.
        frozen: how many of them stay the target's own.
        vocab: size of the reduced output vocabulary.
        head: train the output head too (and ship it); otherwise it stays
            the target's rows.
        loss: one of `LOSSES`.
        feature: weight of matching the target's feature (smooth L1).
        rate: peak learning rate; warmed up, then a cosine to a tenth.
        visits: token positions to train on, prompts included.
        batch: token positions per step.
        prompt_weight: weight of prompt positions in the feature loss (the
            divergence is over response positions only).
    """

    name: str
    layers: tuple[int, ...]
    frozen: int = 0
    vocab: int = 16_384
    head: bool = False
    loss: str = "forward"
    feature: float = 1.0
    rate: float = 8e-4
    visits: int = 900_000
    batch: int = 1_024
    prompt_weight: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(
                f"loss must be one of {LOSSES}, got {self.loss!r}"
            )
        if not 0 <= self.frozen < len(self.layers):
            raise ValueError(
                f"frozen must be in [0, {len(self.layers)}), got {self.frozen}"
            )

    @property
    def steps(self) -> int:
        return max(self.visits // self.batch, 1)


# The middle one's layers are those that `specref.train.prune` keeps.
RECIPES = {
    "small": Recipe(
        "small",
        (0, 29),
        vocab=12_288,
        head=True,
        feature=0.1,
        rate=1.5e-3,
        visits=2_200_000,
    ),
    "middle": Recipe("middle", (0, 1, 8, 11, 21, 24, 27, 29), frozen=2),
}
