"""The training prompts: what the target is asked, to learn from its answers.

Unique data limits a draft, so the pool is wide: templates with large slot
lists that travel with the library, and texts of pinned packages.  The same
seed gives the same pool, in the same order; any beginning of it holds the
four kinds about evenly.

``python -m specref.train.prompts FILE`` writes the pool as JSON lines.

Does not handle: answers (`specref.train.respond`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from specref.prompts import KINDS, Prompt
from specref.train import sources
from specref.train.templates import expand, order, pick

MAX_CHARS = 1000  # about 250 tokens
_PER_TEMPLATE = {"chat": 14, "code": 14, "summarise": 24, "arithmetic": 18}
_UNFIT = re.compile(r"nazi|hitler|sex|fuck|shit|kill|suicide|http", re.I)
_TERM = (
    "What is {}?",
    "Explain {} in simple terms.",
    "What does the term {} mean in computing?",
    "Give an example of {}.",
    "Why does {} matter to programmers?",
)
_SHORTEN = (
    "Summarise this text in one or two sentences:\n\n{}",
    "Give a short summary of the following passage.\n\n{}",
    "What are the main points of this text?\n\n{}",
    "{}\n\nSummarise the text above in your own words.",
    "Rewrite this more simply:\n\n{}",
    "Explain the following text to a child:\n\n{}",
    "{}\n\nTL;DR",
    "Write a title and a brief summary for this passage:\n\n{}",
)
_NOVEL = (
    "Summarise this passage from a novel:\n\n{}",
    "What happens in this passage?\n\n{}",
    "Describe the mood of this passage and the people in it:\n\n{}",
    "Rewrite this passage in modern English:\n\n{}",
    "Continue this story:\n\n{}",
    "Sum up the following passage in two sentences.\n\n{}",
    "{}\n\nIn a few words, what is the passage above about?",
)
_SOLVE = (
    "Write a Python function for this problem: {}",
    "{} Write a Python program that answers this.",
    "How would you solve this with Python? {}",
    "{} Explain an algorithm for this in a few steps.",
)
_READ = (
    "Explain what this Python code does:\n\n```python\n{}\n```",
    "Add comments to this Python code:\n\n```python\n{}\n```",
    "How could this code be improved?\n\n```python\n{}\n```",
)

Text = tuple[str, str, str, str]  # kind, source, licence, prompt


def offline_texts(seed: int = 0) -> Iterator[Text]:
    """The part of the pool that needs no download."""
    for kind in KINDS:
        for text in expand(kind, _PER_TEMPLATE[kind], seed):
            yield kind, "specref-templates", "CC0-1.0", text


def _ask(items: Iterable[str], ways: tuple[str, ...], n: int, *key: object
         ) -> Iterator[str]:
    """``n`` of the items, each asked in one of the ``ways``."""
    for item in order(list(dict.fromkeys(items)), *key)[:n]:
        yield ways[pick(len(ways), *key, item)].replace("{}", item)


def package_texts(seed: int, cache: Path) -> Iterator[Text]:
    """The part of the pool that comes from packages.

    Raises:
        FileNotFoundError: naming the package that is missing.
    """
    chat, reason = sources.CHATTERBOT, sources.REASONING
    for text in sources.chat_turns(cache):
        yield "chat", chat.name, chat.licence, text
    for text in sources.word_problems(cache, 9, seed):
        yield "arithmetic", reason.name, reason.licence, text
    for package, read, n in (
        (sources.FOLDOC, sources.foldoc, 350),
        (sources.JARGON, sources.jargon, 200),
    ):
        entries = read(cache)
        good = [(t, e) for t, e in entries if 250 <= len(e) <= 900
                and 3 <= len(t) <= 40 and not _UNFIT.search(t + e)]
        terms = _ask([t for t, _ in good], _TERM, n // 2, seed, "term")
        texts = _ask([e for _, e in good], _SHORTEN, n, seed, "entry")
        for kind, group in (("chat", terms), ("summarise", texts)):
            for text in group:
                yield kind, package.name, package.licence, text
    novel = sources.AUSTEN
    good = [p for p in sources.austen(cache) if 250 <= len(p) <= 900]
    for text in _ask(good, _NOVEL, 1000, seed, "novel"):
        yield "summarise", novel.name, novel.licence, text
    for text in _code_texts(seed, cache):
        yield "code", reason.name, reason.licence, text


def _code_texts(seed: int, cache: Path) -> Iterator[str]:
    tasks = sources.code_tasks(cache)
    short = [t["task_description"] for t in tasks
             if len(t["task_description"]) <= 320]
    yield from _ask(short, _SOLVE, 550, seed, "solve")
    bodies = (re.sub(r"^# .*\n+", "", t["code_sample"], flags=re.M).strip()
              for t in tasks)
    yield from _ask((b for b in bodies if len(b) <= 900), _READ, 300,
                    seed, "read")
    for t in tasks:
        head = re.search(r"^def main_solution\(.*\):$", t["code_sample"], re.M)
        about = t["task_description"]
        if head and len(about) <= 300 and not pick(6, seed, about):
            stub = head[0].replace("main_solution", "solve")
            yield ("Complete this Python function:\n\n```python\n"
                   f'{stub}\n    """{about}"""\n```')


def training_prompts(
    seed: int = 0, cache: Path | str | None = None
) -> list[Prompt]:
    """The pool, shuffled, kinds in turn as long as each lasts.

    Args:
        seed: of the choice and the order.
        cache: folder of the package files; None for
            ``~/.cache/specref/sources``.
    Raises:
        FileNotFoundError: when a package can not be fetched.
        ValueError: when a package file is not the pinned one.
    """
    where = Path(cache or Path.home() / ".cache" / "specref" / "sources")
    return _arrange([*offline_texts(seed), *package_texts(seed, where)], seed)


def _arrange(texts: Iterable[Text], seed: int) -> list[Prompt]:
    """Drops doubles and long ones; spreads the kinds over the list."""
    by_text = {t[3]: t for t in texts if len(t[3]) <= MAX_CHARS}
    groups = {
        kind: order([x for x, t in by_text.items() if t[0] == kind], seed)
        for kind in KINDS
    }
    place = {
        text: (i + 0.5) / len(group)
        for group in groups.values() for i, text in enumerate(group)
    }
    ordered = sorted(by_text, key=lambda x: (place[x], x))
    return [
        Prompt(f"train-{i:05d}", *by_text[text])
        for i, text in enumerate(ordered)
    ]


def write_pool(file: Path, prompts: Iterable[Prompt]) -> None:
    """JSON lines, complete or not at all."""
    part = file.with_suffix(".part")
    lines = (json.dumps(asdict(p), ensure_ascii=False) for p in prompts)
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.rename(file)


if __name__ == "__main__":
    write_pool(Path(sys.argv[1]), training_prompts(0, *sys.argv[2:3]))
