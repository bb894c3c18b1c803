"""Figures: one style, and the few drawings that several places share.

`use` sets the style once per notebook.  Figures come out as SVG, the same
bytes for the same data, on an opaque paper colour, so that they read the
same on a dark page and in print.  Colours are safe for colour-blind
readers and never the only difference between two things.

``python -m specref.plots`` draws the landing page's figure and table from
the benchmark's JSON.

Does not handle: animation, interactive figures.  matplotlib is an optional
dependency, imported on first use.
"""

from specref.plots.draw import bars, cost_curve
from specref.plots.result import speedup_by_method, table
from specref.plots.style import (
    COLORS,
    CYCLE,
    LINES,
    MARKERS,
    WIDTH,
    figure,
    save,
    use,
)
from specref.plots.trees import draw_tree, leaves, tree

__all__ = [
    "COLORS",
    "CYCLE",
    "LINES",
    "MARKERS",
    "WIDTH",
    "bars",
    "cost_curve",
    "draw_tree",
    "figure",
    "leaves",
    "save",
    "speedup_by_method",
    "table",
    "tree",
    "use",
]
