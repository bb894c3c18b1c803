"""Benchmarks: paired runs, ratios with their spread, predictions beside.

Everything compared runs in one process, prompt by prompt, one after the
other, so that a slow minute hits all alike.  A run whose own baseline
varies wildly is refused: its ratios would mean nothing.

Does not handle: batches, several devices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from specref.api import Report, finish, prepare
from specref.meter import Metered, MeteredHead
from specref.registry import method as find
from specref.timing import Curves, Spread, timed


class WildSpread(RuntimeError):
    """The machine was too busy for the figures to mean anything."""


@dataclass
class Tally:
    """What one method did over the prompts."""

    reports: list[Report] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)  # predicted seconds

    def rate(self, kind: str | None = None) -> float:
        """Tokens per second of all runs (of one kind) together."""
        mine = self._of(kind)
        return sum(len(r.tokens) for r in mine) / sum(r.seconds for r in mine)

    def tau(self, kind: str | None = None) -> float:
        """Tokens per target call of all runs (of one kind) together."""
        mine = self._of(kind)
        calls = sum(len(r.rounds) for r in mine)
        return sum(len(r.tokens) for r in mine) / calls

    def acceptance(self, kind: str | None = None) -> list[float]:
        """Acceptance by depth of all runs together, see `Report`."""
        tried, taken = Counter[int](), Counter[int]()
        for report in self._of(kind):
            for r in report.rounds:
                height = r.trees[report.row].height
                got = r.accepted[report.row]
                tried.update(range(min(height, got + 1)))
                taken.update(range(min(height, got)))
        depths = range(max(tried, default=-1) + 1)
        return [round(taken[d] / tried[d], 4) for d in depths]

    def _of(self, kind: str | None) -> list[Report]:
        pairs = zip(self.reports, self.kinds, strict=True)
        return [r for r, k in pairs if kind in (None, k)]


Plan = dict[str, tuple[str, dict[str, Any]]]


@dataclass
class Run:
    """One metered run.

    Attributes:
        cost: seconds that its counted forwards should take.
        forward_s: seconds that they took.
    """

    report: Report
    cost: float
    forward_s: float

    @property
    def overhead(self) -> float:
        """Share of the run that was no model's forward."""
        return 1.0 - self.forward_s / self.report.seconds


def metered(
    target: Any, ids: list[int], label: str, curves: Curves, **options: Any
) -> Run:
    """Run a method with every forward counted."""
    job = prepare(target, ids, label, **options)
    meters: list[Any] = [Metered(job.target)]
    job.target = meters[0]
    if hasattr(job.drafter, "lm"):
        meters.append(Metered(job.drafter.lm))
        job.drafter.lm = meters[1]
    if hasattr(job.drafter, "head"):
        meters.append(MeteredHead(job.drafter.head))
        job.drafter.head = meters[-1]
    for meter in meters:
        curves.price(meter)  # its curve is measured before the run
    report = finish(job)[0]
    cost = sum(curves.price(m) for m in meters)
    return Run(report, cost, sum(m.seconds for m in meters))


def run_all(
    target: Any,
    plan: Plan,
    prompts: Iterable[Any],
    *,
    peers: dict[str, Callable[[list[int]], list[int]]] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    curves: Curves | None = None,
) -> dict[str, Tally]:
    """Every method of ``plan`` and every peer on every prompt, in turns.

    Args:
        plan: label -> (method, options); must hold ``autoregressive``.
        prompts: with ``.prompt`` and ``.kind``.
        peers: label -> function from prompt ids to new ids (transformers);
            the first peer's tokens (else the first method's) are those
            that ``same`` compares with.
        curves: measured costs; made on the way if not given.
    """
    tallies = {name: Tally() for name in [*(peers or {}), *plan]}
    curves = curves or Curves()
    sampling = {"temperature": temperature, "seed": seed}
    for item in tqdm(list(prompts), desc="bench", disable=None):
        ids = target.encode(item.prompt)
        truth: list[int] | None = None
        for name, tally in tallies.items():
            if name in plan:
                label, options = plan[name]
                run = metered(
                    target,
                    ids,
                    label,
                    curves,
                    max_new_tokens=max_new_tokens,
                    **sampling,
                    **options,
                )
                report, cost = run.report, run.cost
            else:
                tokens, seconds = timed(lambda n=name: peers[n](ids))
                report, cost = Report(tokens, None, [], seconds), math.nan
            truth = report.tokens if truth is None else truth
            tally.reports.append(report)
            tally.kinds.append(item.kind)
            tally.same.append(report.tokens == truth)
            tally.costs.append(cost)
    return tallies


def forecast(mine: Tally, own: Tally, kind: str | None = None) -> float:
    """Predicted speedup over plain decoding: tokens per predicted second.

    From counts (how many forwards over how many tokens) and the measured
    cost curves; the loop's own work is not in it.
    """

    def pace(t: Tally) -> float:
        rows = list(zip(t.reports, t.costs, t.kinds, strict=True))
        rows = [(r, c) for r, c, k in rows if kind in (None, k)]
        return sum(len(r.tokens) for r, _ in rows) / sum(c for _, c in rows)

    return pace(mine) / pace(own)


def ratios(
    mine: Tally, base: Tally, kind: str | None = None
) -> list[float]:
    """Speedup of each prompt: tokens per second over the baseline's."""
    a, b = mine._of(kind), base._of(kind)
    return [x.tokens_per_s / y.tokens_per_s for x, y in zip(a, b, strict=True)]


def check_quiet(base: Tally) -> None:
    """Raises `WildSpread` when the baseline's own speed is unsteady."""
    pace = Spread.of([1 / r.tokens_per_s for r in base.reports])
    if pace.wild:
        raise WildSpread(
            "the baseline's seconds per token range from "
            f"{pace.q1:.4f} to {pace.q3:.4f} (quartiles): the machine is "
            "busy, so no ratio is reported; run again when it is quiet"
        )


def predict(
    report_depth: Sequence[float],
    gamma: int,
    verify: dict[int, float],
    draft_step: float,
) -> float:
    """Predicted speedup of a chain over plain decoding with the same LM.

    Expected tokens from acceptance by depth, divided by the cost of
    ``gamma`` draft steps and one pass over ``gamma + 1`` tokens, all in
    units of a one-token pass (Leviathan et al. 2023, Theorem 3.8, with a
    verification cost that grows with gamma).
    """
    from specref.theory import expected_tokens_by_depth

    tokens = float(expected_tokens_by_depth(list(report_depth)[:gamma]))
    cost = gamma * draft_step + verify[gamma + 1]
    return tokens * verify[1] / cost


def rows(
    tallies: dict[str, Tally],
    plan: Plan,
    peer: str | None,
    greedy: bool = True,
) -> list[dict[str, Any]]:
    """One record per method and prompt kind, plus ``all``.

    Args:
        greedy: runs at temperature 0, whose tokens can be compared.
    """
    own, out = tallies["autoregressive"], []
    check_quiet(own)
    for name, (label, _) in plan.items():
        tally = tallies[name]
        for kind in [None, *dict.fromkeys(tally.kinds)]:
            over_own = Spread.of(ratios(tally, own, kind))
            over_peer = None
            if peer:
                over_peer = Spread.of(ratios(tally, tallies[peer], kind))
            out.append(
                {
                    "method": name,
                    "kind": kind or "all",
                    "tau": round(tally.tau(kind), 4),
                    "acceptance": tally.acceptance(kind),
                    "tokens_per_s": round(tally.rate(kind), 2),
                    "speedup_vs_transformers": over_peer
                    and round(over_peer.median, 3),
                    "speedup_vs_own": round(over_own.median, 3),
                    "spread_vs_own": over_own.json(),
                    "spread_vs_transformers": over_peer and over_peer.json(),
                    "predicted": round(forecast(tally, own, kind), 3),
                    "lossless": find(label).lossless,
                    "identical_to_greedy": all(tally.same) if greedy else None,
                }
            )
    return out
