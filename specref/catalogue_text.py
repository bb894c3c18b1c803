"""The methods whose draft has another tokenizer than the target."""

from __future__ import annotations

from typing import Any

from specref import rules
from specref.catalogue import at_least
from specref.draft import shapes
from specref.draft.grow import Static
from specref.draft.tli import SharedDrafter
from specref.draft.universal import UniversalDrafter
from specref.lm.pairs import pair
from specref.lm.vocab import shared
from specref.registry import Method, Parts, register
from specref.tree import IID


def universal(
    target: Any,
    draft: Any = "other",
    gamma: int = 6,
    stop_below: float | None = 0.3,
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
) -> Parts:
    """The draft's text, encoded again in the target's tokens.

    ``tokenizer`` is the target's; `specref.generate` fills it in.
    """
    both = pair(target, draft, tokenizer, draft_tokenizer)
    at_least("gamma", gamma)
    drafter = UniversalDrafter(
        both.lm, both.source, both.into, gamma, stop_below
    )
    return drafter, rules.get("naive")


def tli(
    target: Any,
    draft: Any = "other",
    gamma: int = 3,
    stop_below: float | None = None,
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
) -> Parts:
    """A chain of tokens that both vocabularies have.

    ``tokenizer`` is the target's; `specref.generate` fills it in.

    Raises:
        ValueError: the vocabularies share no token.
    """
    both = pair(target, draft, tokenizer, draft_tokenizer)
    sizes = (target.vocab_size, both.lm.vocab_size)
    ends = (getattr(target, "eos", ()), getattr(both.lm, "eos", ()))
    same = shared(both.source, both.into, sizes, ends)
    if not same:
        raise ValueError(
            "draft must share a token with the target, got two "
            "vocabularies without one: use method='universal'"
        )
    policy = Static(shapes.chain(at_least("gamma", gamma)), IID, stop_below)
    drafter = SharedDrafter(
        both.lm, both.source, both.into, same, target.vocab_size, policy
    )
    return drafter, rules.get("tokenwise")


PAGE = "token/index"

for line in (
    ("universal", universal, "Timor 2025, 2502.05202", PAGE, True, None,
     "another tokenizer's draft, through its text; exact match"),
    ("tli", tli, "Timor 2025, 2502.05202", PAGE, True, None,
     "another tokenizer's draft, in the tokens that both have"),
):
    register(Method(*line))
