"""What ``specref bench`` runs: four studies on the real model.

- ``methods``: every chosen method over the evaluation prompts, per kind.
- ``costs``: time of a pass over 1..64 tokens, ours and transformers'.
- ``heads``: acceptance, calibration, data and tree sizes of the heads.
- ``chain``: a chain of gamma 1..8: predicted beside measured speedup, and
  transformers' assisted generation with the same draft.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from specref import bench, chain, head_study, peer, timing
from specref.lm.drafts import COPIES
from specref.prompts import eval_prompts
from specref.registry import methods

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48, 64)
DEFAULT: bench.Plan = {
    "autoregressive": ("autoregressive", {}),
    "small": ("speculative", {"draft": "small", "gamma": 3}),
    "small_tree": (
        "dynamic",
        {"draft": "small", "nodes": 10, "depth": 4, "width": 3},
    ),
    "middle": ("speculative", {"draft": "middle", "gamma": 3}),
    "int4": ("int4", {}),
}


def plan_for(names: str) -> bench.Plan:
    """The plan named on the command line."""
    if names == "default":
        return DEFAULT
    known = [m.name for m in methods()]
    wanted = names.split(",")
    if names == "all":
        wanted = [m.name for m in methods() if m.ready]
        for name in sorted(set(known) - set(wanted)):
            print(f"left out, no weights: {name}", file=sys.stderr)
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"unknown method {name!r}: give names from {sorted(known)}"
            )
    return {"autoregressive": ("autoregressive", {})} | {
        name: (name, {}) for name in wanted
    }


def study_methods(args: Any, target: Any) -> dict[str, Any]:
    """Every method of the plan, over the evaluation prompts."""
    peers, label = {}, None
    if not args.no_transformers:
        label = "transformers"
        peers[label] = peer.transformers_peer(
            target, args.max_new_tokens, args.temperature
        )[1]
    plan = plan_for(args.methods)
    prompts = eval_prompts()[: args.prompts]
    curves = timing.Curves()
    warm_up(target, plan, prompts[:1], peers, curves)
    tallies = bench.run_all(
        target,
        plan,
        prompts,
        peers=peers,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        curves=curves,
    )
    greedy = args.temperature == 0
    return {"rows": bench.rows(tallies, plan, label, greedy)}


def warm_up(
    target: Any, plan: bench.Plan, prompts: Any, peers: Any, curves: Any
) -> None:
    """First calls load weights, make quantised copies and measure costs:
    not timed."""
    bench.run_all(
        target, plan, prompts, peers=peers, max_new_tokens=8, curves=curves
    )


def study_costs(args: Any, target: Any) -> dict[str, Any]:
    """Milliseconds of a pass over 1 to 64 tokens."""
    steps = {("own", k): f for k, f in timing.pass_steps(
        target.lm, SIZES).items()}
    if not args.no_transformers:
        model = peer.transformers_peer(target, 1)[0]
        theirs = peer.pass_steps(model, SIZES)
        steps |= {("transformers", k): f for k, f in theirs.items()}
    with torch.inference_mode():
        took = timing.interleave(steps, 25)
    out: dict[str, Any] = {"tokens": list(SIZES)}
    for name in dict.fromkeys(name for name, _ in took):
        for part, end in (("median", ""), ("q1", "_q1"), ("q3", "_q3")):
            out[f"{name}{end}_ms"] = [
                round(getattr(took[name, k], part) * 1e3, 2) for k in SIZES
            ]
    return out


def study_chain(args: Any, target: Any) -> dict[str, Any]:
    """Chains of each length: predicted beside measured speedup."""
    prompts = eval_prompts()[: args.prompts]
    n = args.max_new_tokens
    out = chain.study(target, prompts, args.draft, max_new_tokens=n)
    if not args.no_transformers and args.draft not in COPIES:
        out["assisted"] = chain.against_assisted(
            target, prompts, args.draft, max_new_tokens=n
        )
    return out


STUDIES = {
    "methods": study_methods,
    "costs": study_costs,
    "chain": study_chain,
    "heads": head_study.study,
}


def main(args: Any, target: Any) -> None:
    """Run a study; table for people, JSON for programs."""
    if args.study not in STUDIES:
        raise ValueError(
            f"study must be one of {sorted(STUDIES)}, got {args.study!r}"
        )
    command = "specref " + " ".join(sys.argv[1:])
    result = {
        "provenance": timing.provenance(target.lm, command),
        **STUDIES[args.study](args, target),
    }
    text = json.dumps(result, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n")
    if args.json:
        print(text)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """A plain table of the study's records."""
    where = result["provenance"]
    print(f"{where['device']}, {where['threads']} threads, {where['date']}")
    table = result.get("rows")
    if "by_depth" in result:
        table = [
            {"head": name, **{f"depth {i}": a for i, a in
                              enumerate(row["agree"], 1)}}
            for name, row in result["by_depth"].items()
        ]
    if table is None:
        columns = [k for k in result if k != "provenance"]
        table = [
            dict(zip(columns, row, strict=True))
            for row in zip(*(result[c] for c in columns), strict=True)
        ]
    keys = [k for k in table[0] if not k.startswith("spread")]
    print("  ".join(f"{k:>12}" for k in keys))
    for row in table:
        print("  ".join(f"{row[k]!s:>12}" for k in keys))
