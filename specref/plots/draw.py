"""The drawings: bars with predictions, cost curves.

Does not handle: data; each function draws what it is given.  Draft trees
are in `specref.plots.trees`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specref.plots.style import (
    COLORS,
    CYCLE,
    LINES,
    MARKERS,
    figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bars(
    values: Mapping[str, float],
    *,
    spread: Mapping[str, tuple[float, float]] | None = None,
    predicted: Mapping[str, float | None] | None = None,
    notes: Mapping[str, str] | None = None,
    one: float | None = None,
    xlabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Horizontal bars, first label on top, with predictions beside.

    Args:
        values: label -> length.
        spread: label -> (lower, upper) ends of a whisker.
        predicted: label -> a diamond; labels with None have none.
        notes: label -> text printed after the bar.
        one: where to draw the line of "no difference".
    Raises:
        ValueError: ``values`` is empty, or another argument names a
            label that ``values`` does not have.
    """
    _check_bars(values, spread=spread, predicted=predicted, notes=notes)
    if ax is None:
        _, ax = figure(height=0.9 + 0.42 * len(values))
    where = {label: i for i, label in enumerate(values)}
    ax.barh(list(where.values()), list(values.values()), height=0.6,
            color=COLORS["target"], label="measured")
    if one is not None:
        ax.axvline(one, color=COLORS["ink"], linewidth=1, linestyle="--")
    reach = dict(values)
    for label, (low, high) in (spread or {}).items():
        ax.plot([low, high], [where[label]] * 2, color=COLORS["ink"],
                linestyle="-", linewidth=1.5, marker="|", markersize=6)
        reach[label] = max(reach[label], high)
    points = {k: v for k, v in (predicted or {}).items() if v is not None}
    if points:
        ax.plot(list(points.values()), [where[k] for k in points],
                linestyle="none", marker="D", markersize=7,
                color=COLORS["amber"], markeredgecolor=COLORS["ink"],
                label="predicted", zorder=4)
    for label, text in (notes or {}).items():
        right = max(reach[label], points.get(label, 0.0))
        ax.annotate(text, (right, where[label]), (8, 0), va="center",
                    textcoords="offset points", fontsize=11)
        reach[label] = right
    if points:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
                  reverse=True)
    if notes:  # room for the texts, which matplotlib does not count
        ax.set_xlim(0, 1.35 * max(reach.values()))
    ax.set_yticks(list(where.values()), list(where))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(xlabel)
    return ax


def _check_bars(
    values: Mapping[str, float], **extras: Mapping[str, Any] | None
) -> None:
    if not values:
        raise ValueError("values must have at least one bar, got none")
    for name, extra in extras.items():
        unknown = sorted(set(extra or ()) - set(values))
        if unknown:
            raise ValueError(f"{name} names bars not in values: {unknown}")


def cost_curve(
    tokens: Sequence[int],
    ms: Sequence[float],
    *,
    spread: tuple[Sequence[float], Sequence[float]] | None = None,
    label: str = "measured",
    model: Sequence[float] | None = None,
    model_label: str = "model",
    ax: Axes | None = None,
) -> Axes:
    """Time of one forward pass against the number of tokens in it.

    Call it again with ``ax`` to add a second machine or library.

    Args:
        tokens: pass sizes, increasing.
        ms: milliseconds of each; ``spread`` their quartiles.
        model: predicted milliseconds, drawn as a line.
    Raises:
        ValueError: lengths differ.
    """
    low, high = spread if spread is not None else (ms, ms)
    for name, values in (("ms", ms), ("spread", low), ("spread", high),
                         ("model", model)):
        if values is not None and len(values) != len(tokens):
            raise ValueError(
                f"{name} must have one value per entry of tokens "
                f"({len(tokens)}), got {len(values)}"
            )
    if ax is None:
        _, ax = figure()
    turn = len(ax.containers) % len(CYCLE)  # a new look for each curve
    color = COLORS[CYCLE[turn]]
    error = [[m - a for m, a in zip(ms, low, strict=True)],
             [b - m for m, b in zip(ms, high, strict=True)]]
    ax.errorbar(tokens, ms, yerr=error, color=color, linestyle="none",
                marker=MARKERS[turn], label=label)
    if model is not None:
        ax.plot(tokens, model, color=color, linestyle=LINES[turn],
                label=model_label)
    ax.set_xlabel("tokens in one pass")
    ax.set_ylabel("milliseconds")
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax
