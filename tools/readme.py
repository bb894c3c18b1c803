"""Writes the README's table of results from the committed measurement.

    python tools/readme.py

Between the two marker comments of README.md stands the table that the
book's landing page shows, made from ``book/measured/methods.json`` and from
nothing else.  Without that file the block says how to measure.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "book" / "measured" / "methods.json"
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)
NONE = """\
No measurement is committed yet; `specref bench` makes one on your machine.
"""


def block(result: Path = RESULT) -> str:
    """What stands between the markers."""
    if not result.exists():
        return NONE
    from specref.plots.result import table

    return table(json.loads(result.read_text(encoding="utf-8")))


def filled(text: str, result: Path = RESULT) -> str:
    """The README with today's block.

    Raises:
        ValueError: the text does not hold the markers exactly once.
    """
    new, count = BLOCK.subn(lambda m: m[1] + block(result) + m[2], text)
    if count != 1:
        raise ValueError(
            "README.md must hold <!-- results --> and <!-- /results --> "
            f"once, found {count}"
        )
    return new


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(
        filled(readme.read_text(encoding="utf-8")), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
