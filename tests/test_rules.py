"""Rules: golden values, what they refuse and why, and the lossy ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    BY_NAME,
    DRAFTS,
    EOS,
    GENERIC,
    MIXED,
    TOLERANCE,
    Case,
    admitted,
    distance,
    output_law,
    truth,
)
from test_mutants import Edited, with_laws

from specref import rules
from specref.draft.grow import without_replacement
from specref.draws import Enumerate
from specref.laws import law, total_variation
from specref.registry import methods
from specref.rules import LOSSLESS, LOSSY, lenience, typical
from specref.rules.base import residual
from specref.rules.kseq import solve_rho
from specref.rules.lossy import entropy
from specref.tree import (
    DETERMINISTIC,
    EMPTY,
    IID,
    KINDS,
    WITHOUT_REPLACEMENT,
    Tree,
    chain,
)


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- golden values --------------------------------------------------------

C = row(0.6, 0.3, 0.1), row(0.2, 0.3, 0.5)
A = row(1.0, 0.0), row(0.5, 0.5)


def acceptance(rule: str, kind: str, p, q, k: int) -> float:
    """P(one of k siblings is accepted), by enumeration."""

    def run(draws):
        if kind == IID:
            tokens = draws.categorical(q.expand(k, -1)).tolist()
        else:
            tokens = without_replacement(q, k, draws)
        n = len(tokens)
        star = Tree(tuple(tokens), (-1,) * n, kind, q[None], (0,) * n)
        verdict = LOSSLESS[rule](star, p.expand(n + 1, -1), draws)
        return [len(verdict.path)]

    return law(run).get((1,), 0.0)


@pytest.mark.parametrize(
    "rule, kind, pair, two, three",
    [
        ("kseq", IID, C, 0.70806, 0.78967),
        ("kseq", IID, A, 0.75, 0.875),
        ("recursive", IID, C, 0.68, 0.744),
        ("recursive", IID, A, 0.75, 0.875),
        ("recursive", WITHOUT_REPLACEMENT, C, 0.76, 1.0),
        ("recursive", WITHOUT_REPLACEMENT, A, 1.0, 1.0),
        ("traversal", WITHOUT_REPLACEMENT, C, 0.76, 1.0),
        ("naive", IID, C, 0.444, 0.5774),
        ("naive", IID, A, 0.75, 0.875),
    ],
)
def test_acceptance_of_siblings(rule, kind, pair, two, three):
    p, q = pair
    for k, want in ((2, two), (3, three)):
        assert acceptance(rule, kind, p, q, k) == pytest.approx(want, abs=5e-6)
    both = float(torch.minimum(p, q).sum())
    if rule != "naive":
        assert acceptance(rule, kind, p, q, 1) == pytest.approx(both)


def test_rho_of_kseq():
    assert solve_rho(*C, 2) == pytest.approx(1.54031, abs=5e-6)
    assert solve_rho(*C, 3) == pytest.approx(1.94837, abs=5e-6)
    assert solve_rho(*A, 2) == pytest.approx(1.5, abs=1e-9)
    assert solve_rho(*A, 3) == pytest.approx(1.75, abs=1e-9)
    assert solve_rho(*C, 1) == 1.0


def accepted_of_chain(rule: str, p, q, gamma: int) -> float:
    """Expected accepted tokens (bonus excluded), laws free of context."""

    def run(draws):
        tokens = draws.categorical(q.expand(gamma, -1)).tolist()
        tree = chain(tokens, q.expand(gamma, -1))
        verdict = LOSSLESS[rule](tree, p.expand(gamma + 1, -1), draws)
        return [len(verdict.path)]

    return sum(n * prob for (n,), prob in law(run).items())


def test_block_and_traversal_accept_more_than_token_by_token():
    p, q = row(1 / 3, 2 / 3), row(2 / 3, 1 / 3)
    want = {"tokenwise": 10 / 9, "recursive": 10 / 9}
    want |= {"block": 11 / 9, "traversal": 11 / 9, "naive": 0.0}
    for name in ("tokenwise", "recursive", "block", "traversal"):
        got = accepted_of_chain(name, p, q, 2)
        assert got == pytest.approx(want[name], abs=1e-12)
    for name in ("tokenwise", "block", "traversal", "recursive", "kseq"):
        got = accepted_of_chain(name, p, q, 1)
        assert got == pytest.approx(2 / 3, abs=1e-9)


@pytest.mark.parametrize("name", [n for n in LOSSLESS if n != "greedy"])
def test_equal_laws_are_always_accepted(name):
    """p = q: no draft is ever refused (naive follows its own draws)."""
    p = row(0.5, 0.3, 0.2)
    got = accepted_of_chain(name, p, p, 2)
    if name == "naive":
        hit = float((p * p).sum())
        assert got == pytest.approx(hit + hit**2)
    else:
        assert got == pytest.approx(2.0, abs=1e-9)


def test_residual():
    p, q = C
    assert torch.allclose(residual(p, q), row(1.0, 0.0, 0.0))
    assert torch.equal(residual(p, p), p)


# --- what is refused ------------------------------------------------------

SAMPLING = [r for r in LOSSLESS.values() if r.name != "greedy"]
REFUSED = [
    (rule, draft)
    for rule in SAMPLING
    for draft in DRAFTS
    if not admitted(rule, draft)
]


def unchecked(rule):
    """The rule without its check."""
    return replace(rule, admits=frozenset(KINDS), chains_only=False)


@pytest.mark.parametrize(
    "rule, draft", REFUSED, ids=lambda x: getattr(x, "name", "")
)
def test_a_proposal_that_a_rule_would_bias_is_refused(rule, draft):
    if draft.kind in rule.admits:
        message = "needs a chain, got a tree that branches"
    else:
        message = f"{rule.name!r} would be biased .* kind {draft.kind!r}"
    with pytest.raises(ValueError, match=message):
        output_law(GENERIC.short(2 + draft.is_chain), draft.make, rule)


def given_q(lm, prefix, tree, room):
    """The tree with the draft's laws, its kind left as it is."""
    return with_laws(lm, prefix, tree, tree.kind) if len(tree) else tree


BIASED = [
    ("tokenwise", "chain-deterministic"),
    ("block", "chain-deterministic"),
    ("tokenwise", "lookup"),
    ("block", "lookup"),
    ("kseq", "chain-deterministic"),
    ("kseq", "bushy-deterministic"),
    ("kseq", "dynamic"),
]


@pytest.mark.parametrize("rule, draft", BIASED)
def test_ratios_on_deterministic_proposals_would_bias(rule, draft):
    """The draft's law is no law of a token that was not drawn from it."""
    make = BY_NAME[draft].make
    off = distance(
        GENERIC.short(3),
        lambda lm: Edited(make(lm), lm, given_q),
        unchecked(LOSSLESS[rule]),
    )
    assert off > 1e-3


def test_kseq_on_distinct_siblings_would_bias():
    rule, draft = unchecked(LOSSLESS["kseq"]), BY_NAME["3-distinct"]
    assert distance(GENERIC.short(2), draft.make, rule) > 1e-3


@pytest.mark.parametrize("name", ["tokenwise", "block"])
def test_a_chain_rule_on_a_tree_would_accept_what_is_no_path(name):
    draft = BY_NAME["bushy-iid"]
    with pytest.raises(ValueError, match=r"path\[0\] must go from a child"):
        output_law(GENERIC.short(2), draft.make, unchecked(LOSSLESS[name]))


def two_laws(tokens=(0, 1)) -> Tree:
    q = torch.stack((row(0.8, 0.1, 0.1), row(0.1, 0.1, 0.8)))
    return Tree(tuple(tokens), (-1, -1), IID, q, (0, 1))


def star_law(rule, p, laws) -> dict:
    """Law of the first token, candidate ``i`` drawn from ``laws[i]``."""

    def run(draws):
        tree = two_laws([int(draws.categorical(q)) for q in laws])
        verdict = rule(tree, p.expand(3, -1), draws)
        return [*(tree.tokens[i] for i in verdict.path), verdict.token][:1]

    return law(run)


def test_candidates_from_different_laws(monkeypatch):
    """k-SEQ solves for one q and refuses two; recursive rejection takes
    each candidate's own (SpecInfer's several drafts)."""
    p, laws = row(0.2, 0.5, 0.3), two_laws().q
    want = {(i,): float(x) for i, x in enumerate(p)}
    for name in ("recursive", "traversal", "naive"):
        got = star_law(LOSSLESS[name], p, laws)
        assert total_variation(got, want) <= TOLERANCE
    with pytest.raises(ValueError, match="drawn from different laws"):
        star_law(LOSSLESS["kseq"], p, laws)
    first = lambda tree, drafts: tree.law(drafts[0])  # noqa: E731
    monkeypatch.setattr(rules.kseq, "one_law", first)
    assert total_variation(star_law(LOSSLESS["kseq"], p, laws), want) > 1e-3


def test_greedy_refuses_laws_that_are_spread():
    tree = chain([0, 1])
    with pytest.raises(ValueError, match="all mass on one token"):
        LOSSLESS["greedy"](tree, row(0.5, 0.5).expand(3, -1), Enumerate())
    sure = row(0.0, 1.0).expand(3, -1)
    verdict = LOSSLESS["greedy"](tree, sure, Enumerate())
    assert verdict.path == () and verdict.token == 1
    # Without the check: the law of argmax, not of p.
    best = replace(LOSSLESS["greedy"], decide=rules.greedy.greedy)
    draft = BY_NAME["chain-deterministic"]
    assert distance(GENERIC.short(2), draft.make, best) > 1e-3


def as_point_masses(lm, prefix, tree, room):
    return Tree(tree.tokens, tree.parents, DETERMINISTIC)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("draft", ["3-candidates", "chain-iid"])
def test_sampled_proposals_as_point_masses_are_lossless_but_accept_less(
    rule, draft
):
    """A rule that is exact for every fixed tree is exact for a random
    one; it wastes what q says.  The reverse, top-k children under p / q,
    is a mutant."""
    make = BY_NAME[draft].make
    off = distance(
        MIXED.short(3 if draft == "chain-iid" else 2),
        lambda lm: Edited(make(lm), lm, as_point_masses),
        LOSSLESS[rule],
    )
    assert off <= TOLERANCE
    p, q = row(0.5, 0.3, 0.2), row(0.2, 0.5, 0.3)

    def hits(kind):
        def run(draws):
            x = int(draws.categorical(q))
            tree = Tree((x,), (-1,), kind, q[None], (0,))
            return LOSSLESS[rule](tree, p.expand(2, -1), draws).path

        return law(run).get((0,), 0.0)

    assert hits(IID) == pytest.approx(0.7)  # sum min(p, q)
    assert hits(DETERMINISTIC) == pytest.approx(0.31)  # sum p q


def test_wrong_number_of_laws():
    with pytest.raises(ValueError, match="got 2 rows for 2 nodes"):
        LOSSLESS["naive"](chain([0, 1]), row(1.0).expand(2, -1), Enumerate())


def test_names():
    assert rules.names() == [*LOSSLESS, *LOSSY]
    for name in LOSSLESS:
        assert rules.get(name) is LOSSLESS[name]
        assert LOSSLESS[name].lossless and LOSSLESS[name].name == name
    with pytest.raises(ValueError, match="unknown rule 'typo'.*tokenwise"):
        rules.get("typo")
    with pytest.raises(ValueError, match="takes no options"):
        rules.get("block", factor=0.5)


@pytest.mark.parametrize("rule", SAMPLING, ids=lambda r: r.name)
def test_an_empty_tree_is_plain_sampling(rule):
    p = row(0.5, 0.0, 0.5)
    got = law(lambda d: [rule(EMPTY, p[None], d).token])
    assert got == {(0,): 0.5, (2,): 0.5}


# --- lossy rules ----------------------------------------------------------


def test_lossy_rules_never_pass_for_lossless():
    assert not set(LOSSY) & set(LOSSLESS)
    assert not typical().lossless and not lenience(0.5).lossless
    assert not rules.get("typical").lossless
    for m in methods():
        assert m.lossless == (m.name not in (*LOSSY, "medusa_typical"))
        assert m.lossless or m.summary.startswith("LOSSY")


def test_lenience_of_one_is_the_lossless_rule():
    rule = lenience(1.0)
    assert rule.lossless
    for case in (MIXED, EOS):
        make = BY_NAME["chain-iid"].make
        assert distance(case, make, rule) <= TOLERANCE


def induced(p, q, factor: float) -> torch.Tensor:
    """Law of the first token: accepted drafts plus the correction."""
    kept = torch.minimum(q, p / factor)
    return kept + (1 - kept.sum()) * residual(p, q)


@pytest.mark.parametrize("factor", [0.9, 0.5, 0.1])
def test_law_that_lenience_induces(factor):
    case = Case("free", lambda c: C[0], lambda c: C[1], new=2)
    got = output_law(case, BY_NAME["1-candidate"].make, lenience(factor))
    first = [0.0] * 3
    for tokens, prob in got.items():
        first[tokens[0]] += prob
    want = induced(*C, factor)
    assert first == pytest.approx(want.tolist(), abs=1e-12)
    assert total_variation(got, truth(case)) > 1e-3
    # The paper's bound: no token gets more than p / factor.
    assert bool((want <= C[0] / factor + 1e-12).all())


def test_lenience_moves_further_the_more_lenient_it_is():
    make = BY_NAME["chain-iid"].make
    case = GENERIC.short(3)
    off = [distance(case, make, lenience(f)) for f in (1.0, 0.8, 0.4)]
    assert off[0] <= TOLERANCE < off[1] < off[2]


def test_law_that_typical_acceptance_induces():
    """Top-1 drafts: kept where p is above its edge, else the argmax."""
    case = GENERIC.short(3)
    draft, rule = BY_NAME["chain-deterministic"], typical(0.3, 0.5)
    got = output_law(case, draft.make, rule)
    assert len(got) == 1  # nothing is drawn
    (tokens,) = got
    assert tokens == by_hand(case, 0.3, 0.5)
    assert total_variation(got, truth(case)) > 0.1


def by_hand(case: Case, epsilon: float, delta: float) -> tuple[int, ...]:
    out: tuple[int, ...] = ()
    while len(out) < case.new:
        for _ in range(min(3, case.new - len(out) - 1)):
            here = case.prompt + out
            p, q = case.p(here), case.q(here)
            x = max(range(3), key=q.__getitem__)
            h = -sum(v * math.log(v) for v in p if v)
            if p[x] <= min(epsilon, delta * math.exp(-h)):
                break
            out = (*out, x)
        p = case.p(case.prompt + out)
        out = (*out, max(range(3), key=p.__getitem__))
    return out


def test_typical_keeps_the_longest_path():
    p = row(0.6, 0.4, 0.0).expand(5, -1)
    tree = Tree((0, 1, 2, 1), (-1, -1, 0, 1))
    verdict = typical(0.3)(tree, p, Enumerate())
    assert verdict.path == (1, 3) and verdict.token == 0


def test_entropy():
    assert float(entropy(row(0.5, 0.5, 0.0))) == pytest.approx(math.log(2))
    assert float(entropy(row(1.0, 0.0))) == 0.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: typical(0.0), r"epsilon must be in \(0, 1\]"),
        (lambda: typical(0.1, 2.0), r"delta must be in \(0, 1\]"),
        (lambda: lenience(0.0), r"factor must be in \(0, 1\]"),
        (lambda: lenience(1.5), r"factor must be in \(0, 1\]"),
    ],
)
def test_settings_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lenience_refuses_what_token_wise_refuses():
    for draft in ("chain-deterministic", "bushy-iid"):
        with pytest.raises(ValueError, match="would be biased|needs a chain"):
            output_law(GENERIC.short(3), BY_NAME[draft].make, lenience())
