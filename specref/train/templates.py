"""Prompts from template files: slots filled by hash, nothing downloaded.

A file under ``data/pool`` has sections.  ``[prompts]`` holds templates,
every other section the entries of a slot.  In a template ``{slot}`` is an
entry, ``{slot2}`` a different one, ``{3..9}`` and ``{10..90/5}`` a number
(with a step), and ``\\n`` a line break.

Does not handle: nested slots or escapes of braces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from importlib.resources import files

_SLOT = re.compile(r"\{([^{}]+)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:/(\d+))?$")
_SECTION = re.compile(r"\[(\w+)\]$")


def pick(size: int, *key: object) -> int:
    """A number in 0..size-1 that depends on ``key`` only."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(sha256(text).digest()[:8], "big") % size


def order(items: list[str], *key: object) -> list[str]:
    """The same items in an order that depends on ``key`` only."""
    return sorted(items, key=lambda x: (pick(2**63, *key, x), x))


def sections(name: str) -> dict[str, list[str]]:
    """``data/pool/name.txt`` as section -> lines.

    Raises:
        ValueError: for a line before the first section.
    """
    file = files("specref") / "data" / "pool" / f"{name}.txt"
    out: dict[str, list[str]] = {}
    now: list[str] | None = None
    for line in file.read_text(encoding="utf-8").splitlines():
        head = _SECTION.match(line)
        if head:
            now = out.setdefault(head[1], [])
        elif line and not line.startswith("#"):
            if now is None:
                raise ValueError(f"{name}.txt: line before a [section]")
            now.append(line.replace("\\n", "\n"))
    return out


def fill(template: str, slots: dict[str, list[str]], *key: object) -> str:
    """One filling; entries of one slot never repeat inside a prompt.

    Raises:
        ValueError: for a slot that has no section.
    """
    used: dict[str, list[str]] = {}

    def value(at: int, name: str) -> str:
        number = _RANGE.match(name)
        if number:
            low, high, step = (int(x or 1) for x in number.groups())
            choice = range(low, high + 1, step)
            return str(choice[pick(len(choice), *key, template, at)])
        slot = name.rstrip("0123456789")
        if slot not in slots:
            raise ValueError(f"slot {name!r} has no section, in {template!r}")
        left = [x for x in slots[slot] if x not in used.get(slot, ())]
        entry = left[pick(len(left), *key, template, slot, name)]
        used.setdefault(slot, []).append(entry)
        named[name] = entry
        return entry

    named: dict[str, str] = {}
    parts = _SLOT.split(template)
    for at in range(1, len(parts), 2):
        name = parts[at]
        parts[at] = named.get(name) or value(at, name)
    text = "".join(parts)
    return text[:1].upper() + text[1:]


def expand(name: str, base: int, seed: int) -> Iterator[str]:
    """Distinct prompts of one template file.

    A template gives ``base`` prompts, or a quarter of its largest slot
    when that is more: phrasings with many things to say them of are used
    more often.
    """
    slots = sections(name)
    seen: set[str] = set()
    for template in slots.pop("prompts"):
        names = [n.rstrip("0123456789") for n in _SLOT.findall(template)]
        wide = max((len(slots.get(n, ())) for n in names), default=0)
        for i in range(max(base, wide // 4)):
            text = fill(template, slots, seed, i)
            if text not in seen:
                seen.add(text)
                yield text
