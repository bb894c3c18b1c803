"""Vocabularies as byte strings: how two tokenizers are compared.

A token is the bytes that it writes.  Byte-level tokenizers spell a space
``Ġ``, SentencePiece ones ``▁``; as bytes both are a space, so no sign needs
a rule of its own.  Bytes also have no invalid cuts: a token may end inside
a UTF-8 character, and the text of any sequence of tokens is defined.

Does not handle: tokenizers whose tokens do not spell out the text
(WordPiece, ``</w>`` suffixes); they are refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

_STRAY = re.compile("([\udc80-\udcff]+)")
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_REFUSED = {"WordPiece", "BPEDecoder", "CTC"}


class Vocab:
    """A tokenizer over bytes.

    Args:
        pieces: the bytes of each id; None for an id that is never drafted
            or read (padding of the embedding, holes).
        text: from text to ids, no special tokens added in front.
        special: ids of control tokens; they never equal ordinary ones.
        spare: ids that stand for a byte that no other token spells
            (``<0x41>``): of two ids with the same bytes, not the one meant.
    """

    def __init__(
        self,
        pieces: Sequence[bytes | None],
        text: Callable[[str], Sequence[int]],
        special: Collection[int] = (),
        spare: Collection[int] = (),
    ) -> None:
        self.pieces, self.text = list(pieces), text
        self.special = frozenset(special)
        self.ids: dict[bytes, int] = {}
        order = sorted(range(len(pieces)), key=lambda i: (i in spare, i))
        for i in order:
            if pieces[i] and i not in self.special:
                self.ids.setdefault(pieces[i], i)
        self.longest = max(map(len, self.ids), default=0)

    def __len__(self) -> int:
        return len(self.pieces)

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for padding."""
        known = token < len(self.pieces)
        return (self.pieces[token] or b"") if known else b""

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes of a sequence of tokens."""
        return b"".join(map(self.piece, tokens))

    def encode(self, data: bytes) -> list[int]:
        """Ids of any bytes: the tokenizer's own where they are text.

        Bytes that are not UTF-8 (a character cut at either end) become
        the tokens of single bytes, where the vocabulary has them, and are
        left out otherwise.
        """
        out: list[int] = []
        parts = _STRAY.split(data.decode("utf-8", "surrogateescape"))
        for i, part in enumerate(parts):
            if i % 2:
                raw = part.encode("utf-8", "surrogateescape")
                out += [
                    self.ids[raw[j : j + 1]]
                    for j in range(len(raw))
                    if raw[j : j + 1] in self.ids
                ]
            elif part:
                out += self.text(part)
        return out

    def starts(self, tokens: Sequence[int], size: int) -> list[int] | None:
        """Where each token begins in the ``size`` bytes it was made from.

        One byte too many is the space that SentencePiece puts in front.
        None when the tokens do not spell the bytes out.
        """
        spots, at = [], 0
        for token in tokens:
            spots.append(at)
            at += len(self.piece(token))
        if not 0 <= at - size <= 1:
            return None
        return [max(spot - (at - size), 0) for spot in spots]

    def spell(self, data: bytes) -> list[int] | None:
        """``data`` in the longest pieces from the left; None if a byte is
        in no piece."""
        out, at = [], 0
        while at < len(data):
            for n in range(min(self.longest, len(data) - at), 0, -1):
                if data[at : at + n] in self.ids:
                    break
            else:
                return None
            out.append(self.ids[data[at : at + n]])
            at += n
        return out

    def proceed(self, before: bytes, new: bytes) -> list[int]:
        """Tokens that write ``new`` when ``before`` is written already.

        Both are encoded together.  Tokens that lie in ``new`` are taken;
        one that reaches back into ``before`` can not be, and what it holds
        of ``new`` is spelled in smaller pieces.  Empty if that fails.
        """
        ids = self.encode(before + new)
        left, at = len(new), len(ids)
        while at and len(self.piece(ids[at - 1])) <= left:
            at -= 1
            left -= len(self.piece(ids[at]))
        head = self.spell(new[:left])
        return [] if head is None else head + ids[at:]


def vocab_of(tokenizer: Any) -> Vocab:
    """The vocabulary of a tokenizer, as it is when first seen.

    Args:
        tokenizer: a fast tokenizer of transformers, a
            ``tokenizers.Tokenizer`` or a `Vocab`.
    Raises:
        TypeError: something else.
        ValueError: a kind of tokenizer that this module does not handle.
    """
    if isinstance(tokenizer, Vocab):
        return tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(fast, "to_str"):
        raise TypeError(
            "tokenizer must be a fast tokenizer of transformers, a "
            "tokenizers.Tokenizer or a specref.lm.vocab.Vocab, got "
            f"{type(tokenizer).__name__}"
        )
    return _read(fast)


@functools.lru_cache(maxsize=16)
def _read(fast: Any) -> Vocab:
    """`vocab_of` a ``tokenizers.Tokenizer``."""
    told = json.loads(fast.to_str())
    kinds = set(_types(told["decoder"]))
    if kinds & _REFUSED:
        raise ValueError(
            "tokenizer must spell out its text, got one that decodes by "
            f"{min(kinds & _REFUSED)}: give a byte-level or SentencePiece "
            "tokenizer"
        )
    added = {a["id"]: a for a in told["added_tokens"]}
    names = fast.get_vocab(with_added_tokens=True)
    pieces: list[bytes | None] = [None] * (max(names.values()) + 1)
    spare = []
    marks = "▁" in json.dumps(told["decoder"], ensure_ascii=False)
    for name, i in names.items():
        if "ByteFallback" in kinds and (hit := _BYTE.fullmatch(name)):
            pieces[i] = bytes([int(hit[1], 16)])
            spare.append(i)
        elif i in added:
            pieces[i] = added[i]["content"].encode()
        elif "ByteLevel" in kinds:
            pieces[i] = _from_signs(name)
        else:
            text = name.replace("▁", " ") if marks else name
            pieces[i] = text.encode()
    control = {i for i, a in added.items() if a["special"]} - set(spare)

    def text(words: str) -> list[int]:
        return fast.encode(words, add_special_tokens=False).ids

    return Vocab(pieces, text, control, spare)


def _types(node: Any) -> Iterator[str]:
    """Every ``type`` in a tokenizer's description."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _types(child)


@functools.cache
def _signs() -> dict[str, int]:
    """The sign of each byte in byte-level vocabularies: itself where it
    prints, else the next free sign from U+0100 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in prints]
    signs = {chr(b): b for b in prints}
    return signs | {chr(256 + i): b for i, b in enumerate(rest)}


def _from_signs(name: str) -> bytes | None:
    """The bytes of a byte-level token; None for a name of other signs."""
    known = _signs()
    if any(sign not in known for sign in name):
        return None
    return bytes(known[sign] for sign in name)


def shared(
    target: Vocab,
    draft: Vocab,
    sizes: tuple[int, int],
    ends: tuple[Collection[int], Collection[int]] = ((), ()),
) -> dict[int, int]:
    """Target id -> draft id of every token that both write alike.

    Ordinary tokens match by their bytes, control tokens by their names,
    never one with the other.  The map is one to one.

    Args:
        sizes: how many ids each model has; ids beyond are left out.
        ends: the tokens that end a text of each.  Where their names differ,
            the first of them match all the same: they mean the same.
    """
    out = {}
    for data, i in target.ids.items():
        if data in draft.ids:
            out[i] = draft.ids[data]
    names = {draft.piece(j): j for j in sorted(draft.special)}
    for i in sorted(target.special):
        if target.piece(i) in names:
            out[i] = names.pop(target.piece(i))
    if ends[0] and ends[1] and not any(i in out for i in ends[0]):
        taken = set(out.values())
        free = [j for j in sorted(ends[1]) if j not in taken]
        if free:
            out[min(ends[0])] = free[0]
    return {
        i: j for i, j in out.items() if i < sizes[0] and j < sizes[1]
    }
