"""What ``specref bench`` runs: three studies on the real model.

- ``methods``: every chosen method over the evaluation prompts, per kind.
- ``costs``: time of a pass over 1..64 tokens, ours and transformers'.
- ``chain``: a chain of gamma 1..8: predicted beside measured speedup, and
  transformers' assisted generation with the same draft.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specref import bench, chain, timing
from specref.lm.drafts import COPIES
from specref.prompts import eval_prompts
from specref.registry import methods

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48, 64)
DEFAULT: bench.Plan = {
    "autoregressive": ("autoregressive", {}),
    "prompt_lookup": ("prompt_lookup", {}),
    "small": ("speculative", {"draft": "small", "gamma": 3}),
    "middle": ("speculative", {"draft": "middle", "gamma": 4}),
    "int8": ("int8", {"gamma": 5}),
    "int4": ("int4", {"gamma": 6}),
}


def plan_for(names: str) -> bench.Plan:
    """The plan named on the command line."""
    if names == "default":
        return DEFAULT
    known = {m.name for m in methods()}
    wanted = sorted(known) if names == "all" else names.split(",")
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"unknown method {name!r}: give names from {sorted(known)}"
            )
    return {"autoregressive": ("autoregressive", {})} | {
        name: (name, {}) for name in wanted
    }


def transformers_peer(
    target: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    **extra: Any,
) -> tuple[Any, Callable[[list[int]], list[int]]]:
    """The same weights in transformers, and its plain decoding."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(
        target.folder, dtype=target.lm.dtype
    ).to(target.lm.device)
    peer.eval()
    return peer, _decoder(peer, max_new_tokens, temperature, **extra)


def _decoder(
    peer: Any, max_new_tokens: int, temperature: float, **extra: Any
) -> Callable[[list[int]], list[int]]:
    warm = {"do_sample": False}
    if temperature > 0:
        warm = {"do_sample": True, "temperature": temperature, "top_k": 0}

    def run(ids: list[int]) -> list[int]:
        x = torch.tensor([ids], device=peer.device)
        out = peer.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            **warm,
            **extra,
        )
        return out[0, len(ids) :].tolist()

    return run


def study_methods(args: Any, target: Any) -> dict[str, Any]:
    """Every method of the plan, over the evaluation prompts."""
    peers, peer = {}, None
    if not args.no_transformers:
        peer = "transformers"
        peers[peer] = transformers_peer(
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
    return {"rows": bench.rows(tallies, plan, peer)}


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
    own = timing.pass_costs(target.lm, SIZES)
    out = {
        "tokens": list(SIZES),
        "own_ms": [round(own[k].median * 1e3, 2) for k in SIZES],
        "own_q1_ms": [round(own[k].q1 * 1e3, 2) for k in SIZES],
        "own_q3_ms": [round(own[k].q3 * 1e3, 2) for k in SIZES],
    }
    if not args.no_transformers:
        peer = transformers_peer(target, 1)[0]
        theirs = peer_costs(peer, SIZES)
        out["transformers_ms"] = [
            round(theirs[k].median * 1e3, 2) for k in SIZES
        ]
    return out


def peer_costs(
    peer: Any, sizes: tuple[int, ...], past: int = 128
) -> dict[int, timing.Spread]:
    """As `timing.pass_costs`, for a transformers model and its own cache."""
    from transformers import DynamicCache

    ids = torch.arange(past + max(sizes), device=peer.device)[None] % 1000
    cache = DynamicCache()

    def run(k: int) -> Callable[[], None]:
        def step() -> None:
            out = peer(ids[:, past : past + k], past_key_values=cache)
            out.logits[0, -1, 0].item()
            cache.crop(-k)

        return step

    with torch.inference_mode():
        peer(ids[:, :past], past_key_values=cache)
        took = timing.interleave({str(k): run(k) for k in sizes}, 15)
    return {int(k): v for k, v in took.items()}


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
