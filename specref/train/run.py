"""``specref train``: responses, drafts and their scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from specref.heads.eagle3 import default_taps
from specref.lm import zoo
from specref.lm.drafts import resolve
from specref.train import report, score
from specref.train.data import load_corpus
from specref.train.distill import Trainer, finish
from specref.train.features import add_taps
from specref.train.head_recipes import HEAD_RECIPES
from specref.train.head_score import accuracies
from specref.train.heads import train_head
from specref.train.medusa2 import Medusa2Recipe, train_medusa2
from specref.train.other import Other, train_other
from specref.train.prompts import training_prompts
from specref.train.recipes import RECIPES
from specref.train.respond import respond

STEPS = (
    "responses",
    "features",
    *RECIPES,
    "other",
    *HEAD_RECIPES,
    "medusa2",
    "curve",
    "score",
    "acceptance",
    "accuracy",
    "report",
)


def main(args: Any) -> None:
    """Run one step.

    Raises:
        ValueError: an unknown step.
    """
    if args.recipe not in STEPS:
        raise ValueError(
            f"recipe must be one of {', '.join(STEPS)}, got {args.recipe!r}"
        )
    does = {
        "responses": responses,
        "features": features,
        **dict.fromkeys(HEAD_RECIPES, head),
        "medusa2": medusa2,
        "other": other,
        "curve": curve,
        "score": scores,
        "acceptance": accepted,
        "accuracy": accuracy,
        "report": reports,
    }
    does.get(args.recipe, draft)(args)


def responses(args: Any) -> None:
    """The target answers the training prompts."""
    loaded = zoo.load()
    prompts = [loaded.encode(p.prompt) for p in training_prompts(args.seed)]
    shards = args.shards and [int(x) for x in args.shards.split(",")]
    n = respond(
        loaded.lm,
        prompts,
        Path(args.data),
        max_tokens=args.tokens,
        shards=shards,
        seed=args.seed,
    )
    print(f"{n} response tokens in {args.data}")


def draft(args: Any) -> None:
    """A draft learns from the responses."""
    corpus = load_corpus(Path(args.data)).head(args.tokens)
    recipe = replace(RECIPES[args.recipe], seed=args.seed)
    target = zoo.load(pack=False).lm
    trainer = Trainer(recipe, target, corpus, Path(args.out) / recipe.name)
    trainer.run(args.steps)
    finish(trainer, Path(args.out))


def features(args: Any) -> None:
    """The target reads the responses again: features of more layers."""
    target = zoo.load(pack=False).lm
    last = target.config.num_hidden_layers - 1
    layers = sorted({*default_taps(last + 1), last})  # EAGLE-3's and GLIDE's
    add_taps(target, Path(args.data), layers)


def head(args: Any) -> None:
    """A head learns from the responses."""
    corpus = load_corpus(Path(args.data)).head(args.tokens)
    recipe = replace(HEAD_RECIPES[args.recipe], seed=args.seed)
    target = zoo.load(pack=False).lm
    train_head(recipe, target, corpus, Path(args.out), args.steps)


def medusa2(args: Any) -> None:
    """Backbone and heads learn together, from Medusa-1's heads."""
    corpus = load_corpus(Path(args.data)).head(args.tokens)
    recipe = replace(Medusa2Recipe(), seed=args.seed)
    target = zoo.load(pack=False).lm
    train_medusa2(recipe, target, corpus, Path(args.out), args.steps)


def accuracy(args: Any) -> None:
    """How often a head's b-th choice is right, by depth, as
    ``specref/data/head_accuracy.json`` holds it."""
    print(json.dumps(accuracies(zoo.load(), args.drafts.split(",")), indent=1))


def other(args: Any) -> None:
    """A draft with a tokenizer of its own, from all responses."""
    corpus, target = load_corpus(Path(args.data)), zoo.load(pack=False)
    recipe = replace(Other(), seed=args.seed)
    train_other(target, corpus, Path(args.out), recipe, args.steps)


def curve(args: Any) -> None:
    """The small recipe on more and more data."""
    corpus = load_corpus(Path(args.data))
    report.train_curve(zoo.load(pack=False).lm, corpus, Path(args.out))


def reports(args: Any) -> None:
    """All that the book says of the drafts, as JSON."""
    found = report.report(zoo.load(), Path(args.out), "specref train report")
    print(json.dumps(found, indent=1))


def accepted(args: Any) -> None:
    """Acceptance by rank, as ``specref/data/acceptance.json`` holds it."""
    names = args.drafts.split(",")
    table = report.acceptance_table(zoo.load(), names)
    print(json.dumps(table, indent=1))


def scores(args: Any) -> None:
    """Drafts are asked on the evaluation prompts."""
    loaded = zoo.load()
    names = args.drafts.split(",")
    drafts = {name: resolve(name, loaded.lm) for name in names}
    table = score.score(loaded, drafts)
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        score.show(table)
