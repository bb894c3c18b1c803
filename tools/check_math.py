"""Parses every formula of the built book with MathJax.

    python tools/check_math.py

Sphinx does not look inside a formula, and in a page an unknown macro is
merely red.  Needs node; MathJax is the copy that the pages themselves use
(the package sphinx-mathjax-offline).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.site import HTML, ROOT, absent, pages, read  # noqa: E402

DELIMITERS = re.compile(r"^\\[(\[]|\\[)\]]$")


def mathjax_folder() -> Path:
    """Where the installed MathJax lies."""
    for file in files("sphinx-mathjax-offline") or ():
        if file.name == "node-main.js":
            return Path(file.locate()).parent
    raise FileNotFoundError("sphinx-mathjax-offline holds no node-main.js")


def formulas(page: Path) -> list[dict[str, Any]]:
    """Each formula of a page as ``{tex, display}``, in order."""
    found = []
    for tag, text in read(page, "math", without="eqno").found:
        tex = DELIMITERS.sub("", DELIMITERS.sub("", text.strip()).strip())
        found.append({"tex": tex.strip(), "display": tag == "div"})
    return found


def macros() -> dict[str, Any]:
    """The macros that _config.yml gives to MathJax."""
    import yaml

    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    given = config["sphinx"]["config"].get("mathjax3_config", {})
    return given.get("tex", {}).get("macros", {})


def errors(every: list[dict[str, Any]]) -> list[str | None]:
    """Per formula: None, or why it does not parse.

    Raises:
        RuntimeError: node or MathJax failed as a whole.
    """
    script = Path(__file__).with_name("parse_tex.js")
    done = subprocess.run(
        ["node", str(script), str(mathjax_folder())],
        input=json.dumps({"macros": macros(), "formulas": every}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"node could not run MathJax: {done.stderr}")
    return json.loads(done.stdout)


def main() -> int:
    if not shutil.which("node"):
        return absent("formulas parsed by MathJax", "node")
    every = [(page, f) for page in pages() for f in formulas(page)]
    bad = 0
    found = errors([f for _, f in every])
    for (page, formula), error in zip(every, found, strict=True):
        if error:
            bad += 1
            where = page.relative_to(HTML)
            print(f"{where}: {error}: {formula['tex'][:100]}")
    print(f"{len(every)} formulas parsed, {bad} bad")
    return bool(bad or not every)


if __name__ == "__main__":
    sys.exit(main())
