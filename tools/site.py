"""What the checks of the built book share: its pages, and what was skipped.

A check that needs a program this machine lacks calls `absent`: it says so
out loud, leaves a note that ``make test`` repeats at its end, and fails
when ``SPECREF_STRICT=1`` (as CI sets it).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
NOTES = ROOT / "_build" / "not_checked.txt"
VOID = frozenset(
    "area base br col embed hr img input link meta source track wbr".split()
)


def absent(what: str, program: str) -> int:
    """Report a check that could not run; the exit status to end with."""
    strict = os.environ.get("SPECREF_STRICT", "") not in ("", "0")
    note(f"{what}, because this machine has no {program}")
    return int(strict)


def note(what: str) -> None:
    """Say, now and at the end of ``make test``, what was not checked."""
    line = f"NOT CHECKED: {what}"
    print(line, file=sys.stderr)
    NOTES.parent.mkdir(exist_ok=True)
    with NOTES.open("a") as notes:
        print(line, file=notes)


def listed(toc: Path = ROOT / "_toc.yml") -> list[str]:
    """Every page of the table of contents, root first, without suffix."""
    import yaml

    return list(_files(yaml.safe_load(toc.read_text())))


def _files(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _files(item)
    elif isinstance(node, dict):
        if "root" in node:
            yield node["root"]
        if "file" in node:
            yield node["file"]
        for key in ("parts", "chapters", "sections"):
            yield from _files(node.get(key, []))


def pages(html: Path = HTML) -> list[Path]:
    """The built pages of the table of contents.

    Raises:
        SystemExit: a page is missing.
    """
    found = [html / f"{name}.html" for name in listed()]
    missing = [str(p.relative_to(html)) for p in found if not p.exists()]
    if missing:
        sys.exit(f"not built: {', '.join(missing)}; run make html first")
    return found


class Elements(HTMLParser):
    """Walks a page and keeps the text inside elements of one class.

    Attributes:
        found: ``(tag, text)`` of each outermost matching element.
        tags: ``(tag, attributes)`` of every element.
    """

    def __init__(self, cls: str = "", without: str = "") -> None:
        super().__init__()
        self.cls, self.without = cls, without
        self.found: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._open: list[tuple[bool, bool]] = []  # (inside, muted) per level

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        values = {k: v or "" for k, v in attrs}
        self.tags.append((tag, values))
        if tag in VOID:
            return
        inside, muted = self._open[-1] if self._open else (False, False)
        names = values.get("class", "").split()
        if self.cls in names and not inside:
            self.found.append((tag, ""))
            inside = True
        self._open.append((inside, muted or self.without in names))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == (True, False):
            tag, text = self.found[-1]
            self.found[-1] = (tag, text + data)


def read(page: Path, cls: str = "", without: str = "") -> Elements:
    """Parse a built page."""
    parser = Elements(cls, without)
    parser.feed(page.read_text(encoding="utf-8"))
    return parser
