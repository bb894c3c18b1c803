"""The chain study: predicted beside measured speedup, gamma by gamma.

The prediction for every gamma comes from the acceptance by depth of the
longest chain and from measured forward times; the measurement from the
decoding rounds of the same prompts.  The same draft in transformers'
assisted generation is measured alongside (`against_assisted`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from specref import bench, timing
from specref.api import Report
from specref.lm.drafts import resolve


def decoding(report: Report) -> tuple[int, float]:
    """Tokens and seconds of all rounds but the first, which also feeds
    the prompt to the draft."""
    rest = report.rounds[1:]
    seconds = sum(r.draft_s + r.verify_s + r.commit_s for r in rest)
    return sum(len(r.tokens[report.row]) for r in rest), seconds


def by_depth(reports: Sequence[Report]) -> list[float]:
    """Acceptance by depth over all reports, as in `Report`."""
    tried: dict[int, int] = {}
    taken: dict[int, int] = {}
    for report in reports:
        for r in report.rounds:
            height, got = r.trees[report.row].height, r.accepted[report.row]
            for depth in range(min(height, got + 1)):
                tried[depth] = tried.get(depth, 0) + 1
                taken[depth] = taken.get(depth, 0) + (depth < got)
    return [taken[d] / tried[d] for d in sorted(tried)]


def study(
    target: Any,
    prompts: Sequence[Any],
    draft: str = "middle",
    most: int = 8,
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """Chains of gamma 1..``most`` with one draft, greedy.

    Returns:
        the records of the Speedup notebook's table; times in ms.
    """
    sizes = (*range(1, most + 2), most + 6)
    runs: dict[int, list[bench.Run]] = {g: [] for g in range(most + 1)}
    curves = timing.Curves(sizes)
    lm = resolve(draft, target.lm)
    mine, theirs = curves.of(lm), curves.of(target.lm)
    for item in tqdm(prompts, desc="chain", disable=None):
        ids = target.encode(item.prompt)
        for g, done in runs.items():
            what: dict[str, Any] = {"draft": draft, "gamma": g} if g else {}
            label = "speculative" if g else "autoregressive"
            done.append(
                bench.metered(
                    target,
                    ids,
                    label,
                    curves,
                    max_new_tokens=max_new_tokens,
                    **what,
                )
            )
    reports = {g: [r.report for r in done] for g, done in runs.items()}
    beta = by_depth(reports[most])
    verify = {n: theirs(n) for n in range(1, most + 2)}
    table = []
    for g in range(1, most + 1):
        predicted = bench.predict(beta, g, verify, mine(1))
        row = _row(g, predicted, reports[g], reports[0], mine, theirs)
        share = statistics.median(r.overhead for r in runs[g])
        table.append(row | {"overhead": round(share, 4)})
    beta = [round(b, 4) for b in beta]
    return {"draft": draft, "acceptance_by_depth": beta, "rows": table}


def _row(
    gamma: int,
    predicted: float,
    mine: Sequence[Report],
    own: Sequence[Report],
    draft: Any,
    target: Any,
) -> dict[str, Any]:
    pairs = [
        _pace(a) / _pace(b) for a, b in zip(mine, own, strict=True)
    ]
    spread = timing.Spread.of(pairs)
    tokens = sum(decoding(r)[0] for r in mine)
    calls = sum(len(r.rounds) - 1 for r in mine)
    measured = _together(mine) / _together(own)
    return {
        "gamma": gamma,
        "tau": round(tokens / calls, 4),
        "predicted": round(predicted, 4),
        "measured": round(measured, 4),
        "q1": round(spread.q1, 4),
        "q3": round(spread.q3, 4),
        "ratio": round(measured / predicted, 4),
        "draft_step_ms": round(draft(1) * 1e3, 3),
        "verify_ms": round(target(gamma + 1) * 1e3, 3),
    }


def _pace(report: Report) -> float:
    tokens, seconds = decoding(report)
    return tokens / seconds


def _together(reports: Sequence[Report]) -> float:
    """Tokens per second of several runs as one."""
    both = [decoding(r) for r in reports]
    return sum(n for n, _ in both) / sum(s for _, s in both)


def against_assisted(
    target: Any,
    prompts: Sequence[Any],
    draft: str = "middle",
    gamma: int = 4,
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """The same draft and gamma here and in transformers, greedy, paired.

    transformers' confidence threshold is off and its schedule constant, so
    that both propose chains of ``gamma``.
    """
    from specref.lm.export import to_transformers
    from specref.peer import transformers_peer

    helper = to_transformers(resolve(draft, target.lm))
    config = helper.generation_config
    config.num_assistant_tokens = gamma
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    _, peer = transformers_peer(target, max_new_tokens, assistant_model=helper)
    plan = {
        "autoregressive": ("autoregressive", {}),
        "specref": ("speculative", {"draft": draft, "gamma": gamma}),
    }
    curves = timing.Curves()
    # The first calls make copies and measure costs: not timed.
    bench.run_all(
        target,
        plan,
        prompts[:1],
        peers={"peer": peer},
        max_new_tokens=8,
        curves=curves,
    )
    tallies = bench.run_all(
        target,
        plan,
        prompts,
        peers={"peer": peer},
        max_new_tokens=max_new_tokens,
        curves=curves,
    )
    bench.check_quiet(tallies["autoregressive"])
    mine, theirs = tallies["specref"], tallies["peer"]
    return {
        "draft": draft,
        "gamma": gamma,
        "specref_tokens_per_s": round(mine.rate(), 2),
        "transformers_tokens_per_s": round(theirs.rate(), 2),
        "ratio": timing.Spread.of(bench.ratios(mine, theirs)).json(),
        "same_tokens": all(mine.same),
    }
