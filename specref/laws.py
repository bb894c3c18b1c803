"""The proof engine: the exact output law of any code written on `Draws`.

`law(run)` replays ``run`` once for every sequence of random outcomes and
adds up the probability of each result.  What is measured is the production
code itself, so a test of its law is a proof for that case.

Does not handle: runs that may never end, and laws too wide to enumerate;
both are refused with an error, never cut short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from specref.draws import Boundary, Enumerate

Run = Callable[[Enumerate], object]


class Law(dict):
    """``{tokens: probability}`` with the number of ``branches`` walked."""

    branches: int = 0


def _outcome(value: object) -> tuple[int, ...]:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if hasattr(value, "tokens"):
        value = value.tokens
    return tuple(value)


def _branches(
    run: Run, start: list[int], skip: int | None, max_draws: int
) -> Iterator[tuple[Enumerate, object, tuple | None]]:
    """Every branch below ``start``: (draws, result, checkpoint key)."""
    prefix, floor = list(start), len(start)
    while True:
        draws = Enumerate(prefix, max_draws, skip)
        result, key = None, None
        try:
            result = run(draws)
        except Boundary as stop:
            key = stop.key
        yield draws, result, key
        at = len(draws.taken) - 1
        while at >= floor and not draws.open[at]:
            at -= 1
        if at < floor:
            return
        prefix = draws.taken[:at] + [draws.open[at][0]]


def law(
    run: Run,
    *,
    merge: bool = False,
    max_branches: int = 1_000_000,
    max_draws: int = 10_000,
) -> Law:
    """Exact law of ``run(draws)``.

    Args:
        run: a function of a `Draws` that returns tokens (a sequence of
            ints, a tensor, or anything with ``.tokens``).  Called once per
            branch; it must be deterministic given its draws.
        merge: join branches that reach the same ``draws.checkpoint(key)``.
            Valid when the future depends on the past through ``key`` only;
            the decode loop's key holds the committed tokens and the
            drafter's own state.  Far fewer branches, same law.
        max_branches: refuse beyond this many replays.
        max_draws: refuse a single branch with more draws than this.
    Returns:
        `Law`, a dict from tuples of tokens to probabilities.
    Raises:
        RuntimeError: the run has too many branches, may never end, or is
            not deterministic given its draws.
    """
    if not callable(run):
        raise TypeError(f"run must be a function of draws, got {run!r}")
    out, count, passed = Law(), 0, 0
    # States that share a number of passed checkpoints: a state's mass is
    # complete before it is expanded, its predecessors being all one earlier.
    level: dict[tuple, list] = {(): [1.0, []]}
    while level:
        later: dict[tuple, list] = {}
        for mass, prefix in level.values():
            skip = passed if merge else None
            for draws, result, key in _branches(run, prefix, skip, max_draws):
                count += 1
                if count > max_branches:
                    raise RuntimeError(
                        f"run has more than {max_branches} branches: use a "
                        "smaller vocabulary, gamma or length, pass "
                        "merge=True, or raise max_branches"
                    )
                share = mass * math.prod(draws.probs[len(prefix) :])
                if key is not None:
                    entry = later.setdefault(key, [0.0, list(draws.taken)])
                    entry[0] += share
                else:
                    tokens = _outcome(result)
                    out[tokens] = out.get(tokens, 0.0) + share
        level, passed = later, passed + 1
    out.branches = count
    total = math.fsum(out.values())
    if abs(total - 1.0) > 1e-9:
        raise RuntimeError(
            f"the branches' probabilities add up to {total}, not 1: run must "
            "be deterministic given its draws (state left over from an "
            "earlier run?)"
        )
    return out


def total_variation(
    a: Mapping[tuple, float], b: Mapping[tuple, float]
) -> float:
    """Half the L1 distance of two laws given as dicts."""
    keys = set(a) | set(b)
    return 0.5 * sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in keys)
