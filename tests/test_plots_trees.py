"""Drawn trees: every node where it belongs, the round's path in sight."""

from __future__ import annotations

import itertools

import pytest

from specref.tree import ROOT, Tree, chain

pytest.importorskip("matplotlib")

from specref import plots, tree  # noqa: E402
from specref.plots import COLORS, trees  # noqa: E402

#        -1
#      0     1
#    2  4    3
BUSHY = Tree((7, 8, 9, 7, 6), (ROOT, ROOT, 0, 1, 0))
SHAPES = [
    Tree((), ()),
    chain([1, 2, 3]),
    Tree((1, 2, 3), (ROOT, ROOT, ROOT)),
    BUSHY,
    Tree((1, 2, 3, 4, 5, 6), (ROOT, 0, ROOT, 2, 2, 1)),  # not level by level
]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def axes():
    return plots.figure()[1]


def spots(ax) -> dict[str, tuple[float, float]]:
    return {t.get_text(): t.get_position() for t in ax.texts}


def names(t: Tree) -> list[str]:
    return [f"n{i}" for i in range(len(t))]


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_depths_and_no_two_nodes_meet(shape):
    ax = plots.draw_tree(axes(), shape, labels=names(shape))
    at = spots(ax)
    assert at["last"][0] == 0
    for node in range(len(shape)):
        assert at[f"n{node}"][0] == shape.depth(node)
    assert len(set(at.values())) == len(shape) + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_parents_stand_amid_their_children_and_siblings_in_order(shape):
    at = spots(plots.draw_tree(axes(), shape, labels=names(shape)))
    for node in range(ROOT, len(shape)):
        here = at["last" if node == ROOT else f"n{node}"][1]
        rows = [at[f"n{c}"][1] for c in shape.children(node)]
        assert rows == sorted(rows)
        if rows:
            assert here == (rows[0] + rows[-1]) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_leaves_fill_rows_of_distance_one(shape):
    at = spots(plots.draw_tree(axes(), shape, labels=names(shape)))
    ends = [i for i in range(len(shape)) if not shape.children(i)]
    rows = sorted(at[f"n{i}"][1] for i in ends) or [0]
    assert rows == list(range(trees.leaves(shape)))


def lines(ax) -> dict[tuple, object]:
    """(parent's spot, child's spot) -> line."""
    found = {}
    for line in ax.lines:
        (x0, x1), (y0, y1) = line.get_xdata(), line.get_ydata()
        found[(x0, y0), (x1, y1)] = line
    return found


def test_edges_join_parents_and_children_and_the_path_stands_out():
    ax = plots.draw_tree(axes(), BUSHY, (0, 2), names(BUSHY))
    at, drawn = spots(ax), lines(ax)
    assert len(drawn) == len(BUSHY)
    for node, parent in enumerate(BUSHY.parents):
        ends = at["last" if parent == ROOT else f"n{parent}"], at[f"n{node}"]
        line = drawn[ends]
        kept = node in (0, 2)
        assert (line.get_linewidth() > 2) == kept
        assert (line.get_color() == COLORS["accepted"]) == kept
    bold = {t.get_text() for t in ax.texts if t.get_fontweight() == "bold"}
    assert bold == {"last", "n0", "n2"}


def test_the_extra_token_hangs_behind_the_path():
    for path in ((), (0,), (0, 2)):
        ax = plots.draw_tree(axes(), BUSHY, path, names(BUSHY), extra="x")
        at = spots(ax)
        assert at["x"][0] == len(path) + 1
        assert len(set(at.values())) == len(BUSHY) + 2
        above = at[f"n{path[-1]}" if path else "last"]
        line = lines(ax)[above, at["x"]]
        assert line.get_linestyle() == "--"
        (text,) = [t for t in ax.texts if t.get_text() == "x"]
        assert text.get_bbox_patch().get_linestyle() == "--"
        assert text.get_fontweight() == "normal"
        (low, high), (down, up) = ax.get_xlim(), ax.get_ylim()
        for x, y in at.values():
            assert low < x < high and up < y < down


def test_empty_labels_are_dots():
    ax = plots.draw_tree(axes(), BUSHY, (1,), [""] * 5, root="")
    assert not ax.texts
    dots = [x for x in ax.lines if x.get_marker() == "o"]
    assert len(dots) == 6
    full = [
        d for d in dots if d.get_markerfacecolor() == COLORS["accepted"]
    ]
    assert len(full) == 2  # the root and the accepted node


def test_texts_are_taken_as_they_are(tmp_path):
    ax = plots.draw_tree(axes(), chain([1]), labels=["$x_1 \\n"], size=7)
    (text,) = [t for t in ax.texts if t.get_text() != "last"]
    assert text.get_fontsize() == 7
    plots.save(ax.figure, tmp_path / "a.svg")
    assert "$x_1 \\n" in (tmp_path / "a.svg").read_text()


def test_token_ids_are_the_default_labels():
    ax = plots.draw_tree(axes(), BUSHY)
    found = sorted(t.get_text() for t in ax.texts)
    assert found == sorted(["last", *map(str, BUSHY.tokens)])


def test_same_bytes_twice(tmp_path):
    for name in "ab":
        ax = plots.draw_tree(axes(), BUSHY, (0,), extra="e")
        plots.save(ax.figure, tmp_path / name)
    a, b = ((tmp_path / n).with_suffix(".png") for n in "ab")
    assert a.read_bytes() == b.read_bytes()


NOT_PATHS = [(2,), (0, 3), (1, 0), (0, 0), (5,), (-1,), (0, 2, 4)]


@pytest.mark.parametrize("path", NOT_PATHS)
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match="path must list accepted nodes"):
        plots.draw_tree(axes(), BUSHY, path)


def test_every_true_path_is_drawn_and_nothing_else():
    ax = axes()
    paths = {tuple(BUSHY.path(i)) for i in range(ROOT, len(BUSHY))}
    for n in range(4):
        for path in itertools.permutations(range(len(BUSHY)), n):
            if path in paths:
                plots.draw_tree(ax, BUSHY, path)
                continue
            with pytest.raises(ValueError, match="path must"):
                plots.draw_tree(ax, BUSHY, path)


def test_labels_must_fit():
    with pytest.raises(ValueError, match="labels must have one entry"):
        plots.draw_tree(axes(), BUSHY, labels=["a"])


def test_the_constant_is_the_trees():
    assert trees.ROOT == tree.ROOT
