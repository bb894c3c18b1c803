"""Adversarial cases and drafters that the proof suite shares.

A `Case` is a pair of context-dependent laws with everything that could
betray a wrong method; `truth` is its autoregressive law, computed without
the library's code; `distance` is the one checker: it compares the law of
the production loop with the truth, for real rules and mutants alike.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from specref.decode import Request, rounds
from specref.draft import shapes
from specref.draft.base import Drafter
from specref.draft.dynamic import Dynamic
from specref.draft.grow import Static
from specref.draft.lengths import schedule
from specref.draft.lookup import PromptLookup
from specref.draft.model import ModelDrafter
from specref.draft.none import NoDraft
from specref.draft.scripted import Scripted
from specref.draws import Draws
from specref.laws import Law, law, total_variation
from specref.lm import Table
from specref.lm.base import Output
from specref.rules import Rule
from specref.tree import (
    DETERMINISTIC,
    EMPTY,
    IID,
    WITHOUT_REPLACEMENT,
    Tree,
    chain,
)
from specref.warp import Sampling, Warp

Context = tuple[int, ...]
LawOf = Callable[[Context], Sequence[float]]
TOLERANCE = 1e-12

TRAITS = (
    "generic",
    "only q can say",
    "only p can say",
    "disjoint",
    "equal",
    "near",
    "p certain",
    "q certain",
    "ties",
)


def normal(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [w / total for w in weights]


def pair(trait: str, rng: random.Random, vocab: int) -> tuple[list, list]:
    """Laws p and q of one context with the named relation."""
    p, q = ([0.1 + rng.random() for _ in range(vocab)] for _ in range(2))
    a, b = rng.sample(range(vocab), 2)
    if trait == "only q can say":
        p[a] = 0.0
    elif trait == "only p can say":
        q[a] = 0.0
    elif trait == "disjoint":
        p = [w * (i == a) for i, w in enumerate(p)]
        q = [w * (i != a) for i, w in enumerate(q)]
    elif trait == "equal":
        q = p
    elif trait == "near":
        q = [w * (1 + 1e-15 * i) for i, w in enumerate(p)]
    elif trait == "p certain":
        p = [float(i == a) for i in range(vocab)]
    elif trait == "q certain":
        q = [float(i == b) for i in range(vocab)]
    elif trait == "ties":
        p = [1.0] * vocab
        q = [1.0 + (i == a) for i in range(vocab)]
    return normal(p), normal(q)


def mixed(seed: int, vocab: int = 3) -> tuple[LawOf, LawOf]:
    """p and q whose relation changes from context to context."""

    @functools.cache
    def both(context: Context) -> tuple[list, list]:
        rng = random.Random(f"{seed}{context}")
        # Half of the contexts are generic, so that the others are reached.
        return pair(rng.choice(TRAITS + ("generic",) * 8), rng, vocab)

    return lambda c: both(c)[0], lambda c: both(c)[1]


def uniform_trait(trait: str, seed: int, vocab: int = 3):
    """p and q with the same relation in every context."""

    @functools.cache
    def both(context: Context) -> tuple[list, list]:
        return pair(trait, random.Random(f"{seed}{context}"), vocab)

    return lambda c: both(c)[0], lambda c: both(c)[1]


@dataclass(frozen=True)
class Case:
    """What is decoded, under which law."""

    name: str
    p: LawOf
    q: LawOf
    vocab: int = 3
    prompt: Context = (1, 0)
    new: int = 4
    eos: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()

    def __str__(self) -> str:
        return self.name

    def short(self, new: int) -> Case:
        return replace(self, new=min(new, self.new))


def penalty(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Said tokens get rarer, and the last one may not be said again when
    the prefix has an odd length: depends on prefix, order and length.
    Needs a law with more than one token."""
    out = scores.clone()
    for place, token in enumerate(ids[0].tolist()):
        out[0, token] -= 0.2 + 0.1 * place
    if ids.shape[1] % 2:
        out[0, ids[0, -1]] = -torch.inf
    return out


COOL = Warp(0.7, top_k=3, top_p=0.85)
HOT = Warp(1.3, top_k=2)

MIXED = Case("mixed", *mixed(23))
EOS = Case("eos", *mixed(55), eos=frozenset({1}), prompt=(1, 2))
COOLED = Case("T=0.7", *mixed(26, 4), vocab=4, new=3, sampling=Sampling(COOL))
HEATED = Case("T=1.3", *mixed(50), sampling=Sampling(HOT), prompt=(0,))
PROCESSED = Case(
    "processors",
    *uniform_trait("generic", 8),
    sampling=Sampling(Warp(0.7), (penalty,)),
)
GENERIC = Case("generic", *uniform_trait("generic", 1))
GREEDY = Case("T=0", *mixed(2), sampling=Sampling(Warp(0.0)))
CASES = (GENERIC, MIXED, EOS, COOLED, HEATED, PROCESSED)


def plain_warp(scores: Sequence[float], warp: Warp) -> list[float]:
    """`Warp` again, on lists: an independent account of the sampling law."""
    n = len(scores)
    if warp.temperature == 0.0:
        best = max(range(n), key=lambda i: (scores[i], -i))
        return [float(i == best) for i in range(n)]
    if warp.top_k is not None:
        edge = sorted(scores, reverse=True)[: warp.top_k][-1]
        scores = [s if s >= edge else -math.inf for s in scores]
    prob = normal([math.exp(s / warp.temperature) for s in scores])
    if warp.top_p is not None and warp.top_p < 1.0:
        above, kept = 0.0, [0.0] * n
        for i in sorted(range(n), key=lambda i: (-prob[i], i)):
            if above < warp.top_p:
                kept[i] = prob[i]
            above += prob[i]
        prob = normal(kept)
    return prob


def next_law(law_of: LawOf, sampling: Sampling, context: Context) -> list:
    """The sampling law after ``context``."""
    prob = law_of(context)
    scores = [math.log(x) if x else -math.inf for x in prob]
    row = torch.tensor([scores], dtype=torch.float64)
    for process in sampling.processors:
        row = process(torch.tensor([context]), row)
    return plain_warp(row[0].tolist(), sampling.warp)


def truth(case: Case, prompt: Context | None = None) -> Law:
    """The target's autoregressive law, token by token."""
    start = case.prompt if prompt is None else prompt
    out = Law()

    def walk(tokens: Context, mass: float) -> None:
        if len(tokens) == case.new or (tokens and tokens[-1] in case.eos):
            out[tokens] = mass
            return
        here = next_law(case.p, case.sampling, start + tokens)
        for token, prob in enumerate(here):
            if prob > 0.0:
                walk((*tokens, token), mass * prob)

    walk((), 1.0)
    return out


Make = Callable[[Table], Drafter]


def output_law(
    case: Case, make: Make, rule: Rule, merge: bool = True
) -> Law:
    """Law of the production loop."""
    target, draft = Table(case.p, case.vocab), Table(case.q, case.vocab)

    def run(draws: Draws) -> list[int]:
        ask = Request(
            [case.prompt], [draws], case.new, case.sampling, case.eos
        )
        with torch.inference_mode():
            loop = rounds(target, make(draft), rule, ask)
            return [t for r in loop for t in r.tokens[0]]

    return law(run, merge=merge)


def distance(
    case: Case, make: Make, rule: Rule, merge: bool = True
) -> float:
    """Total variation between the loop's law and the target's own."""
    return total_variation(output_law(case, make, rule, merge), truth(case))


@dataclass(frozen=True)
class Draft:
    """A drafter by name: its kind of proposal, its form, its maker."""

    name: str
    kind: str
    make: Make
    is_chain: bool = False

    def __str__(self) -> str:
        return self.name


def model(
    shape: Sequence[int],
    kind: str,
    stop_below: float | None = None,
    length: Callable | None = None,
) -> Make:
    """A maker of model drafters, with fresh state for every branch."""
    policy = Static(shape, kind, stop_below)
    return lambda lm: ModelDrafter(lm, policy, length and length())


def gaps(lm: Table) -> Drafter:
    """Chains of length 0, 1 or 2, by what was committed last."""

    def script(row: Context, room: int, draws: Draws) -> Tree:
        context, tokens, laws = row, [], []
        for _ in range(min(room, row[-1])):
            laws.append(lm.law(context))
            tokens.append(int(draws.categorical(laws[-1])))
            context = (*context, tokens[-1])
        return chain(tokens, torch.stack(laws)) if tokens else EMPTY

    return Scripted(script, max_nodes=3)


CHAIN, BUSHY, LOPSIDED = (-1, 0, 1), (-1, -1, 0, 0), (-1, -1, 0, 2)
KINDS = (IID, WITHOUT_REPLACEMENT, DETERMINISTIC)
DRAFTS = (
    Draft("none", DETERMINISTIC, lambda lm: NoDraft(), True),
    *(Draft(f"chain-{k}", k, model(CHAIN, k), True) for k in KINDS),
    *(Draft(f"bushy-{k}", k, model(BUSHY, k)) for k in KINDS),
    *(Draft(f"lopsided-{k}", k, model(LOPSIDED, k)) for k in KINDS),
    Draft("2-chains", IID, model(shapes.chains(2, 2), IID)),
    Draft("1-candidate", IID, model((-1,), IID), True),
    Draft("3-candidates", IID, model((-1, -1, -1), IID)),
    Draft(
        "3-distinct",
        WITHOUT_REPLACEMENT,
        model((-1, -1, -1), WITHOUT_REPLACEMENT),
    ),
    Draft("stop-chain", IID, model(CHAIN, IID, 0.45), True),
    Draft("stop-tree", IID, model(BUSHY, IID, 0.45)),
    Draft(
        "schedule",
        IID,
        model(CHAIN, IID, None, lambda: schedule("heuristic", 1, 3)),
        True,
    ),
    Draft("gaps", IID, gaps, True),
    Draft(
        "dynamic",
        DETERMINISTIC,
        lambda lm: ModelDrafter(lm, Dynamic(nodes=4, depth=3, width=2)),
    ),
    Draft("lookup", DETERMINISTIC, lambda lm: PromptLookup(3, 2), True),
)


BY_NAME = {d.name: d for d in DRAFTS}


def admitted(rule: Rule, draft: Draft) -> bool:
    """The rule promises losslessness for this drafter."""
    if draft.name == "none":
        return True
    return draft.kind in rule.admits and (
        draft.is_chain or not rule.chains_only
    )


class Memo(Table):
    """A real module whose forwards are remembered by context.

    Logits are the module's own, from a fresh cache, in float64.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__(lambda context: (), lm.vocab_size)
        self.lm = lm

    def law(self, context: Sequence[int]) -> torch.Tensor:
        """Logits ``[V]`` after ``context``."""
        key = tuple(context)
        if key not in self._memo:
            cache = self.lm.new_cache(1, len(key))
            out = self.lm.forward(torch.tensor([key]), cache)
            self._memo[key] = out.logits[0, -1].double()
        return self._memo[key]

    def forward(self, *args: Any, **options: Any) -> Output:
        """See `LM.forward`."""
        out = super().forward(*args, **options)
        return Output(out.hidden, out.hidden, out.taps)

    def probs(self, context: Context) -> list[float]:
        """The law after ``context``, for `Case`."""
        with torch.inference_mode():
            return self.law(context).softmax(-1).tolist()
