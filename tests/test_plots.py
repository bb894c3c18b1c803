"""The figures: reproducible, readable without colour, honest about data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from specref.tree import ROOT, Tree

pytest.importorskip("matplotlib")

from specref import plots  # noqa: E402
from specref.plots import result as landing  # noqa: E402

BOOK = Path(__file__).resolve().parent.parent / "book"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


TREE = Tree((1, 2, 0, 1, 5), (ROOT, ROOT, 0, 1, 0))


def row(method: str, gain: float, predicted: float | None, kind: str) -> dict:
    return {
        "method": method,
        "kind": kind,
        "tau": 1.5 * gain,
        "tokens_per_s": 20.0 * gain,
        "speedup_vs_transformers": None,
        "speedup_vs_own": gain,
        "spread_vs_own": {"median": gain, "q1": gain - 0.1, "q3": gain + 0.2},
        "spread_vs_transformers": None,
        "predicted": predicted,
        "lossless": True,
        "identical_to_greedy": gain < 2,
    }


RESULT = {
    "provenance": {
        "device": "a test",
        "threads": 1,
        "dtype": "float32",
        "torch": "2",
        "date": "2026-01-02 03:04 UTC",
        "command": "specref bench",
    },
    "rows": [
        row("autoregressive", 1.0, None, "all"),
        row("chain", 1.5, 1.6, "all"),
        row("copy", 2.0, 1.9, "all"),
        row("chain", 9.9, 9.9, "code"),
    ],
}


def draw_bars() -> object:
    return plots.bars({"a": 1.0, "b": 2.5}, predicted={"b": 2.0}, one=1.0)


def draw_costs() -> object:
    ax = plots.cost_curve([1, 2, 4], [5.0, 6.0, 9.0], model=[5, 6, 8])
    return plots.cost_curve([1, 2, 4], [7.0, 7.0, 7.0], ax=ax, label="other")


def draw_tree() -> object:
    return plots.tree(TREE, [0, 2], list("abcde"))


def draw_result() -> object:
    return plots.speedup_by_method(RESULT["rows"])


DRAWINGS = (draw_bars, draw_costs, draw_tree, draw_result)


def svg(draw, path: Path) -> str:
    plots.save(draw().figure, path)
    return path.read_text()


@pytest.mark.parametrize("draw", DRAWINGS)
def test_same_bytes_twice(draw, tmp_path):
    assert svg(draw, tmp_path / "a.svg") == svg(draw, tmp_path / "b.svg")


def test_same_bytes_in_another_process(tmp_path):
    source = tmp_path / "methods.json"
    source.write_text(json.dumps(RESULT))
    names = [str(tmp_path / n) for n in ("methods.json", "x.svg", "x.md")]
    command = [sys.executable, "-m", "specref.plots", *names]
    assert subprocess.run(command, check=False).returncode == 0
    landing.draw_result(source, tmp_path / "y.svg", tmp_path / "y.md")
    for end in ("svg", "md"):
        x, y = (tmp_path / f"{n}.{end}" for n in "xy")
        assert x.read_bytes() == y.read_bytes()


@pytest.mark.parametrize("draw", DRAWINGS)
def test_opaque_paper_and_nothing_from_outside(draw, tmp_path):
    text = svg(draw, tmp_path / "a.svg")
    assert plots.COLORS["paper"] in text
    assert "<dc:date>" not in text
    outside = re.findall(r'(?:href|url|src)\s*[=(]\s*["\']?(https?:[^"\')]+)',
                         text)
    assert not outside
    assert "@font-face" not in text


def test_every_method_and_number_is_in_the_figure(tmp_path):
    text = svg(draw_result, tmp_path / "a.svg")
    for word in ("autoregressive", "chain", "copy", "1.50×", "2.00×",
                 "measured", "predicted"):
        assert word in text
    assert "9.90×" not in text  # of another prompt kind


def test_bars_stand_where_the_data_are():
    ax = plots.bars({"a": 1.0, "b": 2.5}, spread={"b": (2.0, 3.0)},
                    predicted={"a": None, "b": 2.25})
    assert [b.get_width() for b in ax.containers[0]] == [1.0, 2.5]
    lines = {tuple(line.get_xdata()) for line in ax.lines}
    assert lines == {(2.0, 3.0), (2.25,)}
    low, high = ax.get_ylim()
    assert low > high  # the first label on top


def test_tree_rows_and_columns():
    ax = plots.tree(TREE, [0, 2])
    at = {}
    for text in ax.texts:
        at.setdefault(text.get_text(), []).append(text.get_position())
    assert at["last"][0][0] == 0
    assert [x for x, _ in at["5"]] == [2]
    everything = [spot for spots in at.values() for spot in spots]
    assert len(set(everything)) == len(TREE) + 1
    bold = {t.get_text() for t in ax.texts if t.get_fontweight() == "bold"}
    assert bold == {"last", "1", "0"}


def test_empty_tree_is_its_root():
    assert [t.get_text() for t in plots.tree(Tree((), ())).texts] == ["last"]


def test_second_cost_curve_looks_different():
    ax = draw_costs()
    looks = {(c[0].get_color(), c[0].get_marker()) for c in ax.containers}
    assert len(looks) == 2


def test_lines_differ_without_colour():
    assert len(set(map(str, plots.LINES))) == len(plots.CYCLE)
    assert len(set(plots.MARKERS)) == len(plots.CYCLE)


def luminance(colour: str) -> float:
    raw = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    line = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
            for x in raw]
    return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2]


def test_text_has_contrast():
    def contrast(a: str, b: str) -> float:
        x, y = sorted((luminance(plots.COLORS[c]) for c in (a, b)))
        return (y + 0.05) / (x + 0.05)

    assert contrast("ink", "paper") > 7
    assert contrast("accepted", "paper") > 3  # bold text in a node
    assert contrast("target", "paper") > 4.5


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: plots.bars({}), "values"),
        (lambda: plots.bars({"a": 1}, predicted={"b": 1}), "predicted"),
        (lambda: plots.bars({"a": 1}, notes={"b": "x"}), "notes"),
        (lambda: plots.cost_curve([1, 2], [1.0]), "ms"),
        (lambda: plots.cost_curve([1], [1.0], model=[1, 2]), "model"),
        (lambda: plots.tree(TREE, labels=["a"]), "labels"),
        (lambda: plots.tree(TREE, [7]), "accepted"),
        (lambda: plots.speedup_by_method(RESULT["rows"], "poem"), "kind"),
    ],
)
def test_bad_input_names_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from specref import plots\n"
        "try: plots.use()\n"
        "except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True,
                         capture_output=True, text=True).stdout
    assert "pip install matplotlib" in out


def test_missing_json_is_one_sentence(tmp_path, capsys):
    assert landing.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_table_says_where_and_when():
    text = plots.table(RESULT)
    assert "2026-01-02" in text and "a test" in text
    assert "`specref bench`" in text
    lines = text.splitlines()
    assert lines[3] == (
        "| chain | 2.25 | 30.0 | 1.50× | 1.60× |  | yes |"
    )
    assert "9.90" not in text


def numbers(text: str) -> list[float]:
    text = re.sub(r'id="[^"]*"|#[\w.-]+', "", text)  # hashes and colours
    return [float(x) for x in re.findall(r"-?\d+\.\d+|-?\d+", text)]


def words(text: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", text)


def test_landing_page_shows_the_committed_measurement(tmp_path):
    """book/_static/result.* are what book/measured/methods.json gives."""
    source = BOOK / "measured" / "methods.json"
    paths = {end: BOOK / "_static" / f"result.{end}" for end in ("svg", "md")}
    for path in (source, *paths.values()):
        if not path.exists():
            pytest.fail(
                f"{path.relative_to(BOOK.parent)} is missing: run `specref "
                "bench --study methods --out book/measured/methods.json`, "
                "then `python -m specref.plots`"
            )
    new = {end: tmp_path / f"result.{end}" for end in paths}
    landing.draw_result(source, new["svg"], new["md"])
    advice = "stale: run `python -m specref.plots`"
    assert new["md"].read_text() == paths["md"].read_text(), advice
    # Another matplotlib or font may move a path by a hair, not by a bar.
    old, now = paths["svg"].read_text(), new["svg"].read_text()
    assert words(old) == words(now), advice
    a, b = numbers(old), numbers(now)
    assert len(a) == len(b), advice
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 2, advice
