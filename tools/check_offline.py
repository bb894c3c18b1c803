"""No built page needs a host outside the book.

    python tools/check_offline.py

Scripts, styles, fonts, images and frames must be local.  Ordinary links may
point anywhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.site import HTML, read  # noqa: E402

EXTERNAL = re.compile(r"^\s*(?:https?:)?//", re.I)
# Links that a browser fetches by itself; rel=canonical, next, ... are not.
FETCHED = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}
FETCHED |= {"preconnect", "dns-prefetch", "prefetch", "shortcut"}
IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')]+)")
IN_SCRIPT = re.compile(
    r"(?:import|fetch|importScripts)\s*\(\s*[\"'](https?://[^\"']+)"
    r"|from\s*[\"'](https?://[^\"']+)"
)


def wanted(tag: str, attrs: dict[str, str]) -> Iterator[str]:
    """Addresses that a browser fetches because of one element."""
    if tag == "link":
        if FETCHED & set(attrs.get("rel", "").lower().split()):
            yield attrs.get("href", "")
    elif tag != "a":
        yield from (attrs.get(k, "") for k in ("src", "poster", "data"))
        for part in attrs.get("srcset", "").split(","):
            yield part
    yield from IN_STYLE.findall(attrs.get("style", ""))


def external(file: Path) -> list[str]:
    """The outside addresses that one built file needs."""
    if file.suffix == ".css":
        return IN_STYLE.findall(file.read_text(encoding="utf-8"))
    parser = read(file)
    found = [u for t, a in parser.tags for u in wanted(t, a)]
    text = file.read_text(encoding="utf-8")
    for script in re.findall(r"<script\b[^>]*>(.*?)</script>", text, re.S):
        found += [a or b for a, b in IN_SCRIPT.findall(script)]
    for style in re.findall(r"<style\b[^>]*>(.*?)</style>", text, re.S):
        found += IN_STYLE.findall(style)
    return [u for u in found if EXTERNAL.match(u)]


def main() -> int:
    files = sorted([*HTML.rglob("*.html"), *HTML.rglob("*.css")])
    bad = 0
    for file in files:
        for address in external(file):
            bad += 1
            print(f"{file.relative_to(HTML)} needs {address}")
    print(f"{len(files)} pages and styles, {bad} outside addresses needed")
    return bool(bad or not files)


if __name__ == "__main__":
    sys.exit(main())
