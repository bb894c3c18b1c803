"""How nbval compares a notebook's stored outputs with a new run.

Text and integers are exact.  A decimal number may move by one unit in the
last printed digit, because sums in float32 depend on the instruction set
and the number of threads.  Figures in SVG are not compared.  Cells tagged
``gpu`` are skipped without CUDA, and the summary says how many.

Does not handle: numbers that are printed with one or two digits, where one
unit means little.  Print three or four.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.nb import has_cuda, is_gpu, kernel_environment  # noqa: E402
from tools.site import note  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"
UNITS = 1.01  # one unit, and room for the float error of the comparison
RELATIVE = 2e-5  # for numbers printed in full: float32 sums differ by this
NOISE = 1e-12  # float64 rounding, written with at most two digits

# Words such as int4 and dotted versions are text; the rest is a number.
_TOKEN = re.compile(
    r"(?P<word>[A-Za-z_]\w*|\d+(?:\.\d+){2,})"
    r"|(?P<number>[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)"
)


def split(text: str) -> tuple[list[str], list[str]]:
    """The text between numbers, and the numbers, both in order."""
    text = re.sub(r"[ \t]+", " ", text)  # column widths move with a digit
    between, numbers, start = [], [], 0
    for found in _TOKEN.finditer(text):
        if found["number"]:
            between.append(text[start : found.start()].strip(" "))
            numbers.append(found["number"])
            start = found.end()
    return [*between, text[start:].strip(" ")], numbers


def unit(number: str) -> float:
    """The value of the last printed place of a number."""
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def is_noise(number: str) -> bool:
    """Zero, or a rounding error that is printed as such: 1e-16, 2.2e-16."""
    mantissa, mark, _ = number.lower().partition("e")
    short = len(mantissa.partition(".")[2]) <= 1
    return bool(mark) and short and abs(float(number)) < NOISE


def close(a: str, b: str) -> bool:
    """Are two printed numbers one number?"""
    if a == b:
        return True
    if not any(mark in (a + b).lower() for mark in ".e"):
        return False
    if is_noise(a) and is_noise(b):
        return True
    x, y = float(a), float(b)
    return abs(x - y) <= UNITS * min(unit(a), unit(b)) + RELATIVE * abs(x)


def same(a: str, b: str) -> bool:
    """Do two outputs say the same?"""
    (text_a, numbers_a), (text_b, numbers_b) = split(a), split(b)
    return text_a == text_b and all(map(close, numbers_a, numbers_b))


class Output(str):
    """A stored or new output that compares by `same`."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and same(str(self), str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other


def pytest_configure(config: pytest.Config) -> None:
    """Give nbval the rule, and every kernel the book's environment."""
    from nbval.plugin import IPyNbCell, IPyNbFile

    if getattr(IPyNbCell, "specref", False):
        return
    IPyNbCell.specref = True
    config.option.nbval_current_env = True
    if not config.option.nbval_sanitize_with:
        config.option.nbval_sanitize_with = str(SANITIZE)
    os.environ.update(kernel_environment())
    sanitize, init = IPyNbCell.sanitize, IPyNbFile.__init__

    def as_output(self: Any, value: Any) -> Any:
        value = sanitize(self, value)
        return Output(value) if isinstance(value, str) else value

    def without_svg(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.skip_compare += ("image/svg+xml",)

    IPyNbCell.sanitize, IPyNbFile.__init__ = as_output, without_svg


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Skip gpu cells where there is no CUDA."""
    gpu = [i for i in items if hasattr(i, "cell") and is_gpu(i.cell)]
    if gpu and not has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="gpu cell: no CUDA here"))
        config.stash[_SKIPPED] = len(gpu)


_SKIPPED = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was not checked."""
    count = terminalreporter.config.stash.get(_SKIPPED, 0)
    if count:
        note(f"{count} gpu cells, because this machine has no CUDA")
