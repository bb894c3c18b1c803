"""The study of the heads: everything that the book says of them, as JSON.

Acceptance by depth, calibration, training logs, the worth of data, tokens
per call against tree size, and what a head's steps cost.

Does not handle: training (`specref.train.heads`), speed (the methods
study).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specref.api import generate
from specref.heads import files
from specref.heads.base import Head
from specref.lm.drafts import WEIGHTS
from specref.prompts import eval_prompts
from specref.timing import head_costs
from specref.train.data import Corpus
from specref.train.head_score import by_depth, calibration
from specref.train.report import train_seconds
from specref.train.score import eval_corpus

HEADS = (
    "medusa", "hydra", "hydra_pp", "eagle", "hass", "mtp", "glide", "eagle3",
)
NODES = (4, 6, 8, 12, 16, 24, 32)
DYNAMIC = ("eagle2", "hass", "eagle3")
GROWN = ("medusa", "hydra", "eagle", *DYNAMIC)


def study(args: Any, target: Any) -> dict[str, Any]:
    """Everything; see the module.

    Args:
        args: of ``specref bench``; ``runs`` is the folder of the training
            runs, whose logs are read.
    """
    runs, lm = Path(args.runs), target.lm
    names = [n for n in HEADS if (WEIGHTS / f"head-{n}.safetensors").exists()]
    heads = {n: files.resolve_head(n, lm) for n in names}
    kinds = eval_corpus(target)
    whole = Corpus([row for part in kinds.values() for row in part.rows])
    return {
        "recipes": {n: about(n, runs, heads[n]) for n in names},
        "by_depth": by_depth(lm, heads, whole),
        "by_kind": kinds_of(lm, heads, kinds),
        "logs": {n: log_means(runs / n) for n in names},
        "data": data_curves(lm, runs, whole),
        "calibration": {n: calibration(lm, heads[n], whole) for n in names},
        "tau": tree_sizes(target, args.prompts, args.max_new_tokens),
        "step_ms": {n: step_ms(head) for n, head in heads.items()},
    }


def about(name: str, runs: Path, head: Head) -> dict[str, Any]:
    """The recipe, what it was trained on, and how long."""
    found = files.read(WEIGHTS / f"head-{name}.safetensors")[0]["about"]
    return found["recipe"] | {
        "steps": found["steps"],
        "response_tokens": found["response_tokens"],
        "parameters": sum(w.numel() for w in head.trained().values()),
        "train_s": train_seconds(runs / name),
    }


def kinds_of(
    lm: Any, heads: dict[str, Head], kinds: dict[str, Corpus]
) -> dict[str, dict[str, Any]]:
    """`by_depth` for each kind of prompt."""
    found = {kind: by_depth(lm, heads, c, 3) for kind, c in kinds.items()}
    return {
        name: {kind: table[name] for kind, table in found.items()}
        for name in heads
    }


def log_means(folder: Path, every: int = 20) -> list[list[float]]:
    """``[step, loss, agree, alpha, agree at the deepest]``, means over
    ``every`` steps."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    out = []
    for at in range(0, len(rows), every):
        part = rows[at : at + every]
        columns = [
            [r["loss"] for r in part],
            [r["agree"][0] for r in part],
            [r["alpha"][0] for r in part],
            [r["agree"][-1] for r in part],
        ]
        means = [round(sum(c) / len(c), 4) for c in columns]
        out.append([part[-1]["step"], *means])
    return out


def data_curves(
    lm: Any, runs: Path, corpus: Corpus
) -> dict[str, list[list[float]]]:
    """Acceptance of heads trained alike on more and more responses."""
    out: dict[str, list[list[float]]] = {}
    for file in sorted(runs.glob("head-*-*k.safetensors")):
        kind = file.stem.split("-")[1]
        tokens = files.read(file)[0]["about"]["response_tokens"]
        found = by_depth(lm, {kind: files.load_head(file, lm)}, corpus, 3)
        row = found[kind]
        out.setdefault(kind, []).append(
            [tokens, row["agree"][0], row["alpha"][0], *row["agree"][1:3]]
        )
    return {kind: sorted(rows) for kind, rows in out.items()}


def tree_sizes(
    target: Any, prompts: int, tokens: int, sizes: Sequence[int] = NODES
) -> dict[str, list[list[float]]]:
    """``[nodes, tau]`` of greedy runs of the loop."""
    ids = [target.encode(p.prompt) for p in eval_prompts()[:prompts]]
    out: dict[str, list[list[float]]] = {}
    for name in GROWN:
        for nodes in sizes:
            options: dict[str, Any] = {"nodes": nodes}
            if name in DYNAMIC:
                options |= {"depth": 6, "width": 4 if nodes < 16 else 6}
            done = [
                generate(
                    target, row, name, max_new_tokens=tokens, **options
                )
                for row in ids
            ]
            made = sum(len(r.tokens) for r in done)
            calls = sum(len(r.rounds) for r in done)
            out.setdefault(name, []).append([nodes, round(made / calls, 4)])
    return out


def step_ms(head: Head) -> dict[str, list[list[float]]]:
    """Milliseconds of a head's two steps, by pairs and by nodes."""
    took = head_costs(head, (1, 2, 4, 8, 16, 32), repeats=9)
    return {
        name: [[k, round(s.median * 1e3, 3)] for k, s in rows.items()]
        for name, rows in took.items()
    }
