"""The decode loop.  Every method is a drafter and a rule around it.

    context -> drafter.propose -> target.forward -> rule -> commit

Does not handle: the names of methods (`specref.registry`), text and
convenience (`specref.api`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specref.draft.base import Accepted, Drafter, Prefill
from specref.draws import Draws
from specref.lm.base import LM, Cache, Output
from specref.rules.base import Rule, Verdict
from specref.rules.greedy import greedy
from specref.tree import Tree, pack
from specref.warp import Sampling

Stop = Callable[[Sequence[int]], bool]


@dataclass
class Round:
    """One target call, for every row.

    Attributes:
        tokens: what each row emitted (empty for rows that had ended).
        trees: what each row proposed.
        accepted: accepted nodes of each row, before any cut at the end.
        draft_s, verify_s, commit_s: seconds of proposing; of the target's
            forward; of the rule and all bookkeeping.
    """

    tokens: list[list[int]]
    trees: list[Tree]
    accepted: list[int]
    draft_s: float = 0.0
    verify_s: float = 0.0
    commit_s: float = 0.0


@dataclass
class Request:
    """What to decode, and when to end.

    Attributes:
        prompts: token ids per row, each with at least one token.
        max_new_tokens: exact limit of each row.
        eos: a row ends with the first of these (which it keeps).
        stop: called with a row's new tokens after each one; True ends it.
        draws: one source of randomness per row.
    """

    prompts: Sequence[Sequence[int]]
    draws: Sequence[Draws]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos: frozenset[int] = frozenset()
    stop: Stop | None = None

    def stopped(self, row: Sequence[int], new: Sequence[int]) -> bool:
        """Whether ``stop`` ends the row whose new tokens are ``new``; of
        them, ``row`` holds what was committed before this round."""
        return self.stop is not None and self.stop(new)


def rounds(
    target: LM, drafter: Drafter, rule: Rule, ask: Request
) -> Iterator[Round]:
    """Decode; yields one `Round` per target call.

    At the top of the loop the target's cache holds every committed token
    of a row but the last, which is fed together with the row's tree.
    """
    rows = [list(p) for p in ask.prompts]
    left = [ask.max_new_tokens] * len(rows)
    capacity = max(map(len, rows)) + max(left) + drafter.max_nodes + 1
    cache = target.new_cache(len(rows), capacity)
    seen = prefill(target, cache, rows, drafter)
    drafter.start(rows, capacity, ask.sampling, ask.eos, seen)
    while any(left):
        ask.draws[0].checkpoint((*map(tuple, rows), *drafter.key()))
        t0 = _now(target)
        trees = drafter.propose(rows, [max(n - 1, 0) for n in left], ask.draws)
        t1 = _now(target)
        tokens, parents = pack([r[-1] for r in rows], trees, target.device)
        out = target.forward(tokens, cache, parents, drafter.taps)
        t2 = _now(target)
        news: list[Accepted | None] = [None] * len(rows)
        for b in [b for b, n in enumerate(left) if n]:
            logits = out.logits[b, : 1 + len(trees[b])]
            verdict = judge(rule, trees[b], logits, rows[b], ask, b)
            emitted, ended = cut(trees[b], verdict, rows[b], left[b], ask)
            rows[b] += emitted
            left[b] = 0 if ended else left[b] - len(emitted)
            news[b] = tell(drafter, trees[b], verdict, emitted, out, b)
        cache.keep([kept(new.path) if new else [] for new in news])
        drafter.commit(news)
        yield Round(
            [list(new.tokens) if new else [] for new in news],
            trees,
            [len(new.path) if new else 0 for new in news],
            t1 - t0,
            t2 - t1,
            _now(target) - t2,
        )


def kept(path: Sequence[int]) -> list[int]:
    """Entries of the packed row to commit: the last token, then the path."""
    return [0, *(node + 1 for node in path)]


def prefill(
    target: LM, cache: Cache, rows: list[list[int]], drafter: Drafter
) -> list[Prefill] | None:
    """Feed what the cache lacks of each prompt, but its last token."""
    body = [row[n:-1] for row, n in zip(rows, cache.length, strict=True)]
    width = max(map(len, body))
    if not width:
        return None
    pad = torch.tensor([b + [0] * (width - len(b)) for b in body])
    out = target.forward(
        pad.to(target.device), cache, taps=drafter.taps, logits=False
    )
    cache.keep([range(len(b)) for b in body])
    if not drafter.features:
        return None
    return [
        Prefill(out.hidden[b, :n], tuple(t[b, :n] for t in out.taps))
        for b, n in enumerate(map(len, body))
    ]


def judge(
    rule: Rule,
    tree: Tree,
    logits: Tensor,
    row: Sequence[int],
    ask: Request,
    b: int,
) -> Verdict:
    """Apply the rule to one row; ``logits`` ``[1 + nodes, V]``."""
    if not torch.isfinite(logits.amax()):
        raise ValueError(
            f"target logits of row {b} are NaN or infinite after "
            f"{len(row)} tokens: check the weights and the dtype (float16 "
            "overflows in some models; bfloat16 or float32 does not)"
        )
    prefixes = None
    if ask.sampling.processors:
        prefixes = [list(row)] + [
            [*row, *(tree.tokens[j] for j in tree.path(i))]
            for i in range(len(tree))
        ]
    scores = ask.sampling.scores(logits, prefixes)
    if ask.sampling.greedy:
        return greedy(tree, scores, ask.draws[b])
    return rule(tree, ask.sampling.warp(scores), ask.draws[b])


def cut(
    tree: Tree,
    verdict: Verdict,
    row: Sequence[int],
    left: int,
    ask: Request,
) -> tuple[list[int], bool]:
    """What the row emits, and whether it ends: limit, EOS or stop."""
    tokens = [*(tree.tokens[i] for i in verdict.path), verdict.token]
    start = len(row) - (ask.max_new_tokens - left)  # the prompt's length
    new = list(row[start:])
    for n, token in enumerate(tokens, 1):
        new.append(token)
        if ask.stopped(row, new) or n == left or token in ask.eos:
            return tokens[:n], True
    return tokens, False


def tell(
    drafter: Drafter,
    tree: Tree,
    verdict: Verdict,
    emitted: Sequence[int],
    out: Output,
    b: int,
) -> Accepted:
    """The drafter's news, with features when it wants them."""
    hidden, taps = None, ()
    if drafter.features:
        nodes = torch.tensor(kept(verdict.path), device=out.hidden.device)
        hidden = out.hidden[b, nodes]
        taps = tuple(t[b, nodes] for t in out.taps)
    return Accepted(tree, verdict.path, tuple(emitted), hidden, taps)


def _now(target: LM) -> float:
    """Seconds; waits for a GPU so that times mean what they say."""
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter()
