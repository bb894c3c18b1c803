"""The ledger: nothing lost, every verdict backed, the page in sync."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tools import claims
from tools.nb import SOURCES

CLAIMS = claims.load()
SETTLED = ("token", "feature")
PER_DOCUMENT = {
    "readme": 11,
    "token": 24,
    "embedding": 16,
    "hybrid": 14,
    "cascade": 28,
    "edge": 18,
    "prefill": 13,
    "roadmap": 26,
}
PER_CHAPTER = {
    "token": 34,
    "feature": 26,
    "hybrid": 7,
    "cascade": 26,
    "edge": 17,
    "prefill": 6,
    "eventvideo": 29,
    "frontier": 5,
}


def test_no_claim_is_lost_and_none_is_new():
    known = [
        f"{doc}-{i:02d}"
        for doc, n in PER_DOCUMENT.items()
        for i in range(1, n + 1)
    ]
    assert [c["id"] for c in CLAIMS] == known
    assert Counter(c["chapter"] for c in CLAIMS) == PER_CHAPTER


def test_every_claim_is_well_formed_and_its_place_exists():
    assert not list(claims.problems(CLAIMS))


def unjudged(ledger: list[claims.Claim]) -> list[str]:
    """Claims of a settled chapter without a verdict."""
    return [
        c["id"]
        for c in ledger
        if c["chapter"] in SETTLED and c["verdict"] == "open"
    ]


def test_the_settled_chapters_are_settled():
    assert not unjudged(CLAIMS)


def unused(ledger: list[claims.Claim], page: str) -> set[str]:
    """Sections of a ledger's notebook that no claim points at."""
    seen = {c["see"].partition("#")[2] for c in ledger}
    own = {x for x in claims.labels(page) if x.startswith("ledger-")}
    return own - seen


@pytest.mark.parametrize("chapter", SETTLED)
def test_every_section_of_a_ledger_settles_a_claim(chapter):
    assert not unused(CLAIMS, f"{chapter}/ledger")


def test_sections_name_claims_of_the_ledger():
    ids = {c["id"] for c in CLAIMS}
    for chapter in SETTLED:
        text = (SOURCES / chapter / "ledger.md").read_text(encoding="utf-8")
        named = re.findall(r"\{ref\}`(\S+) <claim-(\S+)>`", text)
        assert named
        assert all(a == b and a in ids for a, b in named)


def test_the_page_is_that_of_the_file():
    page = claims.PAGE.read_text(encoding="utf-8")
    assert page == claims.render(CLAIMS), "run: python tools/claims.py"
    for claim in CLAIMS:
        assert page.count(f"(claim-{claim['id']})=\n") == 1


def test_check_says_when_the_page_is_old(tmp_path, monkeypatch, capsys):
    assert claims.main(["--check"]) == 0
    old = tmp_path / "claims.md"
    old.write_text("another page")
    monkeypatch.setattr(claims, "PAGE", old)
    assert claims.main(["--check"]) == 1
    assert "not that of" in capsys.readouterr().out
    assert old.read_text() == "another page"


BREACHES = {
    "not one of": {"verdict": "true"},
    "not one sentence": {"because": "First this. Then that."},
    "condition": {"verdict": "holds if"},
    "no 'thm-none' on the page": {"see": "token/acceptance#thm-none"},
    "on the page 'token/nothing'": {"see": "token/nothing#thm-accept-run"},
    "no '' on the page": {"see": ""},
    "is open, and see names": {"verdict": "open"},
    "its document and two digits": {"id": "readme-9"},
    "should have": {"more": "keys"},
}


@pytest.mark.parametrize("what", BREACHES)
def test_a_breach_is_found(what):
    good = next(c for c in CLAIMS if c["id"] == "token-01")
    assert not list(claims.problems([good]))
    bad = list(claims.problems([{**good, **BREACHES[what]}]))
    assert len(bad) == 1 and what in bad[0]


def test_a_double_an_open_one_and_an_unused_section_are_found():
    good = next(c for c in CLAIMS if c["id"] == "token-01")
    assert list(claims.problems([good, good])) == ["token-01: stands twice"]
    left_open = {**good, "verdict": "open", "see": ""}
    assert unjudged([left_open]) == ["token-01"]
    assert "ledger-token-12" in unused([good], "token/ledger")


def test_what_myst_would_read_as_markup_is_escaped():
    assert claims.plain("p_i * q < $1 `a_b`") == r"p\_i \* q \< \$1 `a\_b`"
