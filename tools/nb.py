"""Executes the book's sources into notebooks, and checks the result.

    python tools/nb.py run start/laws     one notebook
    python tools/nb.py run start          a chapter
    python tools/nb.py run --stale        only what changed in its source
    python tools/nb.py check [NAMES]      are the notebooks those sources'?

A source is MyST text, ``book/_src/<chapter>/<name>.md``; its product is
``book/<chapter>/<name>.ipynb``, committed with outputs.  Cell ids come from
the content, and no times are stored, so that a second run changes nothing
but measured outputs.

Cells tagged ``gpu`` run only where CUDA is; elsewhere the outputs that an
earlier run stored are carried over.

Does not handle: notebooks edited by hand.  ``check`` reports them as stale.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
SOURCES = BOOK / "_src"
MAX_BYTES = 300_000
MAX_COLUMNS = 79
TIMEOUT_S = 900
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
# Places that exist on one machine only.
LOCAL_PATH = re.compile(
    r"(?<![\w.])/(?:home|root|Users|tmp)/[\w.-]+"
    r"|/site-packages|[A-Z]:\\+Users"
    f"|{re.escape(str(ROOT))}|{re.escape(sys.prefix)}"
)


def kernel_environment() -> dict[str, str]:
    """What every kernel of the book runs under, here and in the tests.

    Values that the caller has set win, except for ``PYTHONPATH``, which the
    repository's root leads.
    """
    cores = min(2, os.cpu_count() or 1)
    fixed = {
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(cores),
        "TQDM_DISABLE": "1",
        # Without ipywidgets, tqdm says so in every notebook that imports it.
        "PYTHONWARNINGS": "ignore:IProgress not found",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    env = {**fixed, **os.environ}
    paths = [str(ROOT), *env.get("PYTHONPATH", "").split(os.pathsep)]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    return env


def sources(names: list[str]) -> list[Path]:
    """The sources named, in order; all of them when none is.

    Raises:
        SystemExit: a name that is neither a chapter nor a notebook.
    """
    every = sorted(SOURCES.glob("*/*.md"))
    if not names:
        return every
    chosen = []
    for name in names:
        name = re.sub(r"^book/(_src/)?|\.(md|ipynb)$|/$", "", name)
        found = [p for p in every if name in (label(p), p.parent.name)]
        if not found:
            known = ", ".join(label(p) for p in every)
            sys.exit(f"no source named {name!r}; there are: {known}")
        chosen += found
    return chosen


def label(path: Path) -> str:
    """``chapter/name`` of a source or a notebook."""
    return f"{path.parent.name}/{path.stem}"


def product(source: Path) -> Path:
    """Where a source's notebook lies."""
    return BOOK / source.parent.name / f"{source.stem}.ipynb"


def load(source: Path) -> Any:
    """The source as a notebook without outputs, with stable cell ids."""
    import jupytext

    nb = jupytext.read(source, fmt="md:myst")
    nb.metadata.clear()
    nb.metadata.update(METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in nb.cells:
        text = f"{cell.cell_type}\n{cell.source}"
        key = hashlib.sha1(text.encode()).hexdigest()[:8]
        seen[key] = seen.get(key, 0) + 1
        cell["id"] = key if seen[key] == 1 else f"{key}-{seen[key]}"
    return nb


def is_gpu(cell: Any) -> bool:
    return "gpu" in cell.metadata.get("tags", [])


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run(source: Path) -> None:
    """Execute one source and write its notebook in one step."""
    import nbclient
    import nbformat

    nb, out = load(source), product(source)
    out.parent.mkdir(exist_ok=True)
    skip = "gpu" if any(map(is_gpu, nb.cells)) and not has_cuda() else ""
    client = nbclient.NotebookClient(
        nb,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(out.parent)}},
        record_timing=False,
        coalesce_streams=True,
        skip_cells_with_tag=skip,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute(env=kernel_environment())
    nb.metadata.clear()
    nb.metadata.update(METADATA)
    if skip and out.exists():
        _carry(nbformat.read(out, 4), nb)
    nbformat.validate(nb)
    part = out.with_suffix(".part")
    nbformat.write(nb, part)
    part.replace(out)


def _carry(old: Any, new: Any) -> None:
    """Copy stored outputs of unchanged gpu cells."""
    stored = {c.source: c for c in old.cells if is_gpu(c)}
    for cell in new.cells:
        if is_gpu(cell) and cell.source in stored:
            cell.outputs = stored[cell.source].outputs
            cell.execution_count = stored[cell.source].execution_count


def signature(nb: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """What source and notebook must share, cell by cell."""
    return [(c.cell_type, c.source, dict(c.metadata)) for c in nb.cells]


def is_stale(source: Path) -> bool:
    """True when the notebook is missing or made from another text."""
    import nbformat

    out = product(source)
    if not out.exists():
        return True
    return signature(load(source)) != signature(nbformat.read(out, 4))


def problems(source: Path) -> Iterator[str]:
    """What is wrong with one source's notebook, a line each."""
    import nbformat

    out = product(source)
    if not out.exists():
        yield "not run yet"
        return
    if is_stale(source):
        yield "stale: the source has changed since it was run"
    if out.stat().st_size > MAX_BYTES:
        yield f"{out.stat().st_size} bytes, the limit is {MAX_BYTES}"
    code = 0
    for cell in nbformat.read(out, 4).cells:
        if cell.cell_type == "code" and cell.source.strip():
            for what in cell_problems(cell):
                yield f"code cell {code}: {what}"
            code += 1


def cell_problems(cell: Any) -> Iterator[str]:
    """What is wrong with one executed code cell."""
    for line in cell.source.splitlines():
        if len(line) > MAX_COLUMNS:
            yield f"{len(line)} columns: {line[:40]}..."
    if cell.execution_count is None and not is_gpu(cell):
        yield "was not run"
    wanted = "raises-exception" in cell.metadata.get("tags", [])
    for output in cell.outputs:
        if output.output_type == "error" and not wanted:
            yield f"stores an error ({output.ename})"
        if output.get("name") == "stderr":
            yield f"stores stderr: {output.text.strip()[:60]}"
        data = output.get("data", {})
        texts = [output.get("text", "")]
        texts += [v for k, v in data.items() if k.startswith("text/")]
        for found in LOCAL_PATH.findall("\n".join(map(str, texts))):
            yield f"stores a path of this machine: {found}"


def orphans() -> list[Path]:
    """Notebooks that no source makes."""
    made = {product(p) for p in sources([])}
    return [
        p
        for p in sorted(BOOK.rglob("*.ipynb"))
        if p not in made and not {"_build", ".ipynb_checkpoints"} & {*p.parts}
    ]


def waiting() -> list[str]:
    """Notebooks with gpu cells that no GPU has run yet."""
    import nbformat

    names = []
    for out in filter(Path.exists, map(product, sources([]))):
        cells = nbformat.read(out, 4).cells
        if any(is_gpu(c) and c.execution_count is None for c in cells):
            names.append(label(out))
    return names


def check(names: list[str]) -> int:
    """Print every problem; 1 if there is one, else 0."""
    lines = [f"{label(s)}: {p}" for s in sources(names) for p in problems(s)]
    if not names:
        lines += [f"{label(p)}: no source makes it" for p in orphans()]
        for name in waiting():
            print(f"note: {name} has gpu cells that were never run on a GPU")
    print("\n".join(lines or [f"{len(sources(names))} notebooks in sync"]))
    return bool(lines)


def run_all(names: list[str], stale: bool) -> int:
    """Run what was named; 1 if any notebook failed or has a problem."""
    import nbclient

    bad = False
    for source in sources(names):
        if stale and not is_stale(source):
            continue
        try:
            run(source)
        except nbclient.exceptions.CellExecutionError as error:
            print(f"{label(source)}: failed\n{error}")
            bad = True
            continue
        size = product(source).stat().st_size
        print(f"{label(source)}: {size / 1000:.0f} kB", flush=True)
        for line in problems(source):
            print(f"{label(source)}: {line}")
            bad = True
    return bad


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("command", choices=["run", "check"])
    top.add_argument("names", nargs="*", help="chapter or chapter/name")
    top.add_argument("--stale", action="store_true", help="skip unchanged")
    args = top.parse_args()
    if args.command == "check":
        return check(args.names)
    return run_all(args.names, args.stale)


if __name__ == "__main__":
    sys.exit(main())
