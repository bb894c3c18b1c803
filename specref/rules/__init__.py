"""Acceptance rules: pure functions of (tree, target laws, draws)."""

from specref.rules.base import Rule, Verdict
from specref.rules.block import BLOCK
from specref.rules.greedy import GREEDY
from specref.rules.kseq import KSEQ
from specref.rules.lossy import lenience, typical
from specref.rules.naive import NAIVE
from specref.rules.recursive import RECURSIVE
from specref.rules.tokenwise import TOKENWISE
from specref.rules.traversal import TRAVERSAL

LOSSLESS = {
    rule.name: rule
    for rule in (
        GREEDY,
        TOKENWISE,
        RECURSIVE,
        KSEQ,
        NAIVE,
        BLOCK,
        TRAVERSAL,
    )
}
LOSSY = {"typical": typical, "lenience": lenience}

__all__ = [
    "LOSSLESS",
    "LOSSY",
    "Rule",
    "Verdict",
    "get",
    "lenience",
    "names",
    "typical",
]


def names() -> list[str]:
    """Names of all rules, lossless ones first."""
    return [*LOSSLESS, *LOSSY]


def get(name: str, **options: float) -> Rule:
    """The rule of that name; lossy ones take their options.

    Raises:
        ValueError: unknown name.
    """
    if name in LOSSLESS and not options:
        return LOSSLESS[name]
    if name in LOSSY:
        return LOSSY[name](**options)
    raise ValueError(
        f"unknown rule {name!r} (or it takes no options): give one of "
        f"{', '.join(names())}"
    )
