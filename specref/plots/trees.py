"""Drawings of draft trees, from left to right.

`tree` makes its own axes; `draw_tree` draws on given ones, marks the path
that a round accepted and adds the round's extra token.

Does not handle: trees of several rows in one drawing, and choosing which
nodes of a large tree to show.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from specref.plots.style import COLORS, WIDTH, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from specref.tree import Tree

ROOT = -1  # `specref.tree` has it too, and would load torch


def tree(
    tree: Tree,
    accepted: Sequence[int] = (),
    labels: Sequence[str] | None = None,
    *,
    root: str = "last",
    ax: Axes | None = None,
) -> Axes:
    """Draw a draft tree, with any set of its nodes marked.

    Args:
        tree: a `specref.tree.Tree`.
        accepted: nodes drawn as accepted: filled, with thick edges.
        labels: one text per node; default its token id.
        root: text of the last committed token.
        ax: where to draw; default new axes of a fitting size.
    Raises:
        ValueError: ``labels`` has not one entry per node, or
            ``accepted`` names a node that is not there.
    """
    texts = _texts(tree, labels)
    if any(not 0 <= i < len(tree) for i in accepted):
        raise ValueError(
            f"accepted must hold nodes from 0 to {len(tree) - 1}, got "
            f"{list(accepted)}"
        )
    if ax is None:
        _, ax = figure(
            height=0.5 + 0.55 * leaves(tree),
            width=min(WIDTH, 1.5 * (tree.height + 1)),
        )
    _draw(ax, tree.parents, accepted, texts, root)
    return ax


def draw_tree(
    ax: Axes,
    tree: Tree,
    path: Sequence[int] = (),
    labels: Sequence[str] | None = None,
    *,
    root: str = "last",
    extra: str | None = None,
    size: float | None = None,
) -> Axes:
    """Draw one round: the tree, the path it accepted, its extra token.

    Args:
        ax: axes to draw on; about half an inch of height per leaf
            (`leaves`) keeps the texts apart.
        tree: a `specref.tree.Tree`.
        path: accepted nodes from the first level down, as in `Verdict`:
            filled, with thick edges.
        labels: one text per node; default its token id.  An empty text is
            drawn as a dot, which suits shapes and large trees.
        root: text of the last committed token.
        extra: text of the correction or bonus, drawn behind the path with
            a dashed frame; None draws none.
        size: font size in points; None is the style's.
    Returns:
        ``ax``.
    Raises:
        ValueError: ``labels`` has not one entry per node, or ``path`` is
            not a path of the tree.
    """
    texts = _texts(tree, labels)
    last = path[-1] if len(path) else ROOT
    known = all(0 <= i < len(tree) for i in path)
    if not known or tree.path(last) != list(path):
        raise ValueError(
            "path must list accepted nodes from a child of the root down, "
            f"parent to child, got {list(path)}"
        )
    parents = list(tree.parents)
    if extra is not None:
        parents.append(last)
        texts.append(extra)
    _draw(ax, parents, path, texts, root, extra is not None, size)
    return ax


def leaves(tree: Tree) -> int:
    """Rows that a drawing of the tree needs, at least 1."""
    return max(sum(not tree.children(i) for i in range(len(tree))), 1)


def _texts(tree: Tree, labels: Sequence[str] | None) -> list[str]:
    texts = list(map(str, tree.tokens)) if labels is None else list(labels)
    if len(texts) != len(tree):
        raise ValueError(
            f"labels must have one entry per node ({len(tree)}), got "
            f"{len(texts)}"
        )
    return texts


def _draw(
    ax: Axes,
    parents: Sequence[int],
    kept: Collection[int],
    texts: Sequence[str],
    root: str,
    extra: bool = False,
    size: float | None = None,
) -> None:
    """Edges, then nodes on top; the last node is the extra one if any."""
    depth, row = _layout(parents)
    last = len(parents) - 1 if extra else None
    for node, parent in enumerate(parents):
        thick = node in kept or node == last
        ax.plot([depth[parent], depth[node]], [row[parent], row[node]],
                linestyle="--" if node == last else "-", zorder=1,
                color=COLORS["accepted" if thick else "rejected"],
                linewidth=3 if thick else 1.2)
    for node in range(ROOT, len(parents)):
        look = "kept" if node == ROOT or node in kept else "left"
        text = root if node == ROOT else texts[node]
        look = "extra" if node == last else look
        _node(ax, depth[node], row[node], text, look, size)
    ax.set_xlim(-0.5, max(depth.values()) + 0.5)
    ax.set_ylim(max(row.values()) + 0.6, -0.6)
    ax.axis("off")


def _node(
    ax: Axes, x: float, y: float, text: str, look: str, size: float | None
) -> None:
    """A boxed text or a dot; dark when kept, so that print shows it too."""
    kept = look == "kept"
    edge = COLORS["rejected" if look == "left" else "accepted"]
    if not text:
        ax.plot([x], [y], "o", markersize=9, markeredgecolor=edge, zorder=3,
                markerfacecolor=edge if kept else COLORS["paper"])
        return
    box = {
        "boxstyle": "round,pad=0.35",
        "facecolor": COLORS["accepted" if kept else "paper"],
        "edgecolor": edge,
        "linewidth": 1.5,
        "linestyle": "--" if look == "extra" else "-",
    }
    ax.text(x, y, text, ha="center", va="center", bbox=box, fontsize=size,
            color=COLORS["paper" if kept else "ink"], parse_math=False,
            fontweight="bold" if kept else "normal")


def _layout(
    parents: Sequence[int],
) -> tuple[dict[int, int], dict[int, float]]:
    """Depth and row of each node and the root: leaves one below another,
    parents amid their children."""
    children: dict[int, list[int]] = {}
    depth = {ROOT: 0}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
        depth[node] = depth[parent] + 1
    order, stack = [], [ROOT]
    while stack:
        order.append(stack.pop())
        stack += children.get(order[-1], [])[::-1]
    row: dict[int, float] = {}
    free = sum(node not in children for node in order)
    for node in reversed(order):
        below = [row[child] for child in children.get(node, [])]
        if below:
            row[node] = (min(below) + max(below)) / 2
        else:
            free -= 1
            row[node] = float(free)
    return depth, row
