"""The explorer's formulas against `specref.theory`, and its manners.

The script's pure functions run under node; the widget itself is looked at
by eye.  Without node the comparison is skipped with a message, or fails
when SPECREF_STRICT=1.

Does not handle: browsers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from specref import theory

STATIC = Path(__file__).resolve().parents[2] / "book" / "_static"
SCRIPT, STYLE = STATIC / "explorer.js", STATIC / "explorer.css"
MOST_BYTES = 15_000
CLOSE = 1e-9

ALPHAS = (0.0, 0.01, 0.3, 0.55, 0.7, 0.8, 0.93, 0.99, 1.0)
COSTS = (0.01, 0.05, 0.1, 0.3, 0.7, 1.0)
VERIFY = ((0.0, None), (0.05, None), (0.0, 4), (0.1, 6), (0.5, 2))

# Reads [[name, arguments], ...] and prints the results.
RUNNER = """
const f = require(process.argv[1]);
const calls = JSON.parse(require("fs").readFileSync(0, "utf8"));
const knee = (x) => (x === null ? Infinity : x);
console.log(JSON.stringify(calls.map(([name, args, at]) => {
  if (at !== null) args[at] = knee(args[at]);
  return f[name](...args);
})));
"""


def node() -> str:
    """The path of node; skips, or fails under SPECREF_STRICT=1."""
    found = shutil.which("node")
    if found:
        return found
    message = "NOT CHECKED: the explorer's formulas, because node is missing"
    if os.environ.get("SPECREF_STRICT") == "1":
        pytest.fail(message)
    pytest.skip(message)


def evaluate(
    calls: list[tuple[str, list[Any], int | None]], script: Path = SCRIPT
) -> list[Any]:
    """Results of the script's functions; ``at`` marks a knee argument."""
    done = subprocess.run(
        [node(), "-e", RUNNER, str(script)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert not done.stderr
    return json.loads(done.stdout)


def pass_time(growth: float, knee: float | None):
    """The explorer's model of verification, as a ``verify``."""
    edge = math.inf if knee is None else knee
    return lambda n: max(1 + growth * (n - 1), n / edge)


def worst_tokens(script: Path = SCRIPT) -> float:
    grid = [(a, g) for a in ALPHAS for g in (0, 1, 2, 5, 16, 64)]
    calls = [("expectedTokens", [a, g], None) for a, g in grid]
    return max(
        abs(mine / theory.expected_tokens(a, g) - 1)
        for mine, (a, g) in zip(evaluate(calls, script), grid, strict=True)
    )


def worst_speedup(script: Path = SCRIPT) -> float:
    grid = [
        (a, g, c, *v)
        for a in ALPHAS
        for g in (0, 1, 4, 16)
        for c in COSTS
        for v in VERIFY
    ]
    calls = [("speedup", list(x), 4) for x in grid]
    return max(
        abs(mine / theory.speedup(a, g, c, pass_time(w, k)) - 1)
        for mine, (a, g, c, w, k) in zip(
            evaluate(calls, script), grid, strict=True
        )
    )


def check_optimum(script: Path = SCRIPT) -> None:
    """The same best speedup, at the same length unless two tie."""
    grid = [(a, c, *v) for a in ALPHAS for c in COSTS for v in VERIFY]
    calls = [("optimalGamma", [*x, 64], 3) for x in grid]
    for mine, (a, c, w, k) in zip(
        evaluate(calls, script), grid, strict=True
    ):
        verify = pass_time(w, k)
        gamma, best = theory.optimal_gamma(a, c, verify, most=64)
        assert abs(mine["speedup"] / best - 1) < CLOSE, (a, c, w, k)
        if mine["gamma"] != gamma:
            tie = theory.speedup(a, mine["gamma"], c, verify)
            assert abs(tie / best - 1) < CLOSE, (a, c, w, k, mine, gamma)


def test_expected_tokens_equal_theory() -> None:
    assert worst_tokens() < CLOSE


def test_speedup_equals_theory() -> None:
    assert worst_speedup() < CLOSE


def test_best_gamma_equals_theory() -> None:
    check_optimum()


def test_no_gamma_helps_when_alpha_is_at_most_c() -> None:
    calls = [
        ("optimalGamma", [a, c], None) for c in COSTS for a in ALPHAS if a <= c
    ]
    for best in evaluate(calls):
        assert best == {"gamma": 0, "speedup": 1}


MUTANTS = {
    "the bonus is forgotten": ("let sum = 1;", "let sum = 0;"),
    "accepted tokens are charged": (
        "/ roundCost(gamma, c, growth, knee)",
        "/ roundCost(expectedTokens(alpha, gamma) - 1, c, growth, knee)",
    ),
    "the pass is one token short": (
        "passTime(gamma + 1, growth, knee)",
        "passTime(Math.max(gamma, 1), growth, knee)",
    ),
    "a slope of verification is ignored": (
        "Math.max(1 + growth * (n - 1), n / knee)",
        "Math.max(1, n / knee)",
    ),
    "the knee is ignored": (
        "Math.max(1 + growth * (n - 1), n / knee)",
        "1 + growth * (n - 1)",
    ),
    "the search stops early": ("gamma <= most;", "gamma < most / 8;"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    good, bad = MUTANTS[name]
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count(good) == 1, f"{name}: the mutated line has changed"
    script = tmp_path / "mutant.js"
    script.write_text(text.replace(good, bad), encoding="utf-8")
    with pytest.raises(AssertionError):
        assert worst_tokens(script) < CLOSE
        assert worst_speedup(script) < CLOSE
        check_optimum(script)


def test_pages_without_a_widget_are_left_alone() -> None:
    """Loading it touches nothing but one query of the document."""
    harness = """
    let asked = [];
    globalThis.document = {
      readyState: "complete",
      querySelectorAll: (s) => { asked.push(s); return []; },
    };
    require(process.argv[1]);
    console.log(JSON.stringify(asked));
    """
    done = subprocess.run(
        [node(), "-e", harness, str(SCRIPT)],
        capture_output=True, text=True, check=True, timeout=60,
    )
    assert json.loads(done.stdout) == [".specref-explorer"]
    assert not done.stderr


def test_it_is_small_and_needs_no_network() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    style = STYLE.read_text(encoding="utf-8")
    assert len(script.encode()) < MOST_BYTES
    names = script.replace("http://www.w3.org/2000/svg", "")
    for text in (names, style):
        assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\b *\(", script)
    assert "innerHTML" not in script


def test_it_can_be_used_without_a_mouse_or_a_screen() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    style = STYLE.read_text(encoding="utf-8")
    for needed in ('type: "range"', "label", "aria-live", "aria-valuetext"):
        assert needed in script
    assert ":focus-visible" in style
    assert "@media print" in style
