"""The comparison of stored and new outputs: what passes and what fails.

The second half runs pytest on a small notebook, as `make test` does, and
breaks that notebook in every way that the book relies on being caught.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent.parent


def rules() -> Any:
    """book/conftest.py as a module of its own name."""
    file = ROOT / "book" / "conftest.py"
    spec = importlib.util.spec_from_file_location("book_rules", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULES = rules()

SAME = [
    ("tau 2.314", "tau 2.314"),
    ("tau 2.314", "tau 2.315"),
    ("tau 2.314", "tau 2.313"),
    ("-0.0001", "0.0000"),
    ("x   0.50 y", "x 0.51 y"),  # columns move with a digit
    ("1.52x", "1.53x"),
    ("9.0053e-20", "9.0054e-20"),
    ("gap 6e-17", "gap 1e-16"),  # rounding, not a number
    ("gap 0e+00", "gap 2.2e-16"),
    ("0.5", "0.499"),  # %g drops zeros
    ("1e+03 ms", "1e+03 ms"),
    ("0.123456789", "0.123456791"),  # float32 printed in full
    ("[0.1, 0.2]\nend", "[0.1, 0.2]\nend"),
]
DIFFERENT = [
    ("tau 2.314", "tau 2.316"),
    ("n 12", "n 13"),
    ("a 1.0", "b 1.0"),
    ("int4", "int8"),
    ("torch 2.13.0", "torch 2.14.0"),
    ("1", "2.0"),
    ("0.5", "-0.5"),
    ("0.50", "0.5 0"),
    ("9.0053e-20", "9.0056e-20"),
    ("gap 1e-16", "gap 1e-11"),
    ("0.5 0.5", "0.5"),
    ("True", "False"),
    ("a\nb", "a b"),
    ("1e-05", "1e-04"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_outputs_that_say_the_same(a, b):
    assert RULES.same(a, b) and RULES.same(b, a)
    assert not RULES.Output(a) != b


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_outputs_that_differ(a, b):
    assert not RULES.same(a, b) and not RULES.same(b, a)
    assert RULES.Output(a) != b


CELLS = [
    "import sys\nx = 0.25",
    "print('value', x)",
    "for i in range(2):\n    print(i, 'of', 2)",
    "print('gpu', x)",
    "import time\nprint(time.time())",
    "from IPython.display import SVG\n"
    "SVG(f'<svg xmlns=\"http://www.w3.org/2000/svg\" id=\"a{id(x)}\"/>')",
]
OUTPUTS = [None, "value 0.25\n", "0 of 2\n1 of 2\n", "gpu 7\n", "1.5\n", None]
TAGS = {3: ["gpu"], 4: ["nbval-ignore-output"]}


def notebook() -> Any:
    """A right notebook: every kind of cell that the rule knows."""
    cells = []
    for i, (source, text) in enumerate(zip(CELLS, OUTPUTS, strict=True)):
        cell = v4.new_code_cell(source, execution_count=i + 1)
        cell.metadata["tags"] = TAGS.get(i, [])
        if text:
            stream = v4.new_output("stream", name="stdout", text=text)
            cell.outputs = [stream]
        cells.append(cell)
    figure = {"image/svg+xml": "<svg id='b'/>"}
    figure["text/plain"] = "<IPython.core.display.SVG object>"
    cells[5].outputs = [
        v4.new_output("execute_result", data=figure, execution_count=6)
    ]
    return v4.new_notebook(cells=cells)


def _number(nb: Any) -> None:
    nb.cells[1].outputs[0].text = "value 0.28\n"


def _integer(nb: Any) -> None:
    nb.cells[2].outputs[0].text = "0 of 2\n1 of 3\n"


def _dropped(nb: Any) -> None:
    nb.cells[2].outputs = []


def _source(nb: Any) -> None:
    nb.cells[0].source = "import sys\nx = 0.35"


def _error(nb: Any) -> None:
    nb.cells[4].source = "1 / 0"


def _warning(nb: Any) -> None:
    nb.cells[0].source += "\nprint('careful', file=sys.stderr)"


# Each breach, and the cell that must fail for it.
BREACHES = {
    "number": (_number, 1),
    "integer": (_integer, 2),
    "dropped": (_dropped, 2),
    "source": (_source, 1),
    "error": (_error, 4),
    "warning": (_warning, 0),
}


def test_nbval_passes_what_is_right_and_nothing_else(tmp_path):
    for folder in ("book", "tests", "tools"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "book" / "conftest.py", tmp_path / "book")
    shutil.copy(ROOT / "tests" / "nbval_sanitize.cfg", tmp_path / "tests")
    for file in (ROOT / "tools").glob("*.py"):
        shutil.copy(file, tmp_path / "tools")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    nbformat.write(notebook(), tmp_path / "book" / "right.ipynb")
    for name, (breach, _) in BREACHES.items():
        nb = notebook()
        breach(nb)
        nbformat.write(nb, tmp_path / "book" / f"{name}.ipynb")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rf", "--tb=no", "--nbval", "book"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    out = done.stdout + done.stderr
    failed = re.findall(r"^FAILED book/(\w+)\.ipynb::Cell (\d+)", out, re.M)
    want = {(k, str(cell)) for k, (_, cell) in BREACHES.items()}
    assert set(failed) == want, out
    gpu = len(BREACHES) + 1
    note = f"NOT CHECKED: {gpu} gpu cells, because this machine has no CUDA"
    assert note in out and f"{gpu} skipped" in out
    assert note in (tmp_path / "_build" / "not_checked.txt").read_text()
