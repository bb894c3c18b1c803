"""Vocabularies as bytes: maps, cuts inside characters, readers."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from toy_vocab import TEXT, bpe, byte_level, marked

from specref.lm.reader import Reader
from specref.lm.vocab import Vocab, shared, vocab_of


@pytest.fixture(scope="module")
def both():
    return vocab_of(byte_level(340)), vocab_of(marked(330))


def rows(vocab: Vocab, count: int, seed: int) -> list[list[int]]:
    """Random sequences: most cut or break characters."""
    rng = random.Random(seed)
    ids = [i for i in range(len(vocab)) if i not in vocab.special]
    return [rng.choices(ids, k=rng.randint(1, 40)) for _ in range(count)]


@pytest.mark.parametrize("which", [0, 1])
def test_any_bytes_have_tokens(both, which):
    vocab = both[which]
    for row in rows(vocab, 200, which):
        data = vocab.decode(row)
        again = vocab.decode(vocab.encode(data))
        if which == 0:
            assert again == data
        else:  # a space in front of each piece of text that is encoded
            assert again.replace(b" ", b"") == data.replace(b" ", b"")


@pytest.mark.parametrize("which", [0, 1])
def test_what_follows_spells_exactly_what_is_new(both, which):
    """At every cut, inside tokens and inside characters."""
    vocab, data = both[which], TEXT.split("日")[0].encode()[:70]
    for cut in range(len(data)):
        got = vocab.proceed(data[:cut], data[cut:])
        assert vocab.decode(got) == data[cut:]
    for row in rows(both[0], 100, 7):
        data = both[0].decode(row)
        cut = len(data) // 2
        got = both[0].proceed(data[:cut], data[cut:])
        assert both[0].decode(got) == data[cut:]


def test_what_follows_is_the_tokenizers_own_cut():
    """Where a token ends at the joint the rest is canonical; where one
    spans it, what is new of it is spelled in smaller pieces."""
    vocab = vocab_of(bpe(["a", "b", "c", "ab", "bc", "abc"]))
    assert vocab.encode(b"abcabc") == [5, 5]
    assert vocab.proceed(b"abc", b"abc") == [5]
    assert vocab.proceed(b"a", b"bcabc") == [4, 5]
    assert vocab.proceed(b"ab", b"cab") == [2, 3]
    assert vocab.proceed(b"", b"ab") == [3]
    assert vocab.proceed(b"ab", b"") == []


def test_what_can_not_be_spelled_is_not_proposed():
    whole = Vocab([b"a", b"xy"], lambda text: [1] if text == "xy" else [0])
    assert whole.proceed(b"x", b"y") == []
    assert whole.spell(b"aay") is None


def test_a_space_is_a_space(both):
    """``Ġ`` and ``▁`` are one sign, and so are bytes and ``<0x..>``."""
    mine, theirs = both
    same = shared(mine, theirs, (len(mine), len(theirs)))
    assert all(mine.piece(i) == theirs.piece(j) for i, j in same.items())
    assert len(set(same.values())) == len(same)
    found = {mine.piece(i) for i in same}
    assert b" The" in found and "é".encode() in found
    # A byte that is also an ordinary token: the token is meant.
    e = theirs.ids[b"e"]
    assert same[mine.ids[b"e"]] == e and theirs.pieces.count(b"e") == 2
    names = marked(330).get_vocab()
    assert names["e"] == e != names["<0x65>"]


def test_control_tokens_match_by_name_and_ends_by_meaning():
    mine = vocab_of(bpe(["a", "b", "<x>"], ["<sep>", "<end>"]))
    theirs = vocab_of(bpe(["b", "<", "x"], ["<x>", "</s>", "<sep>"]))
    assert shared(mine, theirs, (5, 6)) == {1: 0, 3: 5}
    ends = ({4}, {4})
    assert shared(mine, theirs, (5, 6), ends) == {1: 0, 3: 5, 4: 4}


def test_ids_beyond_a_model_are_not_shared():
    one, two = vocab_of(bpe(["a", "b", "c"])), vocab_of(bpe(["c", "b", "a"]))
    assert shared(one, two, (3, 3)) == {0: 2, 1: 1, 2: 0}
    assert shared(one, two, (2, 3)) == {0: 2, 1: 1}
    assert shared(one, two, (3, 2)) == {1: 1, 2: 0}
    assert one.decode([0, 7, 2]) == b"ac"  # padding writes nothing


def test_tokenizers_that_do_not_spell_are_refused():
    words = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="that decodes by WordPiece"):
        vocab_of(words)
    with pytest.raises(TypeError, match="got int"):
        vocab_of(3)
    with pytest.raises(TypeError, match="got dict"):
        vocab_of({})


@pytest.mark.parametrize("behind", [0, 4, 24])
def test_a_reader_reads_what_was_written(both, behind):
    """Token by token, through characters cut in two."""
    mine, theirs = both
    for source, into in (both, both[::-1], (mine, mine)):
        row = source.encode((TEXT * 3).encode())
        reader = Reader(source, into, behind)
        for n, token in enumerate(row, 1):
            ids = reader.add([token])
            data = source.decode(row[:n])
            if into is mine:
                assert into.decode(ids) == data
        assert ids == into.encode(data)


def test_a_reader_goes_back_no_further_than_it_must(both):
    """Most of a long text is not encoded again."""
    mine, _ = both
    sizes = []

    def counted(text: str) -> list[int]:
        sizes.append(len(text))
        return mine.text(text)

    reader = Reader(mine, Vocab(mine.pieces, counted), 24)
    row = mine.encode((TEXT * 8).encode())
    for token in row:
        reader.add([token])
    assert reader.ids == row
    assert sum(sizes) / len(row) < 120 < len(reader.data) / 8


def test_random_rows_never_break_a_reader(both):
    for source, into in (both, both[::-1]):
        for row in rows(source, 60, 3):
            reader = Reader(source, into, 8)
            for token in row:
                reader.add([token])
            got = into.decode(reader.ids)
            want = source.decode(row)
            assert got.replace(b" ", b"") == want.replace(b" ", b"")
