"""The project's own rules: packaging, arrows between files, style.

Each rule is a function that lists what breaks it, and each has a test that
plants a breach and sees it found.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "specref").rglob("*.py"))
OURS = [
    *LIBRARY,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "tools").rglob("*.py")),
    ROOT / "book" / "conftest.py",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Import names that differ from the package's name on PyPI.
PROVIDES = {"yaml": "pyyaml", "jupyter_book": "jupyter-book"}
PROVIDES |= {"IPython": "ipykernel", "matplotlib_inline": "ipykernel"}

# Arrows point down: a room may import rooms on lower floors, and itself.
FLOOR = {
    "theory": 0,
    **dict.fromkeys(("draws", "tree", "warp", "prompts", "inputs"), 1),
    **dict.fromkeys(("laws", "rules", "lm"), 2),
    "heads": 2.5,
    "draft": 3,
    "decode": 4,
    **dict.fromkeys(("registry", "train", "edge", "prefill", "vision"), 5),
    "api": 6,
    "meter": 3,
    "timing": 4,
    **dict.fromkeys(("chain", "head_study"), 8),
    "peer": 6,
    **dict.fromkeys(("bench", "plots", "hf_generate"), 7),
    "studies": 9,
    "cli": 10,
    "__main__": 11,
}
# Files that are one room although they lie side by side.
ROOM = {
    "catalogue": "registry",
    "interchange": "heads",
    "catalogue_text": "registry",
    "catalogue_heads": "registry",
    "interchange": "heads",
    "hf_run": "hf_generate",
    "tagged": "hf_generate",
}
MAX_COLUMNS, MAX_LINES, MAX_FUNCTION = 79, 300, 60


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


# -- packaging ------------------------------------------------------------


def table(lines: list[str]) -> dict[str, str]:
    """Package name -> bounds and marker."""
    needs = [Requirement(line) for line in lines]
    return {
        canonicalize_name(n.name): f"{n.specifier}; {n.marker}" for n in needs
    }


def conda() -> list[str]:
    """The pip section of environment.yml."""
    text = (ROOT / "environment.yml").read_text()
    deps = yaml.safe_load(text)["dependencies"]
    return next(d["pip"] for d in deps if isinstance(d, dict))


def declared() -> dict[str, str]:
    return table(PROJECT["dependencies"] + sum(EXTRAS.values(), []))


def test_environment_yml_is_pyproject():
    lines = conda()
    assert "-e ." in lines
    assert table([x for x in lines if x != "-e ."]) == declared()
    text = (ROOT / "environment.yml").read_text()
    python = yaml.safe_load(text)["dependencies"][0]
    assert python == f"python{PROJECT['requires-python']}"


def test_library_has_two_dependencies():
    assert set(table(PROJECT["dependencies"])) == {"torch", "numpy"}


def test_every_dependency_is_pinned_within_its_bounds():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            need = Requirement(line)
            (pin,) = need.specifier
            assert pin.operator == "==", line
            pins[canonicalize_name(need.name)] = pin.version
    lines = PROJECT["dependencies"] + sum(
        (v for k, v in EXTRAS.items() if k != "dev"), []
    )
    for need in map(Requirement, lines):
        if need.marker and not need.marker.evaluate():
            continue
        pin = pins[canonicalize_name(need.name)]
        assert need.specifier.contains(pin), f"{need} is pinned to {pin}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH ?= torch=={pins['torch']}\n" in makefile


def imports(tree: ast.Module) -> Iterator[str]:
    """Top names of absolute imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def undeclared(tree: ast.Module, packages: set[str]) -> set[str]:
    """Imports that neither the standard library nor ``packages`` has."""
    local = {p.stem for p in (ROOT / "tests").rglob("*.py")}
    local |= {p.stem for p in (ROOT / "tools").glob("*.py")}
    local |= {"specref", "tools", *sys.stdlib_module_names, "tomllib"}
    return {
        name
        for name in set(imports(tree)) - local
        if canonicalize_name(PROVIDES.get(name, name)) not in packages
    }


def code_cells(source: Path) -> str:
    """The code of a MyST source, without IPython's own lines."""
    from tools.nb import load

    cells = [c.source for c in load(source).cells if c.cell_type == "code"]
    return re.sub(r"^\s*[%!].*$", "", "\n".join(cells), flags=re.M)


def test_every_import_is_declared():
    packages = set(declared())
    for file in OURS:
        missing = undeclared(parse(file), packages)
        assert not missing, f"{name_of(file)} imports {missing}"
    for source in sorted((ROOT / "book" / "_src").rglob("*.md")):
        missing = undeclared(ast.parse(code_cells(source)), packages)
        assert not missing, f"{name_of(source)} imports {missing}"


def test_library_imports_runtime_packages_only():
    runtime = set(table(PROJECT["dependencies"] + EXTRAS["models"]))
    for file in LIBRARY:
        plots = {"matplotlib"} if "plots" in file.parts else set()
        missing = undeclared(parse(file), runtime | plots | {"ipykernel"})
        assert not missing, f"{name_of(file)} imports {missing}"


def test_an_undeclared_import_is_found(tmp_path):
    source = tmp_path / "x.md"
    cell = ":tags: [x]\n\n%time f()\nimport pandas\n"
    source.write_text(f"```{{code-cell}} ipython3\n{cell}```\n")
    assert undeclared(ast.parse(code_cells(source)), {"numpy"}) == {"pandas"}


# -- one version, one title, one licence ----------------------------------


def test_versions_titles_and_addresses_agree():
    import specref

    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert cite["cff-version"] == "1.2.0"
    assert cite["version"] == PROJECT["version"] == specref.__version__
    assert cite["title"] == f"specref: {config['title']}"
    assert cite["license"] == PROJECT["license"] == "Apache-2.0"
    address = PROJECT["urls"]["Homepage"]
    assert cite["repository-code"] == address == config["repository"]["url"]
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_every_listed_page_has_a_source_or_is_a_page():
    from tools.site import listed

    for page in listed():
        source = ROOT / page.replace("book/", "book/_src/", 1)
        found = [
            p
            for p in (source.with_suffix(".md"), ROOT / f"{page}.md")
            if p.exists()
        ]
        assert len(found) == 1, f"{page}: {found or 'nothing'} makes it"


def test_every_source_is_listed():
    from tools.nb import label, sources
    from tools.site import listed

    lost = {label(s) for s in sources([])}
    lost -= {page.removeprefix("book/") for page in listed()}
    assert not lost, f"not in _toc.yml: {sorted(lost)}"


# -- arrows ---------------------------------------------------------------


def room(module: str) -> str:
    """``specref.lm.base`` lies in the room ``lm``."""
    part = module.split(".")[1]
    return ROOM.get(part, part)


def modules(tree: ast.Module) -> Iterator[str]:
    """Every module of specref that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "specref":
            names = [f"specref.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from (n for n in names if n.startswith("specref."))


def upward(here: str, tree: ast.Module) -> list[str]:
    """Imports of ``here`` that go sideways or up."""
    bad = []
    for module in modules(tree):
        there = room(module)
        if there not in FLOOR and not there.startswith("__"):
            bad.append(f"{here} -> {there}: no floor is given for it")
        elif there not in ("__version__", here):
            if FLOOR[there] >= FLOOR[here]:
                bad.append(f"{here} -> {there}")
    return bad


def test_arrows_point_down():
    bad = []
    for file in LIBRARY:
        if file.name == "__init__.py" and file.parent.name == "specref":
            continue
        parts = file.relative_to(ROOT).with_suffix("").parts
        here = room(".".join(parts))
        if here not in FLOOR:
            bad.append(f"{name_of(file)}: give {here!r} a floor")
            continue
        bad += [f"{name_of(file)}: {b}" for b in upward(here, parse(file))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("here", "line"),
    [
        ("rules", "from specref.draft.base import Drafter"),
        ("rules", "from specref.lm import base"),
        ("decode", "from specref import catalogue"),
        ("lm", "def f():\n    import specref.train.distill"),
        ("theory", "from specref.tree import Tree"),
    ],
)
def test_an_arrow_up_is_found(here, line):
    assert upward(here, ast.parse(line))


def drafters() -> dict[str, ast.Module]:
    """Module -> tree of the files that define a drafter."""
    found = {}
    for file in sorted((ROOT / "specref" / "draft").glob("*.py")):
        tree = parse(file)
        methods = {
            f.name
            for c in tree.body
            if isinstance(c, ast.ClassDef)
            for f in c.body
            if isinstance(f, ast.FunctionDef)
        }
        if "propose" in methods and file.stem != "base":
            found[f"specref.draft.{file.stem}"] = tree
    return found


def test_a_drafter_imports_no_other_drafter():
    found = drafters()
    assert len(found) > 2
    for name, tree in found.items():
        assert not set(modules(tree)) & set(found), name


def test_theory_needs_no_torch():
    code = "import specref.theory, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_importing_specref_loads_no_model_code():
    code = "import specref, sys; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.strip() == "False"


# -- randomness -----------------------------------------------------------

FORBIDDEN = re.compile(
    r"\bmultinomial\(|\bmanual_seed\(|^\s*(?:import|from) random\b"
    r"|\brandom\.seed\(|\btorch\.(?:rand|randn|randint|randperm)\("
    r"|np\.random\.(?:seed|rand\w*|choice|shuffle|permutation|normal)\(",
    re.M,
)


# transformers' users seed torch: their seed, drawn once, becomes ours.
EXCUSED = {("specref/hf_generate.py", "seed = int(torch.randint(2**62, ()))")}


def own_randomness(text: str) -> list[str]:
    """Uses of randomness that does not come from Draws."""
    seeded = r"torch\.Generator\([^)]*\)\.manual_seed\("
    text = re.sub(seeded, "", text)
    hits = []
    for line in text.splitlines():
        if FORBIDDEN.search(line) and "generator=" not in line:
            hits.append(line.strip())
    return hits


def test_randomness_comes_from_draws():
    for file in LIBRARY:
        # Training may shuffle and initialise with explicit generators.
        found = own_randomness(file.read_text(encoding="utf-8"))
        found = [f for f in found if (name_of(file), f) not in EXCUSED]
        assert not found, f"{name_of(file)}: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.multinomial(p, 1)",
        "torch.manual_seed(0)",
        "import random",
        "from random import choice",
        "x = torch.rand(3)",
        "np.random.seed(0)",
    ],
)
def test_other_randomness_is_found(line):
    assert own_randomness(line)


# -- style ----------------------------------------------------------------


def documented(tree: ast.Module) -> set[str]:
    """Methods with a docstring; a class that implements one inherits it."""
    return {
        f.name
        for c in ast.walk(tree)
        if isinstance(c, ast.ClassDef)
        for f in c.body
        if isinstance(f, ast.FunctionDef) and ast.get_docstring(f)
    }


# Methods that the interfaces, and torch, describe once for all.
INHERITED = {"forward"}.union(
    *(
        documented(parse(ROOT / "specref" / p))
        for p in ("lm/base.py", "draft/base.py", "rules/base.py", "draws.py")
    )
)


def public(node: ast.AST, cls: str = "") -> Iterator[tuple[str, ast.AST]]:
    """``(class, function)`` of every public function and method."""
    for child in ast.iter_child_nodes(node):
        if getattr(child, "name", "_").startswith("_"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from public(child, child.name)
        elif isinstance(child, ast.FunctionDef):
            yield cls, child


def bare(function: ast.FunctionDef) -> list[str]:
    """Parameters without annotation, ``return`` if that has none."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    bad = [x.arg for x in every if x and not x.annotation]
    bad = [name for name in bad if name not in ("self", "cls")]
    return bad + ([] if function.returns else ["return"])


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions without docstring.

    A method may go without when an interface documents it, or when it is
    one expression that its name says.
    """
    bad = []
    for cls, function in public(tree):
        short = cls and len(function.body) == 1
        excused = cls and function.name in INHERITED
        if not ast.get_docstring(function) and not short and not excused:
            bad.append(f"{cls}.{function.name}" if cls else function.name)
    return bad


def test_public_functions_are_annotated():
    bad = [
        f"{name_of(file)}: {f.name} {bare(f)}"
        for file in LIBRARY
        for _, f in public(parse(file))
        if bare(f)
    ]
    assert not bad, "\n".join(bad)


def test_public_functions_and_files_are_documented():
    bad = []
    for file in LIBRARY:
        tree = parse(file)
        if not ast.get_docstring(tree):
            bad.append(f"{name_of(file)}: the file itself")
        if not file.name.startswith("_"):
            bad += [f"{name_of(file)}: {name}" for name in undocumented(tree)]
    assert not bad, "\n".join(bad)


def test_a_bare_function_is_found():
    tree = ast.parse("def f(x): pass\nclass A:\n  def g(self): a = 1; b = 2")
    assert undocumented(tree) == ["f", "A.g"]
    assert [bare(f) for _, f in public(tree)] == [["x", "return"], ["return"]]


def too_long(text: str) -> list[str]:
    """Lines, functions and files over their limits."""
    lines = text.splitlines()
    bad = [
        f"line {i}: {len(line)} columns"
        for i, line in enumerate(lines, 1)
        if len(line) > MAX_COLUMNS
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            if size > MAX_FUNCTION:
                bad.append(f"{node.name}: {size} lines")
    return bad


def test_lines_and_functions_are_short():
    bad = [
        f"{name_of(file)}: {what}"
        for file in OURS
        for what in too_long(file.read_text(encoding="utf-8"))
    ]
    assert not bad, "\n".join(bad)


def test_files_are_short():
    sizes = {
        name_of(f): len(f.read_text(encoding="utf-8").splitlines())
        for f in LIBRARY
    }
    long = {k: v for k, v in sizes.items() if v > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_long_code_is_found():
    body = "\n".join(["def f():", *["    pass"] * MAX_FUNCTION])
    assert too_long(body) == [f"f: {MAX_FUNCTION + 1} lines"]
    assert too_long("x = " + "1" * 80) == ["line 1: 84 columns"]


# -- what must not be in the project --------------------------------------

SHOWN = {".ci", ".github"}
LOCAL = re.compile(r"(?<![\w.])/(?:root|home/\w+|Users/\w+)/|file:///\w")


def tracked_text() -> Iterator[Path]:
    """Every text file that is ours, outputs included."""
    skip = {"_build", "node_modules", "__pycache__", "data", "weights", "runs"}
    kinds = {".py", ".md", ".yml", ".toml", ".txt", ".cff", ".cfg", ".ipynb"}
    for file in sorted(ROOT.rglob("*")):
        parts = file.relative_to(ROOT).parts
        hidden = parts[0].startswith(".") and parts[0] not in SHOWN
        if hidden or skip & set(parts) or not file.is_file():
            continue
        if file.suffix in kinds or file.name in ("Makefile", "run"):
            yield file


def test_no_place_of_one_machine_is_named():
    for file in tracked_text():
        if file == Path(__file__).resolve():
            continue
        text = file.read_text(encoding="utf-8")
        found = LOCAL.findall(text)
        found += [p for p in (str(ROOT), sys.prefix) if p in text]
        assert not found, f"{name_of(file)}: {found}"


def test_readme_figures_are_the_measured_ones():
    from tools import readme

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run: python tools/readme.py"


def test_notebooks_pass_json_and_hold_no_times():
    for file in sorted((ROOT / "book").rglob("*.ipynb")):
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            assert "execution" not in cell["metadata"], name_of(file)
