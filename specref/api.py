"""`generate` and `stream`: the loop with names, text and defaults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from specref.decode import Request, Round, rounds
from specref.draws import Draws, Seeded
from specref.inputs import encode, stopper
from specref.lm.wrap import unwrap
from specref.registry import method as find
from specref.warp import Processor, Sampling, Warp

Prompt = str | Sequence[int] | torch.Tensor


@dataclass
class Report:
    """What `generate` returns for one prompt.

    Attributes:
        tokens: the new tokens (the prompt is not repeated); EOS included
            when it came.
        text: their text, where a tokenizer is known, else None.
        rounds: one `Round` per target call this row took part in.
        seconds: of the whole run, prefill included.
        row: this prompt's row in the rounds of a batch.
        interrupted: True when Ctrl-C ended the run early.
    """

    tokens: list[int]
    text: str | None
    rounds: list[Round] = field(repr=False)
    seconds: float
    row: int = 0
    interrupted: bool = False

    @property
    def tau(self) -> float:
        """Mean tokens per target call, bonus or correction included."""
        return len(self.tokens) / max(len(self.rounds), 1)

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / max(self.seconds, 1e-12)

    def acceptance_by_depth(self) -> list[float]:
        """P(node at depth i accepted | its round proposed that deep and
        accepted depth i - 1), for i = 1, 2, ...; the conditional beta."""
        tried: list[int] = []
        taken: list[int] = []
        for r in self.rounds:
            height, got = r.trees[self.row].height, r.accepted[self.row]
            while len(tried) < height:
                tried.append(0)
                taken.append(0)
            for depth in range(min(height, got + 1)):
                tried[depth] += 1
                taken[depth] += depth < got
        return [a / n if n else 0.0 for a, n in zip(taken, tried, strict=True)]


@dataclass
class Job:
    """A resolved call: models wrapped, prompts encoded, parts built."""

    target: Any
    drafter: Any
    rule: Any
    ask: Request
    tokenizer: Any
    single: bool

    def __iter__(self) -> Iterator[Round]:
        with torch.inference_mode():
            yield from rounds(self.target, self.drafter, self.rule, self.ask)


def prepare(
    target: Any,
    prompt: Prompt | Sequence[Prompt],
    method: str = "auto",
    *,
    gamma: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    eos: Sequence[int] | int | None = None,
    stop: str | Sequence[str] | Callable | None = None,
    processors: Sequence[Processor] = (),
    draws: Draws | None = None,
    chat: bool = True,
    **options: Any,
) -> Job:
    """Check every argument and build what the loop needs.

    Raises:
        ValueError, TypeError: one sentence naming the bad argument.
    """
    lm, tokenizer = unwrap(target)
    rows, single = encode(prompt, target, tokenizer, lm.vocab_size, chat)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(
            "max_new_tokens must be a whole number of at least 1, got "
            f"{max_new_tokens}"
        )
    limit = getattr(lm, "max_positions", None)
    longest = max(map(len, rows))
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {longest} tokens plus max_new_tokens "
            f"{max_new_tokens} exceeds the target's {limit} positions: "
            "shorten one of them"
        )
    if method == "auto":
        method = "speculative" if "draft" in options else default_method(lm)
    if gamma is not None:
        options["gamma"] = gamma
    found = find(method)
    if "tokenizer" in found.options:  # drafts of another tokenizer
        options.setdefault("tokenizer", tokenizer)
    drafter, rule = found.parts(lm, **options)
    source = draws if draws is not None else Seeded(seed)
    sampling = Sampling(Warp(temperature, top_k, top_p), tuple(processors))
    ends = lm_eos(lm) if eos is None else eos
    ask = Request(
        rows,
        [source.row(b) for b in range(len(rows))],
        max_new_tokens,
        sampling,
        frozenset([ends] if isinstance(ends, int) else ends),
        stopper(stop, tokenizer),
    )
    return Job(lm, drafter, rule, ask, tokenizer, single)


def stream(
    target: Any, prompt: Any, method: str = "auto", **options: Any
) -> Iterator[Round]:
    """Iterate over the `Round` records of a run as they happen.

    Arguments as for `generate`.  Bad arguments raise here, not at the
    first round.
    """
    return iter(prepare(target, prompt, method, **options))


def generate(
    target: Any,
    prompt: Prompt | Sequence[Prompt],
    method: str = "auto",
    **options: Any,
) -> Report | list[Report]:
    """Decode a prompt, or a batch of prompts, with any method.

    Args:
        target: what `specref.load` returns, an `LM`, or a transformers
            causal language model.
        prompt: text (needs a tokenizer), token ids, or a list of either.
        method: a name of `specref.methods()`; ``auto`` picks a lossless
            one that suits the target.
        gamma: draft length, at least 1.
        temperature, top_k, top_p: the sampling law; temperature 0 is
            greedy.
        max_new_tokens: exact limit.
        seed: of all randomness; row ``b`` of a batch uses stream ``b``.
        eos: token ids that end a row; default the target's own.
        stop: text or texts that end a row, or a function of its tokens.
        processors: logits processors, applied to target and draft.
        draws: a `Draws` instead of ``seed``.
        options: the method's own (``draft``, ``k``, ...).
    Returns:
        `Report` for one prompt, a list of them for a list of prompts.
    """
    job = prepare(target, prompt, method, **options)
    reports = finish(job)
    return reports[0] if job.single else reports


def finish(
    job: Job, show: Callable[[Sequence[int]], None] | None = None
) -> list[Report]:
    """Run a prepared job to its end, or to Ctrl-C, which loses nothing.

    Args:
        show: called with the first row's tokens of each round.
    """
    start = time.perf_counter()
    done: list[Round] = []
    interrupted = False
    try:
        for r in job:
            done.append(r)
            if show is not None:
                show(r.tokens[0])
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    return [
        _report(job, done, b, seconds, interrupted)
        for b in range(len(job.ask.prompts))
    ]


def _report(
    job: Job, done: list[Round], b: int, seconds: float, cut: bool
) -> Report:
    mine = [r for r in done if r.tokens[b]]
    tokens = [t for r in mine for t in r.tokens[b]]
    text = None
    if job.tokenizer is not None:
        text = job.tokenizer.decode(tokens, skip_special_tokens=True)
    return Report(tokens, text, mine, seconds, b, cut)


def lm_eos(lm: Any) -> tuple[int, ...]:
    """The token ids that end a text of this model, maybe none."""
    return tuple(getattr(lm, "eos", ()))


def default_method(lm: Any) -> str:
    """What ``auto`` means without a draft: on a CPU the target's own
    quantised copy, in the fewest bits that its layers allow."""
    from specref.lm.linear import Linear
    from specref.lm.llama import Llama

    if not isinstance(lm, Llama) or lm.device.type != "cpu":
        return "prompt_lookup"
    layers = [m for m in lm.modules() if isinstance(m, Linear)]
    return "int4" if all(m.fits_int4 for m in layers) else "int8"
