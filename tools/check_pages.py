"""Opens every page of the built book in a headless Chromium.

    python tools/check_pages.py              every page
    python tools/check_pages.py start/laws   some pages
    python tools/check_pages.py --shots      also pictures in _build/shots

Per page: no console error, no failed request, no request that leaves this
machine, every formula typeset and none red, every image loaded and with a
text alternative, no dead link inside the book, and at phone width no
sideways scrolling of the page (wide tables and code scroll in their own
box).
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.browser import Browser, Page, find  # noqa: E402
from tools.site import HTML, ROOT, absent, pages, read  # noqa: E402

SHOTS = ROOT / "_build" / "shots"
DESKTOP = (1280, 900)
PHONE = (390, 844)

TYPESET = """(async () => {
  if (!document.querySelector(".math")) return [];
  if (!window.MathJax || !MathJax.startup) return ["MathJax did not load"];
  await MathJax.startup.promise;
  await document.fonts.ready;
  const bad = [], short = (e) => e.textContent.trim().slice(0, 60);
  for (const e of document.querySelectorAll(".math")) {
    if (e.closest("nav, .bd-sidebar-secondary")) continue;
    if (e.textContent.trim() && !e.querySelector("mjx-container"))
      bad.push("formula not typeset: " + short(e));
  }
  for (const e of document.querySelectorAll("mjx-merror"))
    bad.push("formula with an error: " + short(e));
  for (const e of document.querySelectorAll("mjx-mtext[style*='red']"))
    bad.push("unknown macro: " + short(e));
  return bad;
})()"""

IMAGES = """[...document.querySelectorAll("article img")].flatMap((e) => {
  const name = (e.getAttribute("src") || "").split("/").pop().slice(0, 60);
  const bad = [];
  if (!(e.getAttribute("alt") || "").trim()) bad.push("no alt text: " + name);
  if (e.loading !== "lazy" && !e.naturalWidth)
    bad.push("image did not load: " + name);
  return bad;
})"""

# What sticks out at phone width, without a box of its own that scrolls.
WIDE = """(async () => {
  await new Promise((r) => requestAnimationFrame(() =>
    requestAnimationFrame(r)));
  const root = document.documentElement, limit = window.innerWidth;
  const over = root.scrollWidth - limit;
  if (over <= 0) return [];
  const boxed = (e) => {
    for (e = e.parentElement; e && e !== document.body; e = e.parentElement)
      if (getComputedStyle(e).overflowX !== "visible") return true;
    return false;
  };
  const wide = [...document.body.querySelectorAll("*")].filter((e) =>
    e.getBoundingClientRect().right > limit + 1 && !boxed(e));
  const names = wide.slice(0, 3).map((e) =>
    `<${e.tagName.toLowerCase()} class="${e.className}">`);
  return [`page scrolls sideways by ${over} px: ${names.join(", ")}`];
})()"""


class Server:
    """The built book on a free port of this machine, in a ``with`` block."""

    def __init__(self, folder: Path) -> None:
        quiet = functools.partial(_Quiet, directory=str(folder))
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> str:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self.address

    def __exit__(self, *why: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def event_problems(page: Page, host: str) -> Iterator[str]:
    """Errors that the browser itself reported."""
    for e in page.saw("Runtime.exceptionThrown"):
        detail = e["exceptionDetails"]
        what = detail.get("exception", {}).get("description", detail["text"])
        yield f"script error: {what.splitlines()[0]}"
    for e in page.saw("Runtime.consoleAPICalled"):
        if e["type"] in ("error", "assert"):
            texts = [str(a.get("value", a.get("type"))) for a in e["args"]]
            yield f"console error: {' '.join(texts)[:120]}"
    for e in page.saw("Log.entryAdded"):
        if e["entry"]["level"] == "error":
            yield f"console error: {e['entry']['text'][:120]}"
    asked = {
        e["requestId"]: e["request"]["url"]
        for e in page.saw("Network.requestWillBeSent")
    }
    for e in page.saw("Network.loadingFailed"):
        if not e.get("canceled"):
            yield f"request failed: {asked.get(e['requestId'])}"
    for e in page.saw("Network.responseReceived"):
        if e["response"]["status"] >= 400:
            yield f"{e['response']['status']}: {e['response']['url']}"
    for url in asked.values():
        if url.startswith("http") and not url.startswith(host + "/"):
            yield f"leaves this machine: {url}"


def dead_links(file: Path, html: Path = HTML) -> Iterator[str]:
    """Links inside the book that lead to no file or to no place in it."""
    base = "/" + file.relative_to(html).as_posix()
    for tag, attrs in read(file).tags:
        link = attrs.get("href", "")
        if tag != "a" or not link or urlsplit(link).scheme:
            continue
        if link.startswith("//"):
            continue
        parts = urlsplit(urljoin(base, link))
        goal = html / unquote(parts.path).lstrip("/")
        if goal.is_dir():
            goal /= "index.html"
        if not goal.is_file():
            yield f"dead link: {link}"
        elif parts.fragment and goal.suffix == ".html":
            if unquote(parts.fragment) not in anchors(goal):
                yield f"link to no place in its page: {link}"


@functools.cache
def anchors(file: Path) -> frozenset[str]:
    """Every id and name of a page."""
    places = {"top"}
    for _, attrs in read(file).tags:
        places |= {attrs.get("id", ""), attrs.get("name", "")}
    return frozenset(places)


def inspect(
    page: Page, host: str, file: Path, html: Path = HTML, shots: bool = False
) -> list[str]:
    """Everything wrong with one page."""
    name = file.relative_to(html).as_posix()
    page.resize(*DESKTOP)
    page.open(f"{host}/{name}")
    found = page.run(TYPESET) + page.run(IMAGES)
    stem = name.removesuffix(".html").replace("/", "-")
    if shots:
        page.shoot(SHOTS / f"{stem}-desktop.png")
    page.resize(*PHONE)
    found += page.run(WIDE)
    if shots:
        page.shoot(SHOTS / f"{stem}-phone.png")
    found += [*event_problems(page, host), *dead_links(file, html)]
    return list(dict.fromkeys(found))


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("names", nargs="*", help="parts of page names")
    top.add_argument("--shots", action="store_true", help="save pictures")
    top.add_argument("--json", action="store_true", help="for programs")
    args = top.parse_args()
    program = find()
    if not program:
        return absent("pages in a browser", "Chromium or Chrome")
    chosen = [
        p
        for p in pages()
        if not args.names or any(n in p.as_posix() for n in args.names)
    ]
    found: dict[str, list[str]] = {}
    with Server(HTML) as host, Browser(program) as browser:
        page = Page(browser)
        for file in chosen:
            name = file.relative_to(HTML).as_posix()
            found[name] = inspect(page, host, file, shots=args.shots)
            for problem in found[name] if not args.json else ():
                print(f"{name}: {problem}", flush=True)
    if args.json:
        print(json.dumps(found, indent=1))
    bad = sum(map(len, found.values()))
    print(f"{len(chosen)} pages opened, {bad} problems", file=sys.stderr)
    return bool(bad or not chosen)


if __name__ == "__main__":
    sys.exit(main())
