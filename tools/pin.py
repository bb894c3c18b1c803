"""Writes constraints.txt: the exact versions of what this project needs.

    python tools/pin.py > constraints.txt

Run it in an environment that passed ``make test``.  Only the closure of
pyproject's dependencies is pinned, so that other things that happen to be
installed stay out.  A release that refuses an older Python is pinned with a
marker, and pip then chooses freely there.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
OLDEST = 10  # the lowest minor version of Python 3 that pyproject allows
NEWEST = 15
EXTRAS = ("models", "book", "test")
HEAD = """\
# Exact versions that passed `make test`, for pip's -c option.
# Written by: python tools/pin.py > constraints.txt
"""


def wanted() -> list[Requirement]:
    """What pyproject asks for: the library and the extras that make uses."""
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def closure() -> dict[str, Version]:
    """Name and version of all that is installed for `wanted`."""
    found: dict[str, Version] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(need, "") for need in wanted()]
    while todo:
        need, extra = todo.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        try:
            dist = distribution(need.name)
        except PackageNotFoundError:
            sys.exit(f"{need.name} is not installed here: run make first")
        name = canonicalize_name(need.name)
        found[name] = Version(dist.version)
        for part in {"", *need.extras}:
            if (name, part) not in seen:
                seen.add((name, part))
                todo += [(Requirement(r), part) for r in dist.requires or ()]
    return found


def marker(name: str) -> str:
    """The Pythons that a release supports, when that is not all of ours."""
    needs = SpecifierSet(distribution(name).metadata["Requires-Python"] or "")
    minors = [m for m in range(OLDEST, NEWEST) if f"3.{m}.99" in needs]
    if not minors or minors[0] == OLDEST:
        return ""
    return f'; python_version >= "3.{minors[0]}"'


def main() -> None:
    print(HEAD, end="")
    for name, version in sorted(closure().items()):
        print(f"{name}=={version.public}{marker(name)}")


if __name__ == "__main__":
    main()
