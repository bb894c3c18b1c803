"""Builds the book with every warning fatal.

    python tools/build.py

Stored outputs are rendered; no notebook runs here.  A build that leaves a
page of the table of contents out is an error too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.site import HTML, ROOT, pages  # noqa: E402

CODE = "from jupyter_book.cli.main import main; main()"
BUILD = (
    *("build", str(ROOT), "--path-output", str(ROOT), "--all"),
    *("-W", "-n", "--keep-going", "-q"),
)


def main() -> int:
    done = subprocess.run([sys.executable, "-c", CODE, *BUILD], cwd=ROOT)
    if done.returncode:
        print("the book did not build: each warning above is an error here")
        return 1
    print(f"{len(pages())} pages; open {(HTML / 'index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
