"""Small real tokenizers whose tokens disagree about where they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer


def bpe(tokens: Sequence[str], special: Sequence[str] = ()) -> Tokenizer:
    """A BPE of these tokens: ids in order, each longer one a merge of two
    earlier ones (``special`` ids come last)."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        cuts = [(token[:n], token[n:]) for n in range(1, len(token))]
        merges += [cut for cut in cuts if set(cut) <= set(tokens)]
    out = Tokenizer(models.BPE(vocab=ids, merges=merges))
    out.add_special_tokens([AddedToken(s, special=True) for s in special])
    return out


def pair3() -> dict[str, Any]:
    """Options for three target and three draft tokens over two letters:
    two shared, one of each that the other lacks."""
    return {
        "tokenizer": bpe(["a", "b", "ab"]),
        "draft_tokenizer": bpe(["b", "a", "ba"]),
    }


def pair23() -> dict[str, Any]:
    """Options for models of 23 tokens, half of them shared."""
    letters = "abcdefghijklmno"
    mine = [*letters, "ab", "cd", "ef", "gh", "abc", "ij", "kl", "mn"]
    theirs = [*letters[::-1], "bc", "ab", "fg", "hi", "bcd", "jk", "lm", "no"]
    return {"tokenizer": bpe(mine), "draft_tokenizer": bpe(theirs)}


TEXT = (
    "The naïve café in Zürich opens at 8; 日本語 text and emoji 🎉🎉 too.\n"
    "def f(x):\n    return x + 1\n\n"
    "Привет, мир! The quick brown fox jumps over the lazy dog.\n"
)


def byte_level(size: int, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE learnt from a text of many scripts."""
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    out.train_from_iterator([TEXT] * 4, trainer)
    return out


def marked(size: int, special: Sequence[str] = ()) -> Tokenizer:
    """A BPE in SentencePiece's manner: ``▁`` for a space, one in front of
    the text, single bytes where no token fits."""
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    kinds = [decoders.Replace("▁", " "), decoders.ByteFallback()]
    kinds += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    out = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    out.pre_tokenizer = pre_tokenizers.Metaspace()
    out.decoder = decoders.Sequence(kinds)
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", *special, *fallback],
        initial_alphabet=sorted(set("▁etaonrsif")),
        limit_alphabet=30,
        show_progress=False,
    )
    out.train_from_iterator([TEXT.split("日")[0]] * 4, trainer)
    return out
