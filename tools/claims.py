"""Renders the ledger of claims, and says what is wrong with it.

    python tools/claims.py            book/claims.yml -> book/claims.md
    python tools/claims.py --check    is the page that of the file?

Each claim becomes a card with an anchor ``claim-<id>``.  ``see`` names a
page of the book and a label on it: a theorem, or a target ``(label)=``.

Does not handle: whether a verdict is true.  That is what the place that
``see`` names is for.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
SOURCE, PAGE = BOOK / "claims.yml", BOOK / "claims.md"
Claim = dict[str, str]

KEYS = ("id", "doc", "claim", "kind", "chapter", "verdict", "because", "see")
KINDS = ("theorem", "formula", "algorithm", "number", "rule", "citation")
VERDICTS = {
    "holds": "true as stated",
    "holds if": "true under the condition that the sentence begins with",
    "wrong": "false as stated; the sentence says what is true instead",
    "reported only": (
        "rests on figures of others that we have not repeated; the sentence "
        "says what their tables say, also where they disagree"
    ),
    "open": "not judged yet: its chapter is not written",
}
CHAPTERS = {
    "token": "Token level",
    "feature": "Feature level",
    "hybrid": "Hybrids",
    "cascade": "Cascades",
    "edge": "Edge and cloud",
    "prefill": "Prefill",
    "eventvideo": "EventGPT to Video-LLaVA",
    "frontier": "Frontier",
}
NOTES = "https://github.com/xifan-zhang/EventGPT/blob/main/research"
DOCS = {
    "readme": "README.md",
    "token": "token_level_speculative_decoding.md",
    "embedding": "embedding_level_speculative_decoding.md",
    "hybrid": "hybrid_speculative_decoding.md",
    "cascade": "egpt_vllava_roadmap/"
    "sequential_cascaded_speculative_decoding.md",
    "edge": "edge_cloud_SD/edge_cloud_speculative_decoding.md",
    "prefill": "prefill_hiding/"
    "parallel_prefill_speculative_decoding_20260125_004920.md",
    "roadmap": "EventGPT_VideoLLaVA_roadmap.md",
}

INTRO = """\
<!-- Made by tools/claims.py from claims.yml; edit that file. -->

# The ledger of claims

The book follows a [public collection of research notes]({notes}) on
speculative decoding.
The notes claim things, and this page says of each claim what became of it.
There are {total} claims; {settled} are settled in this edition, and {open}
are open.

| verdict | meaning | claims |
|---|---|---:|
{legend}

**How a verdict is reached.**
A theorem, a formula or an algorithm is judged by a proof or by an exact
computation, and printed code by running it.
A rule or a number is judged by a counterexample, by a run on the embedded
model, or by the tables that it rests on.
The link of a card leads to the theorem or to the section that shows it, and
a test re-runs every cell there.
A figure from a paper is never called verified.
A claim is judged as it is stated, in our words and not in those of the
notes; a claim that leaves its condition unsaid is judged as "holds if".

**How to dispute one.**
Open an [issue]({issues}) that names the id, and a source or a computation.
Or change `book/claims.yml` and the section that its `see` names, and run
`python tools/claims.py`.
A verdict that its section does not support is a bug.

An id begins with the document that the claim is from: {docs}.
"""
ISSUES = "https://github.com/specref/specref/issues"


def load(path: Path = SOURCE) -> list[Claim]:
    """The claims, in the order of the file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def source(page: str) -> Path:
    """Where a page's text lies: a notebook's source, or a plain page."""
    made = BOOK / "_src" / f"{page}.md"
    return made if made.exists() else BOOK / f"{page}.md"


def labels(page: str) -> set[str]:
    """Labels and targets on a page; none when there is no such page."""
    path = source(page)
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^\s*:label: (\S+)\s*$", text, re.M)
    return {*found, *re.findall(r"^\(([^()\s]+)\)=\s*$", text, re.M)}


def problems(claims: Sequence[Claim]) -> Iterator[str]:
    """What is wrong with a ledger, one line each."""
    ids = Counter(c.get("id", "") for c in claims)
    yield from (f"{i}: stands twice" for i, n in ids.items() if n > 1)
    for claim in claims:
        for what in _faults(claim):
            yield f"{claim.get('id', '?')}: {what}"


def _faults(claim: Claim) -> Iterator[str]:
    if tuple(claim) != KEYS:
        yield f"has the keys {list(claim)}, and should have {list(KEYS)}"
        return
    if not re.fullmatch(rf"{claim['doc']}-\d\d", claim["id"]):
        yield "an id is its document and two digits"
    for key, known in (
        ("doc", DOCS),
        ("kind", KINDS),
        ("chapter", CHAPTERS),
        ("verdict", VERDICTS),
    ):
        if claim[key] not in known:
            yield f"{key} is {claim[key]!r}, not one of {list(known)}"
    for key in ("claim", "because"):
        if not one_sentence(claim[key]):
            yield f"{key} is not one sentence: {claim[key]!r}"
    if (claim["verdict"] == "holds if") != claim["because"].startswith("If "):
        yield "'holds if', and nothing else, begins with the condition: If"
    page, _, label = claim["see"].partition("#")
    if claim["verdict"] == "open":
        if claim["see"]:
            yield "is open, and see names a place"
    elif label not in labels(page):
        yield f"see: no {label!r} on the page {page!r}"


def one_sentence(text: str) -> bool:
    """Ends with a stop, and no capital follows an earlier one."""
    return text.endswith(".") and not re.search(r"[.!?] +[A-Z]", text)


def plain(text: str) -> str:
    """Text that MyST shows as it stands; backticks stay code."""
    return re.sub(r"([*_$<>\[\]\\^|~])", r"\\\1", text)


def tally(claims: Sequence[Claim]) -> str:
    """How many of each verdict, those that occur."""
    count = Counter(c["verdict"] for c in claims)
    return ", ".join(f"{count[v]} {v}" for v in VERDICTS if count[v])


def link(see: str) -> str:
    """The place that shows it, as a MyST reference."""
    page, _, label = see.partition("#")
    if not label.startswith("thm-"):
        return f"{{ref}}`{label}`"
    title = re.search(r"^# (.+)", source(page).read_text("utf-8"), re.M)[1]
    return f"{{prf:ref}}`{label}` in [{title}]({page}.ipynb)"


def card(claim: Claim) -> str:
    """One claim with its anchor."""
    why = plain(claim["because"])
    if claim["see"]:
        why += f" See {link(claim['see'])}."
    return f"""\
(claim-{claim["id"]})=
:::{{div}} claim {style(claim["verdict"])}
**{claim["id"]}**, {claim["kind"]} [{claim["verdict"]}]{{.verdict}}

{plain(claim["claim"])}

{why}
:::
"""


def style(verdict: str) -> str:
    """The class of a verdict."""
    return "verdict-" + verdict.replace(" ", "-")


def render(claims: Sequence[Claim]) -> str:
    """The page."""
    count = Counter(c["verdict"] for c in claims)
    legend = "\n".join(
        f"| [{v}]{{.verdict .{style(v)}}} | {text} | {count[v]} |"
        for v, text in VERDICTS.items()
    )
    docs = ", ".join(f"[{d}]({NOTES}/{path})" for d, path in DOCS.items())
    parts = [
        INTRO.format(
            notes=NOTES.replace("/blob/", "/tree/"),
            issues=ISSUES,
            docs=docs,
            total=len(claims),
            settled=len(claims) - count["open"],
            open=count["open"],
            legend=legend,
        )
    ]
    for chapter, title in CHAPTERS.items():
        own = [c for c in claims if c["chapter"] == chapter]
        parts.append(f"## {title}\n\n{len(own)} claims: {tally(own)}.\n")
        parts += [card(c) for c in own]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it; the exit status."""
    claims = load()
    bad = list(problems(claims))
    text = render(claims)
    if "--check" in arguments:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            bad.append("book/claims.md is not that of book/claims.yml")
    elif not bad:
        PAGE.write_text(text, encoding="utf-8")
    print("\n".join(bad) or f"{len(claims)} claims: {tally(claims)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
