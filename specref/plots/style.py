"""The style of all figures, and how they are written.

Does not handle: drawings; see `specref.plots.draw`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 6.5  # inches: the text width of a printed page

# Okabe and Ito's colours, yellow left out: it vanishes on paper.
COLORS = {
    "target": "#0072b2",
    "draft": "#d55e00",
    "accepted": "#009e73",
    "predicted": "#cc79a7",
    "sky": "#56b4e9",
    "amber": "#e69f00",
    "rejected": "#8a8a8a",
    "grid": "#dedbd2",
    "ink": "#222222",
    "paper": "#fdfcf8",
}
CYCLE = ("target", "draft", "accepted", "predicted", "sky", "amber")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# Without these two lines each run would write another file.
METADATA = {"Date": None, "Creator": None}


def use() -> None:
    """Set the style; in a notebook also ask for reproducible SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    mpl = _matplotlib()
    mpl.rcParams.update(_style(mpl))
    try:
        from IPython import get_ipython
        from matplotlib_inline.config import InlineBackend
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        inline = InlineBackend.instance(parent=shell)
        inline.figure_formats = {"svg"}
        inline.print_figure_kwargs = {
            "bbox_inches": "tight",
            "metadata": METADATA,
        }


def figure(
    height: float = 3.2,
    columns: int = 1,
    width: float = WIDTH,
    **options: Any,
) -> tuple[Figure, Any]:
    """A figure of text width, with one axes or a row of ``columns``.

    Args:
        height, width: inches.
        options: passed to ``matplotlib.pyplot.subplots``.
    Returns:
        The figure, and its axes (an array when ``columns`` is above 1).
    """
    use()
    from matplotlib import pyplot

    options = {"layout": "constrained", **options}
    return pyplot.subplots(
        ncols=columns, figsize=(width, height), **options
    )


def save(fig: Figure, path: str | Path) -> None:
    """Write ``fig`` and close it; the same figure gives the same bytes."""
    from matplotlib import pyplot

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata=METADATA if path.suffix == ".svg" else None)
    pyplot.close(fig)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "specref.plots needs matplotlib: pip install matplotlib"
        ) from error
    return matplotlib


def _style(mpl: Any) -> dict[str, Any]:
    ink, paper = COLORS["ink"], COLORS["paper"]
    cycle = mpl.cycler(color=[COLORS[name] for name in CYCLE])
    return {
        "svg.hashsalt": "specref",
        "svg.fonttype": "none",  # text stays text: small, searchable
        "figure.figsize": (WIDTH, 3.2),
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "savefig.transparent": False,
        "axes.prop_cycle": cycle + mpl.cycler(linestyle=LINES),
        # Half size on a phone, so large here.
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.labelsize": 12,
        "xtick.labelsize": 11,
        "ytick.labelsize": 12,
        "legend.fontsize": 11,
        "legend.frameon": False,
        "text.color": ink,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLORS["grid"],
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "errorbar.capsize": 3,
    }
