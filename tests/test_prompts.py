"""The evaluation prompts: what they hold, and that training never saw them."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest

from specref.prompts import KINDS, eval_prompts
from specref.train import sources
from specref.train.prompts import offline_texts

DATA = files("specref") / "data"
TRAINING = {"specref-templates", *(p.name for p in sources.PACKAGES)}


def grams(text: str, n: int = 8) -> set[tuple[str, ...]]:
    """Runs of ``n`` words, case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def licences(part: str) -> dict[str, str]:
    """source -> licence, from the table of one part of LICENCES.md."""
    text = (DATA / "LICENCES.md").read_text(encoding="utf-8")
    section = next(s for s in text.split("\n## ") if s.startswith(part))
    found = re.findall(r"^\| `([\w-]+)` \| ([\w.-]+)", section, re.M)
    return dict(found)


def test_every_kind_has_24_prompts_and_kinds_alternate():
    every = eval_prompts()
    assert [p.kind for p in every] == [*KINDS] * 24
    for kind in KINDS:
        mine = eval_prompts(kind)
        assert [p for p in every if p.kind == kind] == mine
        assert [p.id for p in mine] == [f"{kind}-{i:02d}" for i in range(24)]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of .* got 'poem'"):
        eval_prompts("poem")


def test_ids_and_texts_are_unique_and_every_field_is_filled():
    every = eval_prompts()
    for field in ("id", "prompt"):
        assert len({getattr(p, field) for p in every}) == len(every)
    lines = (DATA / "eval_prompts.jsonl").read_text(encoding="utf-8")
    for line in lines.splitlines():
        record = json.loads(line)
        assert list(record) == ["id", "kind", "source", "licence", "prompt"]
        assert all(v and v == v.strip() for v in record.values())


def test_licences_are_named_where_the_sources_are():
    named = licences("Evaluation")
    assert {p.source: p.licence for p in eval_prompts()} == named
    training = licences("Training")
    assert training.keys() == TRAINING
    for package in sources.PACKAGES:
        assert training[package.name] == package.licence


def test_no_source_serves_training_and_evaluation():
    assert {p.source for p in eval_prompts()}.isdisjoint(TRAINING)
    assert {t[1] for t in offline_texts()} <= TRAINING


def test_no_eight_words_in_a_row_come_from_the_templates():
    pool = set().union(*(grams(t[3]) for t in offline_texts()))
    assert len(pool) > 10_000
    shared = {p.id: grams(p.prompt) & pool for p in eval_prompts()}
    assert {k: v for k, v in shared.items() if v} == {}


def test_the_overlap_check_can_fail():
    text = next(t[3] for t in offline_texts() if len(t[3].split()) > 12)
    assert grams(f"Please answer. {text}") & grams(text)


def test_code_prompts_are_python_that_parses():
    import ast

    for p in eval_prompts("code"):
        body = re.search(r"```python\n(.*)\n```$", p.prompt, re.S)[1]
        tree = ast.parse(body)
        last = tree.body[-1]
        assert isinstance(last, ast.FunctionDef)
        assert ast.get_docstring(last)


def test_prompts_have_10_to_250_tokens(real):
    for p in eval_prompts():
        assert 10 <= len(real.encode(p.prompt, chat=False)) <= 250, p.id
