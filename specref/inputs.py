"""Prompts and stops as users give them -> what the loop takes.

Does not handle: chat formatting (`specref.lm.zoo.Loaded.encode`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any


def encode(
    prompt: Any, target: Any, tokenizer: Any, vocab_size: int, chat: bool
) -> tuple[list[list[int]], bool]:
    """Token ids per row, and whether a single prompt was given.

    Args:
        prompt: text, token ids (a list, tensor or array of integers), or
            a list of either.
        target: encodes texts; used when there is a ``tokenizer``.
        chat: format texts as a user's turn.
    Raises:
        TypeError: something else.
        ValueError: an empty prompt, ids outside the vocabulary, or text
            for a target without a tokenizer.
    """
    if hasattr(prompt, "tolist"):  # a tensor or an array
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise _not_a_prompt(prompt)
    if not isinstance(prompt, str) and not len(prompt):
        raise ValueError("prompt must have at least one token, got none")
    single = isinstance(prompt, str) or not _is_row(prompt[0])
    rows = []
    for item in [prompt] if single else prompt:
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError(
                    "prompt is text but the target has no tokenizer: pass "
                    "token ids, or a model from specref.load"
                )
            item = target.encode(item, chat) if item else []
        rows.append(_ids(item, vocab_size))
    return rows, single


def _is_row(item: Any) -> bool:
    return isinstance(item, Sequence) or getattr(item, "ndim", 0) > 0


def _ids(item: Any, vocab_size: int) -> list[int]:
    try:
        row = [index(t) for t in item]
    except TypeError as error:
        raise _not_a_prompt(item) from error
    if not row:
        raise ValueError("prompt must have at least one token, got none")
    for token in row:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt holds token {token}, outside the target's "
                f"vocabulary of {vocab_size}"
            )
    return row


def _not_a_prompt(what: Any) -> TypeError:
    return TypeError(
        f"prompt must be text, token ids, or a list of either, got {what!r}"
    )


def stopper(stop: Any, tokenizer: Any) -> Callable | None:
    """A function of a row's new tokens from texts or a function.

    Raises:
        ValueError: an empty text, or text without a tokenizer.
    """
    if stop is None or callable(stop):
        return stop
    texts = [stop] if isinstance(stop, str) else list(stop)
    if tokenizer is None:
        raise ValueError(
            "stop is text but the target has no tokenizer: pass a function "
            "of the new tokens instead"
        )
    if not all(texts):
        raise ValueError("stop must not hold an empty text")
    reach = max(map(len, texts), default=0)

    def ended(tokens: Sequence[int]) -> bool:
        # A token has at least one character, or joins one: look back far
        # enough for the longest text in the worst case.
        tail = tokenizer.decode(tokens[-(4 * reach + 8) :])
        return any(text in tail for text in texts)

    return ended
