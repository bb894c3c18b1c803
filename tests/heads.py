"""Tiny heads on a tiny target, and what must hold for every one of them.

A new kind of head is proved by calling these: what it says in the loop is
what it says when it is trained (`follows_rollout`), and the law of the loop
is the target's (`off`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from cases import Case, Memo, truth

from specref.decode import Request, rounds
from specref.draft.dynamic import Dynamic
from specref.draft.grow import Static
from specref.draft.head import HeadDrafter
from specref.draws import Draws, Seeded
from specref.heads.base import Head, Pairs, Text
from specref.laws import law, total_variation
from specref.lm.llama import Llama
from specref.tree import DETERMINISTIC, IID, WITHOUT_REPLACEMENT
from specref.warp import Sampling, Warp

V = 3
SMALL = {"vocab_size": V, "num_hidden_layers": 2, "hidden_size": 16}
CHAIN, BUSHY = (-1, 0, 1), (-1, -1, 0, 0, 1)
POLICIES = {
    "chain-iid": lambda: Static(CHAIN, IID),
    "chain-topk": lambda: Static(CHAIN, DETERMINISTIC),
    "bushy-without_replacement": lambda: Static(BUSHY, WITHOUT_REPLACEMENT),
    "bushy-iid": lambda: Static((-1, -1, 0), IID),
    "bushy-topk": lambda: Static(BUSHY, DETERMINISTIC),
    "dynamic": lambda: Dynamic(nodes=5, depth=3, width=2),
}
SAMPLINGS = {
    "T=0": Sampling(Warp(0.0)),
    "T=0.7": Sampling(Warp(0.7)),
    "T=1": Sampling(),
    "top-p": Sampling(Warp(1.0, top_p=0.8)),
}


def target(**sizes: Any) -> Llama:
    """A tiny float64 target whose laws are far from even."""
    return tiny.llama(seed=1, **{**SMALL, **sizes})


def randomised(head: Head, seed: int = 3) -> Head:
    """Random weights for everything that is the head's own."""
    source = torch.Generator().manual_seed(seed)
    head.double().requires_grad_(False).eval()
    for weight in head.trained().values():
        noise = torch.randn(
            weight.shape, generator=source, dtype=torch.float64
        )
        if weight.dim() == 1:
            weight.add_(noise, alpha=0.2)
        else:
            weight.copy_(0.3 * noise)
    return head


def features(lm: Llama, tokens: torch.Tensor, taps: Any = ()) -> Text:
    """``tokens`` ``[B, n + 1]`` with the target's features."""
    with torch.inference_mode():
        out = lm.forward(tokens[:, :-1], taps=taps, logits=False)
    return Text(tokens, out.hidden, out.taps)


def pairs(text: Text, row: int, count: int) -> Pairs:
    """The first ``count`` pairs of a row."""
    return Pairs(
        text.hidden[row, :count],
        tuple(t[row, :count] for t in text.taps),
        tuple(text.tokens[row, 1 : count + 1].tolist()),
    )


@torch.inference_mode()
def rollout_gap(head: Head, lm: Llama, sizes: Any = (6, 4)) -> float:
    """Largest difference of logits between `Head.rollout` and the state in
    the loop, over depths and over rows with different numbers of pairs,
    fed in two portions with guesses in between."""
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, lm.vocab_size, (2, 12), generator=source)
    text = features(lm, tokens, head.taps)
    depth = head.levels or 3
    roll = head.rollout(text, depth)
    state = head.state(2, 40)
    first = [n - 3 for n in sizes]
    state.begin([pairs(text, b, n) for b, n in enumerate(first)])
    state.extend(torch.tensor([[0], [1]]), torch.tensor([[-1], [-1]]))
    rest = []
    for b, n in enumerate(sizes):
        a, z = pairs(text, b, n), first[b]
        taps = tuple(t[z:] for t in a.taps)
        rest.append(Pairs(a.hidden[z:], taps, a.tokens[z:]))
    said = [state.begin(rest)]
    for s in range(1, depth):
        new = torch.tensor([[int(tokens[b, n + s])] for b, n in
                            enumerate(sizes)])
        # A wrong sibling stands beside every node: nobody may see it.
        wide = torch.cat((new, (new + 1) % lm.vocab_size), 1)
        up = -1 if s == 1 else 2 * (s - 2)
        out = state.extend(wide, torch.full((2, 2), up))
        said.append(out[:, 0])
    gap = 0.0
    for s, (mine, theirs) in enumerate(zip(said, roll, strict=True)):
        for b, n in enumerate(sizes):
            want = head.logits(theirs[b, n - 1], s)
            have = torch.isfinite(want)
            gap = max(gap, float((mine[b] - want)[have].abs().max()))
    return gap


def head_law(
    lm: Llama,
    head: Head,
    policy: Callable,
    rule: Any,
    sampling: Sampling,
    new: int = 4,
    prompt: tuple[int, ...] = (1, 0),
    eos: frozenset[int] = frozenset(),
):
    """Law of the production loop, the head's own caches and all."""

    def run(draws: Draws) -> list[int]:
        ask = Request([prompt], [draws], new, sampling, eos)
        with torch.inference_mode():
            loop = rounds(lm, HeadDrafter(head, policy()), rule, ask)
            return [t for r in loop for t in r.tokens[0]]

    return law(run, merge=True)


def off(
    lm: Llama,
    head: Head,
    policy: Callable,
    rule: Any,
    sampling: Sampling,
    new: int = 4,
    eos: frozenset[int] = frozenset(),
) -> float:
    """Total variation between the loop's law and the target's own."""
    got = head_law(lm, head, policy, rule, sampling, new, eos=eos)
    case = Case(
        "head", Memo(lm).probs, Memo(lm).probs, lm.vocab_size, new=new,
        eos=eos, sampling=sampling,
    )
    return total_variation(got, truth(case))


def greedy_rows(
    lm: Llama, head: Head, policy: Callable, rule: Any, prompts: Any, new: int
) -> list[list[int]]:
    """Tokens of a greedy batch."""
    draws = [Seeded(0).row(b) for b in range(len(prompts))]
    ask = Request(prompts, draws, new, Sampling(Warp(0.0)))
    rows: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        for r in rounds(lm, HeadDrafter(head, policy()), rule, ask):
            for b, tokens in enumerate(r.tokens):
                rows[b] += tokens
    return rows
