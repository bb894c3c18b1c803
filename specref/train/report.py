"""The drafts' report: scores, learning curve, logs, costs, as one JSON.

The learning curve trains one recipe for a fixed number of visits on more
and more unique responses; what it shows is the worth of data, not of time.

Does not handle: heads with features of the target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specref.draft.measure import acceptance
from specref.lm.drafts import (
    TRAINED,
    WEIGHTS,
    header,
    load_draft,
    quantized_copy,
    resolve,
)
from specref.lm.llama import Llama
from specref.timing import pass_costs, provenance
from specref.train.data import Corpus
from specref.train.distill import Trainer, finish
from specref.train.prompts import training_prompts
from specref.train.recipes import RECIPES
from specref.train.respond import Responder
from specref.train.score import agreement, everything, score

SIZES = (50_000, 100_000, 200_000, 400_000)
VISITS = 200_000


def train_curve(
    target: Llama,
    corpus: Corpus,
    out: Path,
    sizes: Sequence[int] = SIZES,
    visits: int = VISITS,
) -> None:
    """Train the small recipe on the first ``sizes`` response tokens."""
    for size in sizes:
        name = f"curve-{size}"
        if (out / f"draft-{name}.safetensors").exists():
            continue
        recipe = replace(RECIPES["small"], name=name, visits=visits)
        part = corpus.head(size)
        trainer = Trainer(recipe, target, part, out / name)
        trainer.run()
        finish(trainer, out)


def curve(loaded: Any, out: Path, corpus: Corpus) -> list[dict[str, Any]]:
    """Scores of the learning curve's drafts on the evaluation answers."""
    table = []
    for file in out.glob("draft-curve-*.safetensors"):
        about = header(file)["about"]
        found = agreement(load_draft(file, loaded.lm), loaded.lm, corpus)
        table.append(
            {
                "tokens": about["response_tokens"],
                "visits": about["recipe"]["visits"],
                "agree": round(found["agree"], 4),
                "alpha": round(found["alpha"], 4),
            }
        )
    return sorted(table, key=lambda row: row["tokens"])


def acceptance_table(
    loaded: Any, drafts: Sequence[str], prompts: int = 48, tokens: int = 64
) -> dict[str, dict[str, list[float]]]:
    """Acceptance by rank of each draft: `measure.shipped_acceptance`.

    Measured on the target's answers, at temperature 1, to the last prompts
    of the training pool, which no shipped draft has seen.
    """
    ids = [loaded.encode(p.prompt) for p in training_prompts()[-prompts:]]
    answers = Responder(
        loaded.lm, 48, tokens, max(map(len, ids)), temperatures=(1.0,)
    ).answer(ids)
    texts = [(r.prompt + r.tokens, len(r.prompt)) for r in answers]
    target = loaded.lm
    return {
        name: {"accept": acceptance(target, resolve(name, target), texts)}
        for name in drafts
    }


def logs(out: Path, every: int = 20) -> dict[str, list[list[float]]]:
    """``[step, loss, agree, alpha]`` of each shipped draft's training,
    means over ``every`` steps."""
    table = {}
    for name in TRAINED:
        file = out / name / "log.jsonl"
        rows = [json.loads(x) for x in file.read_text().splitlines()]
        table[name] = [
            [
                part[-1]["step"],
                *(
                    round(sum(r[key] for r in part) / len(part), 4)
                    for key in ("loss", "agree", "alpha")
                ),
            ]
            for part in (
                rows[i : i + every] for i in range(0, len(rows), every)
            )
        ]
    return table


def train_seconds(folder: Path) -> int:
    """Seconds that the steps of a run took, by its log."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return round(sum(json.loads(x)["seconds"] for x in lines))


def report(loaded: Any, out: Path, command: str) -> dict[str, Any]:
    """Everything that the book says of the drafts."""
    target = loaded.lm
    drafts = {n: resolve(n, target) for n in TRAINED}
    # Scored on whole texts, which should not go round the rounded weights.
    drafts |= {
        f"int{bits}": quantized_copy(target, bits, wide=False)
        for bits in (8, 4)
    }
    models = {"target": target, **drafts}
    about = {n: header(WEIGHTS / f"{f}.safetensors")["about"]
             for n, f in TRAINED.items()}
    return {
        "provenance": provenance(target, command),
        "recipes": {
            n: a["recipe"] | {"train_s": train_seconds(out / n)}
            for n, a in about.items()
        },
        "data": {n: a["response_tokens"] for n, a in about.items()},
        "scores": score(loaded, drafts),
        "curve": curve(loaded, out, everything(loaded)),
        "logs": logs(out),
        "step_ms": {
            name: round(pass_costs(lm, (1, 2))[1].median * 1e3, 2)
            for name, lm in models.items()
        },
    }
