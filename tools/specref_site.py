"""The book's own Sphinx extension: nothing outside, nothing unused.

It removes what jupyter-book adds and no page uses: Thebe's scripts, whose
address is outside and which are added twice, a script error; and, after the
build, the parts of MathJax that no page can ask for (20 of 24 MB).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The combined file that pages load, what it loads on demand, and fonts.
MATHJAX = ("tex-chtml.js", "input/tex/extensions/", "output/chtml/fonts/")


def drop_thebe(
    app: Any, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Keep Thebe's scripts out of a page."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in str(script).lower()
        and "thebe" not in getattr(script, "attributes", {}).get("body", "")
    ]


def trim(folder: Path, keep: tuple[str, ...] = MATHJAX) -> int:
    """Remove files whose path starts with none of ``keep``; bytes freed."""
    freed = 0
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        if not file.relative_to(folder).as_posix().startswith(keep):
            freed += file.stat().st_size
            file.unlink()
    for sub in sorted(folder.rglob("*"), reverse=True):
        if sub.is_dir() and not any(sub.iterdir()):
            sub.rmdir()
    return freed


def finish(app: Any, error: Exception | None) -> None:
    """After the build: trim, and switch Jekyll off for GitHub Pages."""
    if error is None and app.builder.format == "html":
        trim(Path(app.outdir) / "_static" / "mathjax")
        (Path(app.outdir) / ".nojekyll").touch()


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx, after every other extension."""
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", finish, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
