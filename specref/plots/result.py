"""The landing page's figure and table, from the benchmark's JSON.

Does not handle: measuring; see ``specref bench --out``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specref.plots.draw import bars
from specref.plots.style import figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULT_JSON = Path("book/measured/methods.json")
RESULT_SVG = Path("book/_static/result.svg")
RESULT_TABLE = Path("book/_static/result.md")


def speedup_by_method(
    rows: Sequence[Mapping[str, Any]], kind: str = "all"
) -> Axes:
    """Speedup of each method over plain decoding, prediction beside.

    Args:
        rows: records of ``specref bench --json``.
        kind: prompt kind; ``all`` is every prompt.
    Raises:
        ValueError: no record has that kind.
    """
    mine = _of_kind(rows, kind)
    # Narrow, so that its text stays readable on a phone.
    _, ax = figure(height=0.9 + 0.42 * len(mine), width=5.0)
    return bars(
        {r["method"]: r["speedup_vs_own"] for r in mine},
        spread={
            r["method"]: (r["spread_vs_own"]["q1"], r["spread_vs_own"]["q3"])
            for r in mine
        },
        predicted={r["method"]: r["predicted"] for r in mine},
        notes={r["method"]: f"{r['speedup_vs_own']:.2f}×" for r in mine},
        one=1.0,
        xlabel="speedup over plain decoding",
        ax=ax,
    )


def table(result: Mapping[str, Any], kind: str = "all") -> str:
    """The benchmark as a Markdown table, with where and when below."""
    head = ["method", "τ", "tokens/s", "measured", "predicted",
            "over transformers", "same text"]
    lines = [head, ["---", *["---:"] * 5, "---"]]
    for r in _of_kind(result["rows"], kind):
        lines.append([
            r["method"], f"{r['tau']:.2f}",
            f"{r['tokens_per_s']:.1f}", _times(r["speedup_vs_own"]),
            _times(r["predicted"]), _times(r["speedup_vs_transformers"]),
            "yes" if r["identical_to_greedy"] else "no",
        ])
    p = result["provenance"]
    where = (
        f"Measured {p['date'][:10]} on {p['device']}, {p['threads']} "
        f"{'thread' if p['threads'] == 1 else 'threads'}, {p['dtype']}, "
        f"torch {p['torch']}, by `{p['command']}`."
    )
    return "\n".join(f"| {' | '.join(x)} |" for x in lines) + f"\n\n{where}\n"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _of_kind(
    rows: Sequence[Mapping[str, Any]], kind: str
) -> list[Mapping[str, Any]]:
    mine = [r for r in rows if r["kind"] == kind]
    if not mine:
        known = sorted({r["kind"] for r in rows})
        raise ValueError(f"kind must be one of {known}, got {kind!r}")
    return mine


def draw_result(source: Path, svg: Path, text: Path) -> None:
    """The landing page's figure and table from the benchmark's JSON."""
    result = json.loads(source.read_text())
    ax = speedup_by_method(result["rows"])
    save(ax.figure, svg)
    text.write_text(table(result))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m specref.plots [JSON [SVG [TABLE]]]``."""
    given = [Path(a) for a in (sys.argv[1:] if argv is None else argv)]
    usual = [RESULT_JSON, RESULT_SVG, RESULT_TABLE]
    if len(given) > len(usual):
        print("usage: python -m specref.plots [JSON [SVG [TABLE]]]",
              file=sys.stderr)
        return 2
    try:
        draw_result(*given, *usual[len(given):])
    except OSError as error:
        print(f"specref.plots: {error}", file=sys.stderr)
        return 2
    return 0
