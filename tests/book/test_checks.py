"""The checks of notebooks and built pages find what they are there for."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from tools import (
    check_math,
    check_offline,
    check_pages,
    nb,
    pin,
    readme,
    site,
    specref_site,
)
from tools.browser import Browser, Page, find

SOURCE = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A page

```{code-cell} ipython3
:tags: [hide-cell]

print(6 * 7)
```
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    """An empty book with one source, and its notebook as a run makes it."""
    monkeypatch.setattr(nb, "BOOK", tmp_path)
    monkeypatch.setattr(nb, "SOURCES", tmp_path / "_src")
    source = tmp_path / "_src" / "start" / "page.md"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    made = nb.load(source)
    code = made.cells[1]
    code.execution_count = 1
    code.outputs = [v4.new_output("stream", name="stdout", text="42\n")]
    (tmp_path / "start").mkdir()
    nbformat.write(made, nb.product(source))
    return source


def edit(source, change):
    """Change the stored code cell, as a careless hand would."""
    made = nbformat.read(nb.product(source), 4)
    change(made.cells[1])
    nbformat.write(made, nb.product(source))


def test_a_right_notebook_has_no_problem(book, capsys):
    assert list(nb.problems(book)) == []
    assert nb.check([]) == 0
    assert "1 notebooks in sync" in capsys.readouterr().out


BAD_CELLS = {
    "stale": lambda c: c.update(source="print(6 * 8)"),
    "was not run": lambda c: c.update(execution_count=None),
    "stores an error (ValueError)": lambda c: c.outputs.append(
        v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    ),
    "stores stderr: careful": lambda c: c.outputs.append(
        v4.new_output("stream", name="stderr", text="careful")
    ),
    "stores a path of this machine: /tmp/ann": lambda c: c.outputs.append(
        v4.new_output("stream", name="stdout", text="in /tmp/ann/x")
    ),
    "84 columns": lambda c: c.update(source="x = " + "1" * 80),
    "the limit is": lambda c: c.outputs.append(
        v4.new_output("stream", name="stdout", text="x" * 300_001)
    ),
}


@pytest.mark.parametrize("what", BAD_CELLS)
def test_a_bad_notebook_is_found(book, what):
    edit(book, BAD_CELLS[what])
    assert any(what in p for p in nb.problems(book))
    assert nb.check([]) == 1


def test_changed_tags_missing_and_orphan_notebooks_are_found(book):
    edit(book, lambda c: c.metadata.update(tags=[]))
    assert any("stale" in p for p in nb.problems(book))
    nb.product(book).rename(nb.BOOK / "start" / "other.ipynb")
    assert list(nb.problems(book)) == ["not run yet"]
    assert [p.stem for p in nb.orphans()] == ["other"]
    with pytest.raises(SystemExit, match="no source named 'nothing'"):
        nb.sources(["nothing"])


def test_gpu_cells_keep_their_outputs_without_a_gpu(book, monkeypatch):
    cell = SOURCE[SOURCE.index("```{code-cell}") :]
    gpu = cell.replace("hide-cell", "gpu").replace("6 * 7", "1 / 0")
    book.write_text(SOURCE + "\n" + gpu)
    old = nb.load(book)
    old.cells[2].execution_count = 9
    old.cells[2].outputs = [
        v4.new_output("stream", name="stdout", text="on a GPU\n")
    ]
    nbformat.write(old, nb.product(book))
    monkeypatch.setattr(nb, "has_cuda", lambda: False)
    nb.run(book)
    new = nbformat.read(nb.product(book), 4)
    assert new.cells[1].outputs[0].text == "42\n"
    assert new.cells[2].outputs[0].text == "on a GPU\n"
    assert list(nb.problems(book)) == []
    first = nb.product(book).read_bytes()
    nb.run(book)
    assert nb.product(book).read_bytes() == first


def test_cell_ids_stay_when_a_cell_is_put_before(tmp_path):
    ids = []
    for text in (SOURCE, SOURCE.replace("# A page", "# A page\n\n+++\n\nX")):
        (tmp_path / "x.md").write_text(text)
        ids.append({c["id"] for c in nb.load(tmp_path / "x.md").cells})
    assert ids[0] < ids[1] and len(ids[1]) == 3


# -- built pages ----------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>t</title>
<link rel="canonical" href="https://example.org/x">
<link rel="icon" href="data:,"></head>
<body><article>{body}</article></body></html>"""


def write(folder: Path, body: str) -> Path:
    # A new name each time: a browser keeps pages that it has seen.
    file = folder / f"page-{len(list(folder.iterdir()))}.html"
    file.write_text(PAGE.format(body=body))
    return file


def absent(what: str) -> None:
    """Skip out loud, or fail where nothing may be skipped."""
    if site.absent(f"tests of {what}", what):
        pytest.fail(f"{what} is missing and SPECREF_STRICT is set")
    pytest.skip(f"no {what} here")


def test_formulas_are_read_as_mathjax_reads_them(tmp_path):
    body = (
        '<p><span class="math notranslate">\\(a &lt; b\\)</span></p>'
        '<div class="math"><span class="eqno">(1)<a href="#x">#</a></span>'
        "\\[\\sum_i x_i\\]</div>"
    )
    assert check_math.formulas(write(tmp_path, body)) == [
        {"tex": "a < b", "display": False},
        {"tex": "\\sum_i x_i", "display": True},
    ]


def test_bad_formulas_are_found():
    if not shutil.which("node"):
        absent("node")
    good = ["x^2", "\\min(p, q)", "\\begin{aligned}a &= b\\end{aligned}"]
    bad = ["\\badmacro", "\\frac{1", "a & b", "\\left( x", "x^2^3"]
    found = check_math.errors(
        [{"tex": tex, "display": True} for tex in good + bad]
    )
    assert [bool(f) for f in found] == [False] * 3 + [True] * 5
    assert "badmacro" in found[3]


OUTSIDE = "https://cdn.example.org/x"
NEEDED = {
    "script": f'<script src="{OUTSIDE}"></script>',
    "style": f'<link rel="stylesheet" href="{OUTSIDE}">',
    "protocol": '<script src="//cdn.example.org/x"></script>',
    "font": f"<style>@font-face {{src: url('{OUTSIDE}')}}</style>",
    "import": f"<style>@import '{OUTSIDE}';</style>",
    "image": f'<img src="{OUTSIDE}" alt="x">',
    "inline": f'<p style="background: url({OUTSIDE})">x</p>',
    "module": f"<script type=module>import('{OUTSIDE}')</script>",
    "frame": f'<iframe src="{OUTSIDE}"></iframe>',
}


@pytest.mark.parametrize("kind", NEEDED)
def test_outside_addresses_are_found(tmp_path, kind):
    assert len(check_offline.external(write(tmp_path, NEEDED[kind]))) == 1


def test_ordinary_links_are_no_need(tmp_path):
    body = f'<a href="{OUTSIDE}">x</a><script src="x.js"></script>'
    assert check_offline.external(write(tmp_path, body)) == []


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A browser tab and a served folder."""
    program = find()
    if not program:
        absent("Chromium")
    folder = tmp_path_factory.mktemp("site")
    with check_pages.Server(folder) as host, Browser(program) as browser:
        yield Page(browser), host, folder


def inspect(served, body: str) -> list[str]:
    page, host, folder = served
    return check_pages.inspect(page, host, write(folder, body), folder)


def test_a_right_page_passes(served):
    body = (
        '<h1 id="h">x</h1><a href="#h">up</a> <a href="page-0.html#h">me</a>'
        '<div style="overflow-x: auto"><p style="width: 900px">wide</p></div>'
        f'<a href="{OUTSIDE}">outside</a>'
    )
    assert inspect(served, body) == []


BAD_PAGES = {
    "script error": "<script>undefined_name()</script>",
    "console error: oops": "<script>console.error('oops')</script>",
    "404": '<script src="missing.js"></script>',
    "request failed": f'<script src="{OUTSIDE}"></script>',
    "leaves this machine": f'<img alt="x" src="{OUTSIDE}">',
    "no alt text": '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">',
    "image did not load": '<img alt="x" src="missing.png">',
    "dead link": '<a href="missing.html">x</a>',
    "link to no place": '<a href="#missing">x</a>',
    "page scrolls sideways": '<p style="width: 900px">wide</p>',
    "MathJax did not load": '<span class="math">\\(x\\)</span>',
    "formula not typeset": '<span class="math">\\(x\\)</span><script>'
    "MathJax = {startup: {promise: Promise.resolve()}}</script>",
    "unknown macro": '<span class="math">x<mjx-container>'
    '<mjx-mtext style="color: red">\\bad</mjx-mtext></mjx-container></span>'
    "<script>MathJax = {startup: {promise: Promise.resolve()}}</script>",
}


@pytest.mark.parametrize("what", BAD_PAGES)
def test_bad_pages_are_found(served, what):
    found = inspect(served, BAD_PAGES[what])
    assert any(f.startswith(what) for f in found), found


def test_a_missing_program_is_said_and_is_an_error_in_ci(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(site, "NOTES", tmp_path / "notes.txt")
    monkeypatch.delenv("SPECREF_STRICT", raising=False)
    assert site.absent("pages", "browser") == 0
    monkeypatch.setenv("SPECREF_STRICT", "1")
    assert site.absent("pages", "browser") == 1
    line = "NOT CHECKED: pages, because this machine has no browser\n"
    assert capsys.readouterr().err == line * 2
    assert site.NOTES.read_text() == line * 2


def test_a_page_that_was_not_built_is_an_error(tmp_path):
    assert site.listed()[0] == "book/index"
    with pytest.raises(SystemExit, match="not built: book/index.html"):
        site.pages(tmp_path)


def test_trimming_keeps_what_is_named(tmp_path):
    for name in ("keep.js", "fonts/a.woff", "sre/en.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("12345")
    assert specref_site.trim(tmp_path, ("keep.js", "fonts/")) == 5
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert left == {"keep.js", "fonts", "fonts/a.woff"}


# -- README and pins ------------------------------------------------------


def test_readme_block_comes_from_the_measurement(tmp_path):
    text = "a\n<!-- results -->\nold 9.99\n<!-- /results -->\nb\n"
    empty = readme.filled(text, tmp_path / "none.json")
    assert empty == text.replace("old 9.99\n", readme.NONE)
    row = {
        "method": "int8",
        "kind": "all",
        "tau": 3.14159,
        "tokens_per_s": 21.07,
        "speedup_vs_own": 1.5,
        "speedup_vs_transformers": 1.25,
        "predicted": 1.75,
        "identical_to_greedy": True,
    }
    where = dict.fromkeys(("device", "dtype", "torch", "command"), "x")
    where |= {"threads": 1, "date": "2026-01-02T03:04:05"}
    file = tmp_path / "methods.json"
    file.write_text(json.dumps({"provenance": where, "rows": [row]}))
    full = readme.filled(text, file)
    assert "old" not in full and "3.14" in full and "1.50" in full
    assert "2026-01-02" in full and readme.filled(full, file) == full
    with pytest.raises(ValueError, match="once, found 0"):
        readme.filled("no markers", file)


def test_pins_are_the_closure_and_nothing_else():
    found = pin.closure()
    assert {"torch", "transformers", "nbval", "jinja2"} <= set(found)
    assert "ruff" not in found and "pip" not in found


def test_make_says_what_it_can_do():
    if not shutil.which("make"):
        absent("make")
    done = subprocess.run(
        ["make", "help"], cwd=site.ROOT, capture_output=True, text=True
    )
    assert "make book" in done.stdout and "make test" in done.stdout


def test_kernels_run_under_one_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    env = nb.kernel_environment()
    assert env["OMP_NUM_THREADS"] == "7" and env["PYTHONHASHSEED"] == "0"
    assert env["PYTHONPATH"] == str(site.ROOT)
