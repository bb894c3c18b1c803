"""The command line: generate, bench, methods, train, models, export.

People get text and tables, programs get ``--json`` on standard output;
progress and errors go to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any


def parser() -> argparse.ArgumentParser:
    """The argument parser, one sub-command per thing people run."""
    top = argparse.ArgumentParser(
        prog="specref", description="Speculative decoding, exact and measured."
    )
    top.add_argument("--version", action="store_true", help="print and exit")
    sub = top.add_subparsers(dest="command", metavar="COMMAND")
    _generate_args(sub.add_parser("generate", help="decode a prompt"))
    _bench_args(sub.add_parser("bench", help="measure methods side by side"))
    listed = sub.add_parser("methods", help="list the methods")
    listed.add_argument("--json", action="store_true")
    models = sub.add_parser("models", help="list or fetch the real models")
    models.add_argument("--fetch", action="store_true", help="fetch now")
    models.add_argument("--json", action="store_true")
    train = sub.add_parser("train", help="distil a draft from the target")
    train.add_argument(
        "recipe",
        help="responses, features, small, middle, other, a head (eagle3), "
        "curve, score, acceptance, accuracy or report",
    )
    train.add_argument("--data", default="data/responses", help="responses")
    train.add_argument("--out", default="runs", help="where weights go")
    train.add_argument(
        "--tokens", type=int, default=400_000, help="response tokens at most"
    )
    train.add_argument("--shards", default="", help="numbers, to make these")
    train.add_argument("--drafts", default="small,middle", help="to score")
    train.add_argument("--json", action="store_true", help="for programs")
    train.add_argument("--steps", type=int, default=None)
    train.add_argument("--seed", type=int, default=0)
    _export_args(sub.add_parser("export", help="write a head for an engine"))
    return top


def _export_args(p: argparse.ArgumentParser) -> None:
    p.add_argument("--head", required=True, help="name, file or folder")
    p.add_argument("--to", required=True, help="folder to write")
    p.add_argument(
        "--layout", default=None, help="speculators, eagle, medusa, ..."
    )
    p.add_argument("--verifier", default=None, help="the target's hub name")
    p.add_argument("--draft-tokens", type=int, default=3)
    _model_args(p)


def _model_args(p: argparse.ArgumentParser) -> None:
    p.add_argument("--target", default="smollm2-135m", help="name or folder")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--json", action="store_true", help="for programs")


def _generate_args(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", help="text; - reads standard input")
    p.add_argument("--method", default="auto")
    p.add_argument("--gamma", type=int, default=None)
    p.add_argument("--top-k", type=int, default=None)
    p.add_argument("--top-p", type=float, default=None)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--stop", action="append", default=None)
    p.add_argument("--option", action="append", default=[], metavar="K=V")
    _model_args(p)


def _bench_args(p: argparse.ArgumentParser) -> None:
    p.add_argument("--methods", default="default", help="names or 'all'")
    p.add_argument("--prompts", type=int, default=20)
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--no-transformers", action="store_true")
    p.add_argument(
        "--study", default="methods", help="methods, costs, chain or heads"
    )
    p.add_argument("--draft", default="middle", help="of the chain study")
    p.add_argument("--runs", default="runs", help="of the heads study")
    p.add_argument("--out", default=None, help="also write JSON there")
    _model_args(p)


def _load(args: argparse.Namespace) -> Any:
    import torch

    from specref.lm.zoo import load

    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"dtype must be a torch dtype such as float32, got {args.dtype!r}"
        )
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but torch sees no GPU here")
    return load(args.target, device=args.device, dtype=dtype)


def _option(text: str) -> tuple[str, Any]:
    key, mark, value = text.partition("=")
    if not mark:
        raise ValueError(f"option must read name=value, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def generate(args: argparse.Namespace) -> None:
    """Print the text as it comes, then what it took."""
    from specref.api import finish, prepare

    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    job = prepare(
        _load(args),
        text,
        args.method,
        gamma=args.gamma,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        stop=args.stop,
        **dict(_option(o) for o in args.option),
    )
    show = None if args.json else _Printer(job.tokenizer)
    report = finish(job, show)[0]
    if args.json:
        print(json.dumps(_summary(report, job)))
        return
    print(report.text[show.shown :])  # what waited for the rest of it
    note = " (interrupted)" if report.interrupted else ""
    print(
        f"{len(report.tokens)} tokens, {len(report.rounds)} target calls, "
        f"tau {report.tau:.2f}, {report.tokens_per_s:.1f} tokens/s{note}",
        file=sys.stderr,
    )


class _Printer:
    """Prints text as soon as it can no longer change."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.tokens, self.shown = tokenizer, [], 0

    def __call__(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # half of a character: wait for the rest
            return
        print(text[self.shown :], end="", flush=True)
        self.shown = len(text)


def _summary(report: Any, job: Any) -> dict[str, Any]:
    return {
        "text": report.text,
        "tokens": report.tokens,
        "tau": report.tau,
        "target_calls": len(report.rounds),
        "seconds": report.seconds,
        "tokens_per_s": report.tokens_per_s,
        "acceptance_by_depth": report.acceptance_by_depth(),
        "interrupted": report.interrupted,
    }


def methods(args: argparse.Namespace) -> None:
    """The registry as a table."""
    from specref.registry import methods as every

    table = [m.row() for m in every()]
    if args.json:
        print(json.dumps(table, indent=1))
        return
    for row in table:
        law = "lossless" if row["lossless"] else "lossy"
        print(f"{row['name']:<22} {law:<9} {row['summary']}")
        weights = row["weights"] or "no trained weights"
        print(f"{'':<22} {row['paper']}; {row['chapter']}; {weights}")


def models(args: argparse.Namespace) -> None:
    """Known models and where they lie; ``--fetch`` fetches them."""
    from specref.lm import zoo

    if args.fetch:
        zoo.ensure()
    table = [
        {"name": name, "hub": hub, "ready": folder and str(folder)}
        for name, hub in zoo.NAMES.items()
        for folder in [zoo.ready(name)]
    ]
    if args.json:
        print(json.dumps(table, indent=1))
        return
    for row in table:
        where = row["ready"] or "not fetched: specref models --fetch"
        print(f"{row['name']:<16} {row['hub']}\n{'':<16} {where}")


def bench(args: argparse.Namespace) -> None:
    """Run a study of `specref.studies`."""
    from specref.studies import main

    if args.prompts < 1:
        raise ValueError(f"prompts must be at least 1, got {args.prompts}")
    main(args, _load(args))


def train(args: argparse.Namespace) -> None:
    """Run a recipe of `specref.train`."""
    from specref.train.run import main

    main(args)


def export(args: argparse.Namespace) -> None:
    """Write a head in a serving engine's layout."""
    from specref.interchange.command import main

    main(args, _load(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a bad argument ends in one sentence and status 2."""
    top = parser()
    args = top.parse_args(argv)
    if args.version:
        from specref import __version__

        print(f"specref {__version__}")
        return 0
    if args.command is None:
        top.print_help()
        return 2
    try:
        globals()[args.command](args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"specref: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("specref: interrupted", file=sys.stderr)
        return 130
    return 0
