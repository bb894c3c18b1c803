"""The methods: how each name puts its drafter and its rule together.

One builder per way of drafting, one `register` line per method.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from specref import rules
from specref.draft import shapes
from specref.draft.dynamic import Dynamic
from specref.draft.early_exit import EarlyExit
from specref.draft.grow import Static
from specref.draft.lengths import schedule as by_name
from specref.draft.lookup import PromptLookup
from specref.draft.measure import shipped_acceptance
from specref.draft.model import ModelDrafter
from specref.draft.none import NoDraft
from specref.lm.drafts import resolve
from specref.registry import Method, Parts, register
from specref.tree import DETERMINISTIC, IID, WITHOUT_REPLACEMENT


def at_least(name: str, value: Any, least: int = 1) -> int:
    """``value`` when it is a whole number of at least ``least``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def plain(target: Any) -> Parts:
    """No draft: plain decoding, one token per target call."""
    return NoDraft(), rules.get("naive")


def chain(
    rule: str, target: Any, draft: Any = "middle", gamma: int = 4
) -> Parts:
    """``gamma`` i.i.d. draft tokens in a row, judged by ``rule``."""
    policy = Static(shapes.chain(at_least("gamma", gamma)), IID)
    return ModelDrafter(resolve(draft, target), policy), rules.get(rule)


def copy(
    draft: str,
    target: Any,
    gamma: int = 8,
    stop_below: float | None = 0.4,
) -> Parts:
    """A chain from a quantised copy of the target.

    ``stop_below`` ends it where the copy's own confidence is lower.
    """
    policy = Static(shapes.chain(at_least("gamma", gamma)), IID, stop_below)
    drafter = ModelDrafter(resolve(draft, target), policy)
    return drafter, rules.get("tokenwise")


def assisted(
    target: Any,
    draft: Any = "middle",
    gamma: int = 5,
    schedule: str = "heuristic_transient",
    stop_below: float | None = 0.4,
    max_gamma: int = 20,
) -> Parts:
    """A chain whose length follows transformers' schedules."""
    length = by_name(
        schedule, at_least("gamma", gamma), at_least("max_gamma", max_gamma)
    )
    policy = Static(shapes.chain(max_gamma), IID, stop_below)
    drafter = ModelDrafter(resolve(draft, target), policy, length)
    return drafter, rules.get("tokenwise")


def tree(
    rule: str,
    kind: str,
    target: Any,
    draft: Any = "middle",
    widths: Sequence[int] = (3, 2, 1),
    shape: Sequence[int] | None = None,
) -> Parts:
    """A tree of ``widths`` children per level, or of any ``shape``."""
    parents = shapes.branching(widths) if shape is None else shape
    policy = Static(parents, kind)
    return ModelDrafter(resolve(draft, target), policy), rules.get(rule)


def spectr(
    target: Any, draft: Any = "middle", k: int = 3, gamma: int = 3
) -> Parts:
    """``k`` i.i.d. chains of ``gamma`` tokens, judged by k-SEQ."""
    parents = shapes.chains(at_least("k", k), at_least("gamma", gamma))
    policy = Static(parents, IID)
    return ModelDrafter(resolve(draft, target), policy), rules.get("kseq")


def sequoia(
    target: Any,
    draft: Any = "middle",
    nodes: int = 12,
    depth: int | None = 6,
    accept: Sequence[float] | None = None,
) -> Parts:
    """The tree that is best for acceptance rates ``accept`` by rank."""
    if accept is None:
        accept = shipped_acceptance(draft)
    parents = shapes.sequoia(accept, at_least("nodes", nodes), depth)
    policy = Static(parents, WITHOUT_REPLACEMENT)
    drafter = ModelDrafter(resolve(draft, target), policy)
    return drafter, rules.get("recursive")


def dynamic(
    target: Any,
    draft: Any = "middle",
    nodes: int = 12,
    depth: int = 6,
    width: int = 3,
    stop_below: float = 0.0,
) -> Parts:
    """A tree grown where the draft is confident (EAGLE-2)."""
    for name, value in (("nodes", nodes), ("depth", depth), ("width", width)):
        at_least(name, value)
    policy = Dynamic(nodes, depth, width, stop_below)
    drafter = ModelDrafter(resolve(draft, target), policy)
    return drafter, rules.get("recursive")


def lookup(target: Any, gamma: int = 10, ngram: int = 2) -> Parts:
    """What followed the last ``ngram`` tokens earlier in the text."""
    at_least("gamma", gamma)
    return PromptLookup(gamma, at_least("ngram", ngram)), rules.get("naive")


def early_exit(target: Any, layers: int = 10, gamma: int = 3) -> Parts:
    """A chain from the target's own first ``layers`` layers."""
    policy = Static(shapes.chain(at_least("gamma", gamma)), IID)
    drafter = ModelDrafter(EarlyExit(target, layers), policy)
    return drafter, rules.get("tokenwise")


def typical(
    target: Any,
    draft: Any = "middle",
    widths: Sequence[int] = (3, 2, 1),
    epsilon: float = 0.09,
    delta: float | None = None,
) -> Parts:
    """Typical acceptance over a tree of top tokens; lossy."""
    policy = Static(shapes.branching(widths), DETERMINISTIC)
    rule = rules.get("typical", epsilon=epsilon, delta=delta)
    return ModelDrafter(resolve(draft, target), policy), rule


def lenience(
    target: Any, draft: Any = "middle", gamma: int = 4, factor: float = 0.5
) -> Parts:
    """A chain whose acceptance is raised by ``factor``; lossy."""
    policy = Static(shapes.chain(at_least("gamma", gamma)), IID)
    rule = rules.get("lenience", factor=factor)
    return ModelDrafter(resolve(draft, target), policy), rule


MIDDLE = "draft-middle"
# Pages of the book; a method without a notebook yet names its chapter.
LOOP, ACCEPT, SPEED = "start/loop", "token/acceptance", "token/speedup"
TOKEN, MANY = "token/index", "token/candidates"
TREES, BLOCK = "token/trees", "token/block"

for line in (
    ("autoregressive", plain, "none", LOOP, True, None,
     "one token per target call: the baseline"),
    ("speculative", partial(chain, "tokenwise"), "Leviathan 2023, 2211.17192",
     ACCEPT, True, MIDDLE, "a chain from a draft model, token-wise rejection"),
    ("block", partial(chain, "block"), "Sun 2024, 2403.10444", BLOCK, True,
     MIDDLE, "a chain, verified as a block: never accepts less"),
    ("int4", partial(copy, "int4"), "Leviathan 2023, 2211.17192", SPEED, True,
     None, "the target's own int4 copy drafts a chain until it is unsure"),
    ("int8", partial(copy, "int8"), "Leviathan 2023, 2211.17192", SPEED, True,
     None, "the target's own int8 copy drafts a chain until it is unsure"),
    ("assisted", assisted, "Gante 2023, assisted generation", SPEED, True,
     MIDDLE, "transformers' schedules and confidence stop, lossless form"),
    ("early_exit", early_exit, "Elhoushi 2024, 2404.16710", SPEED, True, None,
     "the target's first layers draft a chain"),
    ("prompt_lookup", lookup, "Saxena 2023, prompt lookup decoding", TOKEN,
     True, None, "copies what followed the same words before; no model"),
    ("spectr", spectr, "Sun 2023, 2310.15141", MANY, True, MIDDLE,
     "k i.i.d. chains, k-SEQ"),
    ("specinfer", partial(tree, "recursive", IID), "Miao 2024, 2305.09781",
     MANY, True, MIDDLE, "a tree of i.i.d. children, recursive rejection"),
    ("naive", partial(tree, "naive", IID), "Miao 2024, 2305.09781", MANY,
     True, MIDDLE, "a tree followed by the target's own draws: the baseline"),
    ("rsd", partial(tree, "recursive", WITHOUT_REPLACEMENT),
     "Jeon 2024, 2402.14160", MANY, True, MIDDLE,
     "a tree drawn without replacement, recursive rejection"),
    ("topk_tree", partial(tree, "recursive", DETERMINISTIC),
     "Li 2024, 2401.15077", MANY, True, MIDDLE,
     "a tree of top-k children, EAGLE's acceptance"),
    ("traversal", partial(tree, "traversal", WITHOUT_REPLACEMENT),
     "Weng 2025, 2505.12398", BLOCK, True, MIDDLE,
     "a tree judged from its leaves to its root"),
    ("sequoia", sequoia, "Chen 2024, 2402.12374", TREES, True, MIDDLE,
     "the best tree shape for measured acceptance"),
    ("dynamic", dynamic, "Li 2024, 2406.16858", TREES, True, MIDDLE,
     "a tree grown where the draft is confident"),
    ("typical", typical, "Cai 2024, 2401.10774", TOKEN, False, MIDDLE,
     "LOSSY: typical acceptance on a top-k tree"),
    ("lenience", lenience, "Leviathan 2023, 2211.17192", SPEED, False, MIDDLE,
     "LOSSY: acceptance with lenience"),
):
    register(Method(*line))
