"""Every module has its place in the API reference, and only real ones do."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "book" / "api"


def modules() -> set[str]:
    """Dotted names of the library's modules, private ones left out."""
    names = set()
    for file in (ROOT / "specref").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            names.add(".".join(parts))
    return names


def documented() -> list[str]:
    text = "\n".join(p.read_text() for p in sorted(PAGES.glob("*.md")))
    return re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)


def test_every_module_is_documented_once():
    found = documented()
    assert len(found) == len(set(found))
    packages = {name for name in found if name not in modules()}
    assert modules() - set(found) == set()
    for name in packages:
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists()


def test_every_page_is_reached_from_the_index_and_the_contents():
    index = (PAGES / "index.md").read_text()
    contents = (ROOT / "_toc.yml").read_text()
    for page in PAGES.glob("*.md"):
        if page.stem != "index":
            assert f"({page.name})" in index
        assert f"book/api/{page.stem}" in contents
