"""The methods that draft with a head on the target's features.

A head is a name (``eagle3``), a file, the folder of a published checkpoint
or a `Head`; ``vocab`` keeps only its most frequent words (FR-Spec).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specref import rules
from specref.catalogue import at_least
from specref.draft import shapes
from specref.draft.cape import Cape
from specref.draft.dynamic import Dynamic
from specref.draft.grow import Static
from specref.draft.head import HeadDrafter
from specref.draft.known_shapes import known
from specref.draft.measured_tree import greedy_tree
from specref.heads.files import resolve_head
from specref.registry import Method, Parts, register
from specref.tree import DETERMINISTIC, IID

FILE = Path(__file__).resolve().parent / "data" / "head_accuracy.json"
Accept = Sequence[Sequence[float]]


def shipped_accuracy(head: Any) -> Accept:
    """``accept[depth][rank]`` measured for a shipped head.

    Raises:
        ValueError: none is shipped; measure one and pass ``accept``.
    """
    table = json.loads(FILE.read_text())["accept"] if FILE.exists() else {}
    if not isinstance(head, str) or head not in table:
        raise ValueError(
            f"no accuracies are shipped for head {head!r}: pass shape=..., or "
            "accept=specref.draft.measured_tree.head_accuracy(...)"
        )
    return table[head]


def static(
    rule: str,
    target: Any,
    head: Any = "eagle",
    nodes: int = 10,
    shape: Sequence[int] | str | None = None,
    accept: Accept | None = None,
    vocab: int | None = None,
) -> Parts:
    """The top tokens of a head in a fixed tree.

    Without ``shape`` (parents, or the name of a published tree) it is
    Medusa's greedy tree of ``nodes`` for the accuracies ``accept``.
    """
    if isinstance(shape, str):
        shape = known(shape)
    if shape is None:
        accept = shipped_accuracy(head) if accept is None else accept
        shape = greedy_tree(accept, at_least("nodes", nodes))
    policy = Static(shape, DETERMINISTIC)
    return HeadDrafter(resolve_head(head, target, vocab), policy), rules.get(
        rule
    )


def dynamic(
    target: Any,
    head: Any = "eagle3",
    nodes: int = 10,
    depth: int = 5,
    width: int = 3,
    children: int = 8,
    vocab: int | None = None,
) -> Parts:
    """EAGLE-2's tree: grown where the head is confident.

    ``children`` candidates below each of the ``width`` nodes that a level
    expands; EAGLE-2 itself has ``children = width``.
    """
    sizes = {"nodes": nodes, "depth": depth, "width": width}
    for name, value in (sizes | {"children": children}).items():
        at_least(name, value)
    found = resolve_head(head, target, vocab)
    policy = Dynamic(nodes, depth, width, children=children)
    return HeadDrafter(found, policy), rules.get("recursive")


def chain(
    rule: str,
    target: Any,
    head: Any = "mtp",
    gamma: int = 3,
    vocab: int | None = None,
) -> Parts:
    """A chain drawn from the head's own law, ``gamma`` tokens long."""
    policy = Static(shapes.chain(at_least("gamma", gamma)), IID)
    return HeadDrafter(resolve_head(head, target, vocab), policy), rules.get(
        rule
    )


def cape(
    target: Any,
    head: Any = "glide",
    gamma: int = 4,
    bins: Sequence[int] = (5, 4, 3, 2, 1),
    vocab: int | None = None,
) -> Parts:
    """A greedy chain with siblings where the head is unsure."""
    policy = Cape(at_least("gamma", gamma), bins)
    found = resolve_head(head, target, vocab)
    return HeadDrafter(found, policy), rules.get("recursive")


def typical(
    target: Any,
    head: Any = "medusa",
    nodes: int = 10,
    shape: Sequence[int] | str | None = None,
    accept: Accept | None = None,
    epsilon: float = 0.09,
    delta: float | None = None,
) -> Parts:
    """Medusa's own acceptance; lossy at temperatures above 0."""
    drafter, _ = static("recursive", target, head, nodes, shape, accept)
    return drafter, rules.get("typical", epsilon=epsilon, delta=delta)


# Pages of the book; until a notebook is there, its chapter.
HEADS, EAGLE, DYNAMIC = "token/index", "feature/index", "feature/index"
EAGLE3, NEAR = "feature/index", "feature/index"

for line in (
    ("medusa", partial(static, "recursive", head="medusa"),
     "Cai 2024, 2401.10774", HEADS, True, "head-medusa",
     "heads that ignore each other, a tree from measured accuracies"),
    ("medusa_typical", typical, "Cai 2024, 2401.10774", HEADS, False,
     "head-medusa", "LOSSY: Medusa's heads with typical acceptance"),
    ("hydra", partial(static, "recursive", head="hydra"),
     "Ankner 2024, 2402.05109", HEADS, True, "head-hydra",
     "heads that read the path above them"),
    ("hydra_pp", partial(static, "recursive", head="hydra_pp"),
     "Ankner 2024, 2402.05109", HEADS, True, None,
     "Hydra behind one more decoder layer"),
    ("eagle", partial(static, "recursive", head="eagle"),
     "Li 2024, 2401.15077", EAGLE, True, "head-eagle",
     "predicts the next feature; a fixed tree"),
    ("eagle2", partial(dynamic, head="eagle"), "Li 2024, 2406.16858",
     DYNAMIC, True, "head-eagle", "EAGLE-1's head, a tree by confidence"),
    ("hass", partial(dynamic, head="hass"), "Zhang 2024, 2408.15766", NEAR,
     True, "head-hass", "EAGLE's head trained unrolled"),
    ("fr_spec", partial(dynamic, head="eagle", vocab=2048),
     "Zhao 2025, 2502.14856", NEAR, True, "head-eagle",
     "EAGLE-2 drafting only the most frequent words"),
    ("eagle3", dynamic, "Li 2025, 2503.01840", EAGLE3, True, "head-eagle3",
     "three features in, tokens out, trained unrolled"),
    ("mtp", partial(chain, "tokenwise"), "DeepSeek-AI 2024, 2412.19437",
     NEAR, True, None, "one more block that predicts one token more"),
    ("glide", partial(chain, "tokenwise", head="glide"),
     "Du 2024, 2402.02082", NEAR, True, None,
     "a small draft that attends to the target's keys and values"),
    ("glide_cape", cape, "Du 2024, 2402.02082", NEAR, True, None,
     "GLIDE's chain with siblings where it is unsure"),
):
    register(Method(*line))
