"""Mutants: deliberately broken variants that the suite must catch.

Each line of `MUTANTS` breaks the production code in one way that has been
shipped, or nearly shipped, somewhere.  The checker is the one of the real
rules (`cases.distance`): it passes the sound version and flags the mutant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from cases import (
    BY_NAME,
    COOLED,
    EOS,
    GENERIC,
    MIXED,
    PROCESSED,
    TOLERANCE,
    Case,
    Make,
    distance,
    uniform_trait,
)
from test_lossless import batch_distance
from torch import Tensor

from specref import decode
from specref.draws import Draws, Enumerate
from specref.rules import (
    LOSSLESS,
    Rule,
    Verdict,
    block,
    kseq,
    recursive,
    traversal,
)
from specref.rules.base import draw, residual, stop_at
from specref.rules.tokenwise import accepted, ratios
from specref.tree import EMPTY, IID, ROOT, Tree
from specref.warp import Sampling

CAUGHT = 1e-6

# --- broken rules ---------------------------------------------------------


def token_rule(rest: Callable[[Tree, Tensor, int], Tensor]) -> Callable:
    """Token-wise acceptance with another law for the extra token."""

    def decide(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
        n = accepted(ratios(tree, p).clamp(max=1.0), draws)
        return Verdict(tuple(range(n)), draw(rest(tree, p, n), draws))

    return decide


def correction(tree: Tree, p: Tensor, n: int, row: int) -> Tensor:
    """The sound extra law, but with the draft law of position ``row``."""
    return p[n] if n == len(tree) else residual(p[n], tree.law(row))


def bonus_from_the_node_above(tree, p, n):
    return p[max(n - 1, 0)] if n == len(tree) else correction(tree, p, n, n)


def bonus_after_a_rejection(tree, p, n):
    return p[len(tree)]


def correction_from_p(tree, p, n):
    return p[n]


def residual_of_the_next_position(tree, p, n):
    return correction(tree, p, n, min(n + 1, len(tree) - 1))


def residual_of_the_previous_position(tree, p, n):
    return correction(tree, p, n, max(n - 1, 0))


def ratio_upside_down(tree, p, draws):
    n = accepted((1.0 / ratios(tree, p)).clamp(max=1.0), draws)
    return Verdict(tuple(range(n)), draw(correction(tree, p, n, n), draws))


def block_that_breaks_at_the_first_failure(tree, p, draws):
    w = block.weights(ratios(tree, p))
    n = accepted(block.chances(tree, p, w), draws) if len(tree) else 0
    rest = p[n] if n == len(tree) else residual(w[n] * p[n], tree.law(n))
    return Verdict(tuple(range(n)), draw(rest, draws))


def keep_the_longest_of_k(tree, p, draws):
    """Every chain is judged on its own; the longest one's extra token."""
    best, rest = ROOT, p[0]
    for n, node in enumerate(tree.children(ROOT)):
        last, law = ROOT, None
        while law is None:
            q, here, x = tree.law(node), p[last + 1], tree.tokens[node]
            if not draws.bernoulli((here[x] / q[x]).clamp(max=1.0)):
                law = residual(here, q)
                continue
            last, below = node, tree.children(node)
            node = below[0] if below else node
            law = None if below else p[last + 1]
        if n == 0 or tree.depth(last) > tree.depth(best):
            best, rest = last, law
    return stop_at(tree, best, draw(rest, draws))


STEPS = 8  # a grid of uniforms on which p / q below is exact


def on_a_grid(fresh: bool) -> Rule:
    """One test with a uniform off a grid, and a residual by inversion of
    the same uniform (the mutant) or of a fresh one (sound)."""
    grid = torch.full((STEPS,), 1 / STEPS, dtype=torch.float64)

    def pick(law: Tensor, u: float) -> int:
        return int((law.cumsum(0) <= u).sum())

    def decide(tree: Tree, p: Tensor, draws: Draws) -> Verdict:
        def uniform() -> float:
            return (int(draws.categorical(grid)) + 0.5) / STEPS

        u = uniform()
        if not len(tree):
            return Verdict((), pick(p[0], u))
        if u < float(ratios(tree, p)[0]):
            return Verdict((0,), pick(p[1], uniform()))
        rest = residual(p[0], tree.law(0))
        return Verdict((), pick(rest, uniform() if fresh else u))

    return Rule("grid", decide, True, frozenset({IID}), "none", True)


# --- broken parts ---------------------------------------------------------


def not_renormalised(tree, siblings, like):
    law = tree.law(siblings[0]) if siblings else None
    for node in siblings:
        yield law
        law = law.clone()
        law[tree.tokens[node]] = 0.0


def removed_before_the_update(tree, siblings, p):
    left, chances = [p], []
    laws = recursive.drafted_from(tree, siblings, p)
    for node, q in zip(siblings, laws, strict=True):
        x = tree.tokens[node]
        chances.append((left[-1][x] / q[x]).clamp(max=1.0))
        masked = q.clone()
        masked[x] = 0.0
        left.append(residual(left[-1], masked))
    return torch.stack(chances) if chances else p.new_zeros(0), left


def weight_forgotten(p: Tensor, q: Tensor) -> Tensor:
    return residual(p / p.sum(), q)


def weigh_again(self) -> int:
    """Weights of nodes that were entered before are computed afresh."""
    for node in [v for v in self.weight if v != ROOT]:
        del self.weight[node]
    return sound_leaf(self)


def never_at_eos(tree, verdict, row, left, ask):
    return sound_cut(tree, verdict, row, left, replace(ask, eos=frozenset()))


def short_prefixes(self, logits, prefixes):
    return sound_scores(self, logits, [p[:-1] or p for p in prefixes])


def committed_prefix_only(rule, tree, logits, row, ask, b):
    """Processors see every node of the tree as if it followed the row."""
    scores = ask.sampling.scores(logits, [list(row)] * len(logits))
    return rule(tree, ask.sampling.warp(scores), ask.draws[b])


def padding_is_text(target, cache, rows, drafter):
    """The prompt's padding stays in the cache, as tokens of id 0."""
    width = max(map(len, rows)) - 1
    body = [[*row[:-1], *[0] * (width + 1 - len(row))] for row in rows]
    target.forward(torch.tensor(body), cache)
    cache.keep()


class Shared:
    """The second row says what the first one said, where it can."""

    def __init__(self, inner: Enumerate, said: list[int], echo: bool) -> None:
        self.inner, self.said, self.echo = inner, said, echo

    def categorical(self, prob: Tensor) -> Tensor:
        if self.echo and self.said and prob[self.said[0]] > 0:
            return torch.tensor(self.said.pop(0))
        out = self.inner.categorical(prob)
        self.said[:] = [] if self.echo else [int(out)]
        return out

    def checkpoint(self, key: tuple) -> None:
        self.inner.checkpoint(key)


def rows_share_their_draws(self: Enumerate, index: int) -> Shared:
    if index == 0:
        self.said = []
    return Shared(self, self.said, index > 0)


# --- broken drafters ------------------------------------------------------


class Edited:
    """A drafter whose proposals are changed behind its back."""

    def __init__(self, inner, lm, edit) -> None:
        self.inner, self.lm, self.edit = inner, lm, edit

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def propose(self, rows, room, draws):
        trees = self.inner.propose(rows, room, draws)
        return [
            self.edit(self.lm, tuple(row), tree, limit)
            for row, tree, limit in zip(rows, trees, room, strict=True)
        ]


def context(row, tree, node) -> tuple[int, ...]:
    return (*row, *(tree.tokens[i] for i in tree.path(node)))


def with_laws(lm, row, tree, kind) -> Tree:
    """The tree relabelled, each node with the draft's law at its parent."""
    laws = [lm.law(context(row, tree, up)) for up in tree.parents]
    every = tuple(range(len(tree)))
    return Tree(tree.tokens, tree.parents, kind, torch.stack(laws), every)


def unwarped_q(lm, row, tree, room):
    return with_laws(lm, row, tree, IID) if len(tree) else tree


def top_k_called_sampled(lm, row, tree, room):
    return with_laws(lm, row, tree, IID) if len(tree) else tree


def unsure_token_dropped(lm, row, tree, room):
    if not len(tree) or tree.law(len(tree) - 1)[tree.tokens[-1]] >= 0.45:
        return tree
    n = len(tree) - 1
    return as_chain(tree.tokens[:n], tree.q[:n]) if n else EMPTY


def padded_with_token_0(lm, row, tree, room):
    tokens, laws = list(tree.tokens), list(tree.q if len(tree) else [])
    while len(tokens) < min(room, 3):
        laws.append(lm.law((*row, *tokens)))
        tokens.append(0)
    return as_chain(tokens, torch.stack(laws)) if tokens else EMPTY


def as_chain(tokens, q) -> Tree:
    n = len(tokens)
    parents, every = tuple(range(-1, n - 1)), tuple(range(n))
    return Tree(tuple(tokens), parents, IID, q, every)


# --- the table ------------------------------------------------------------

sound_cut = decode.cut
sound_scores = Sampling.scores
sound_leaf = traversal._State.leaf


def even(context):
    return (0.25,) * 4


def steep(context):
    return (0.375, 0.375, 0.125, 0.125)


SPREAD = Case("spread", *uniform_trait("generic", 5))
GRID = Case("grid", steep, even, vocab=4, new=2)


@dataclass(frozen=True)
class Mutant:
    """What is broken: the rule (its ``decide``), a part that is patched
    (owner, name, broken) or the drafter's proposals (``edit``)."""

    name: str
    rule: Rule
    draft: str
    case: Case = MIXED
    decide: Callable | None = None
    patch: tuple | None = None
    edit: Callable | None = None

    def __str__(self) -> str:
        return self.name

    def parts(self) -> tuple[Make, Rule]:
        """The broken drafter and rule."""
        make, rule = BY_NAME[self.draft].make, self.rule
        if self.decide is not None:
            rule = replace(rule, decide=self.decide)
        if self.edit is None:
            return make, rule
        return lambda lm: Edited(make(lm), lm, self.edit), rule


TOKEN, BLOCK, KSEQ = (LOSSLESS[n] for n in ("tokenwise", "block", "kseq"))
RECURSIVE, NAIVE = LOSSLESS["recursive"], LOSSLESS["naive"]
TRAVERSAL = LOSSLESS["traversal"]
CHAIN, DISTINCT = "chain-iid", "3-distinct"
MUTANTS = (
    # The extra token.
    *(
        Mutant(rest.__name__, TOKEN, CHAIN, GENERIC, token_rule(rest))
        for rest in (
            bonus_from_the_node_above,
            bonus_after_a_rejection,
            correction_from_p,
            residual_of_the_next_position,
            residual_of_the_previous_position,
        )
    ),
    # The tests.
    Mutant("min(1, q/p)", TOKEN, CHAIN, decide=ratio_upside_down),
    Mutant(
        "block stops at its first failure",
        BLOCK,
        CHAIN,
        decide=block_that_breaks_at_the_first_failure,
    ),
    Mutant(
        "block residual without its weight",
        BLOCK,
        CHAIN,
        GENERIC,
        patch=(block, "residual", weight_forgotten),
    ),
    Mutant(
        "traversal weighs an entered node again",
        TRAVERSAL,
        CHAIN,
        patch=(traversal._State, "leaf", weigh_again),
    ),
    Mutant(
        "k-SEQ with rho = 1",
        KSEQ,
        "3-candidates",
        MIXED.short(2),
        patch=(kseq, "solve_rho", lambda p, q, k: 1.0),
    ),
    Mutant(
        "longest of k drafts, one draft's residual",
        RECURSIVE,
        "2-chains",
        decide=keep_the_longest_of_k,
    ),
    Mutant(
        "q not renormalised after a removal",
        RECURSIVE,
        DISTINCT,
        SPREAD,
        patch=(recursive, "drafted_from", not_renormalised),
    ),
    Mutant(
        "token removed from q before the residual",
        RECURSIVE,
        DISTINCT,
        patch=(recursive, "sibling_tests", removed_before_the_update),
    ),
    Mutant(
        "one uniform for the test and the correction",
        on_a_grid(fresh=True),
        "1-candidate",
        GRID,
        decide=on_a_grid(fresh=False).decide,
    ),
    # What the drafter says about its proposal.
    Mutant("q before the warp", TOKEN, CHAIN, COOLED, edit=unwarped_q),
    Mutant(
        "top-k children judged by p/q",
        RECURSIVE,
        "bushy-deterministic",
        edit=top_k_called_sampled,
    ),
    Mutant(
        "unsure token dropped after it was drawn",
        TOKEN,
        "stop-chain",
        edit=unsure_token_dropped,
    ),
    Mutant(
        "padding judged as token 0",
        TOKEN,
        "stop-chain",
        edit=padded_with_token_0,
    ),
    # The loop.
    Mutant(
        "EOS does not stop",
        TOKEN,
        CHAIN,
        EOS,
        patch=(decode, "cut", never_at_eos),
    ),
    Mutant(
        "processors lag one token behind",
        TOKEN,
        CHAIN,
        PROCESSED,
        patch=(Sampling, "scores", short_prefixes),
    ),
    Mutant(
        "processors see the committed prefix only",
        TOKEN,
        CHAIN,
        PROCESSED,
        patch=(decode, "judge", committed_prefix_only),
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_checker_flags(mutant, monkeypatch):
    case = mutant.case.short(3)
    sound = BY_NAME[mutant.draft].make
    assert distance(case, sound, mutant.rule) <= TOLERANCE
    make, rule = mutant.parts()
    if mutant.patch is not None:
        monkeypatch.setattr(*mutant.patch)
    assert distance(case, make, rule) > CAUGHT


@pytest.mark.parametrize(
    "patch",
    [
        (Enumerate, "row", rows_share_their_draws),
        (decode, "prefill", padding_is_text),
    ],
    ids=["rows share their draws", "padding of a prompt is text"],
)
def test_the_batch_checker_flags(patch, monkeypatch):
    case, make = GENERIC.short(2), BY_NAME["none"].make
    assert batch_distance(case, make, NAIVE) <= TOLERANCE
    monkeypatch.setattr(*patch)
    assert batch_distance(case, make, NAIVE) > CAUGHT


def test_there_are_enough_mutants():
    assert len(MUTANTS) + 2 >= 14
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
