"""The training prompts that travel with the library: templates and slots.

What packages add needs downloads; `tests/test_prompts.py` holds the other
side, that evaluation shares nothing with it.
"""

from __future__ import annotations

import json
import re

import pytest

from specref.prompts import KINDS, Prompt, eval_prompts
from specref.train import prompts, templates
from specref.train.templates import expand, fill, order, pick, sections

SLOTS = {"fruit": ["figs", "kiwis"], "name": ["Ada"]}


def test_pick_and_order_depend_on_the_key_only():
    assert [pick(10, "a", 1), pick(10, "a", 1)] == [pick(10, "a", 1)] * 2
    values = [pick(7, "key", i) for i in range(700)]
    assert set(values) == set(range(7))
    assert max(map(values.count, range(7))) < 150  # 100 each, give or take
    items = [str(i) for i in range(20)]
    assert order(items, 1) == order(items[::-1], 1) != order(items, 2)
    assert sorted(order(items, 1)) == sorted(items)
    assert pick(2**63, "a", "bc") != pick(2**63, "ab", "c")


def test_a_slot_is_filled_and_a_second_one_differs():
    for i in range(20):
        text = fill("eat {fruit}, not {fruit2}, {fruit}", SLOTS, i)
        first, second, again = re.findall("figs|kiwis", text)
        assert first == again != second
    assert fill("{name} eats", SLOTS, 0) == "Ada eats"


def test_numbers_keep_to_their_range_and_step():
    seen = {int(fill("{10..30/5}", {}, i)) for i in range(200)}
    assert seen == {10, 15, 20, 25, 30}
    seen = {int(fill("{3..5}", {}, i)) for i in range(100)}
    assert seen == {3, 4, 5}
    pairs = {fill("{0..9} {0..9}", {}, i) for i in range(50)}
    assert any(len(set(p.split())) == 2 for p in pairs)  # drawn apart


def test_a_slot_without_a_section_is_an_error():
    with pytest.raises(ValueError, match="slot 'nut' has no section, in"):
        fill("a {nut}", SLOTS, 0)


def test_a_line_before_the_first_section_is_an_error(tmp_path, monkeypatch):
    pool = tmp_path / "data" / "pool"
    pool.mkdir(parents=True)
    (pool / "x.txt").write_text("# fine\n\nstray\n[prompts]\n")
    monkeypatch.setattr(templates, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"x.txt: line before a \[section\]"):
        sections("x")
    (pool / "x.txt").write_text("[prompts]\none\\ntwo\n# no\n")
    assert sections("x") == {"prompts": ["one\ntwo"]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_template_of_the_library_fills(kind):
    first = list(expand(kind, 3, 0))
    assert first == list(expand(kind, 3, 0))
    assert first != list(expand(kind, 3, 1))
    assert len(set(first)) == len(first) > 40
    for text in first:
        # Braces may come from code, but no slot may be left.
        assert not re.search(r"\{(\w+|\d+\.\.\d+)\}", text), text
        assert text == text.strip()
        assert not text[0].islower()
        assert len(text) <= prompts.MAX_CHARS


@pytest.mark.parametrize("kind", KINDS)
def test_every_slot_is_used_and_has_no_doubles(kind):
    slots = sections(kind)
    lines = slots.pop("prompts")
    assert len(set(lines)) == len(lines)
    text = " ".join(lines)
    for name, entries in slots.items():
        assert len(set(entries)) == len(entries), name
        assert re.search(r"\{%s\d?\}" % name, text), f"{name} is never used"


def test_the_pool_spreads_its_kinds_and_drops_doubles():
    texts = list(prompts.offline_texts())
    long = ("chat", "s", "l", "x" * (prompts.MAX_CHARS + 1))
    pool = prompts._arrange([*texts, *texts[:50], long], seed=0)
    assert len(pool) == len({t[3] for t in texts})
    assert [p.id for p in pool[:2]] == ["train-00000", "train-00001"]
    share = {k: sum(p.kind == k for p in pool) / len(pool) for k in KINDS}
    start = pool[: len(pool) // 5]
    for kind, part in share.items():
        mine = sum(p.kind == kind for p in start) / len(start)
        assert abs(mine - part) < 0.01
    assert pool == prompts._arrange(texts[::-1], seed=0)
    assert pool != prompts._arrange(texts, seed=1)


def test_no_evaluation_prompt_is_in_the_pool():
    pool = {t[3].casefold() for t in prompts.offline_texts()}
    assert not pool & {p.prompt.casefold() for p in eval_prompts()}


def test_the_pool_file_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "pool.jsonl"
    some = [Prompt("train-0", "chat", "s", "l", "zwölf π\nlines")]
    prompts.write_pool(file, some)
    record = json.loads(file.read_text(encoding="utf-8"))
    assert Prompt(**record) == some[0]
    file.unlink()

    def fail():
        yield some[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prompts.write_pool(file, fail())
    assert not file.exists()


# Packages


def test_a_package_file_of_another_content_is_refused(tmp_path):
    from specref.train.sources import JARGON, fetch

    (tmp_path / JARGON.file).write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256 .* expected 17d05997e30e"):
        fetch(JARGON, tmp_path)


def test_a_package_that_can_not_be_fetched_is_named(tmp_path, monkeypatch):
    from specref.train import sources

    monkeypatch.setattr(sources, "_download", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="put dict-foldoc_2023.* into"):
        sources.fetch(sources.FOLDOC, tmp_path)
