"""Training data: the target's own responses, with its features.

The feature of a position is the hidden state that the output head reads
there, so one stored vector gives back the whole law, and a head that
predicts features has its inputs and its labels.

Prompts are answered in batches; rows that end make room for new ones, so
that the matrix products stay wide.  Shards are written whole and skipped
when they exist: an interrupted run goes on where it stopped.

A step makes some 50 MB of short-lived tensors.  With glibc, two variables
keep it from giving their pages back each time, which doubles the speed:
``MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184``.

Does not handle: several devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from specref.draws import Seeded, inverse_cdf
from specref.lm.llama import Llama

TEMPERATURES = (0.0, 0.7, 1.0)


@dataclass
class Response:
    """One answered prompt.

    Attributes:
        prompt: token ids, chat format included.
        tokens: the response, ``n`` ids, EOS included when it came.
        hidden: pieces of ``[m + n - 1, d]`` float16: the target's features
            at every position of prompt (``m`` tokens) and response but the
            last, each of which predicts the token after it.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    number: int = 0
    temperature: float = 1.0


class Responder:
    """Answers prompts in one wide batch that is refilled as rows end.

    Args:
        width: rows of the batch.
        max_new: longest response, in tokens.
        seed: of the responses; prompt ``i`` has stream ``i``, so that a
            response does not depend on its neighbours' number.
        temperatures: prompt ``i`` is answered at the ``i``-th, in turns.
    """

    def __init__(
        self,
        lm: Llama,
        width: int = 64,
        max_new: int = 160,
        max_prompt: int = 400,
        seed: int = 0,
        temperatures: Sequence[float] = TEMPERATURES,
    ) -> None:
        self.lm, self.width, self.max_new = lm, width, max_new
        self.max_prompt, self.seed = max_prompt, seed
        self.temperatures = tuple(temperatures)
        self.rows: list[Response] = []
        self.draws: list[Seeded] = []
        self.cache = lm.new_cache(width, max_prompt + max_new)
        self.store = self.cache.k, self.cache.v  # the cache's are views

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[list[int]], first: int = 0
    ) -> Iterator[Response]:
        """Yields responses as they end; prompt ``i`` is ``first + i``.

        Prompts longer than ``max_prompt`` have none.
        """
        todo = [
            Response(
                list(p),
                number=first + i,
                temperature=self.temperatures[
                    (first + i) % len(self.temperatures)
                ],
            )
            for i, p in enumerate(prompts)
            if 1 <= len(p) <= self.max_prompt
        ]
        todo.sort(key=lambda r: -len(r.prompt))  # similar lengths together
        while todo or self.rows:
            if todo and len(self.rows) <= self.width * 3 // 4:
                room = self.width - len(self.rows)
                self._admit([todo.pop() for _ in range(min(len(todo), room))])
            self._step()
            yield from self._retire()

    def _admit(self, new: list[Response]) -> None:
        """Prefill new rows and put them under the running ones."""
        body = [r.prompt[:-1] for r in new]
        n = max(max(map(len, body)), 1)
        cache = self.lm.new_cache(len(new), n)
        tokens = torch.tensor([b + [0] * (n - len(b)) for b in body])
        hidden = self.lm.forward(tokens, cache, logits=False).hidden.half()
        for r, b, h in zip(new, body, hidden, strict=True):
            r.hidden.append(h[: len(b)].clone())
        at = len(self.rows)
        for mine, theirs in zip(self.store, (cache.k, cache.v), strict=True):
            mine[:, at : at + len(new), :, :n] = theirs
        self.cache.length[at:] = [len(b) for b in body]
        self.rows += new
        self.draws += [Seeded(self.seed, r.number) for r in new]
        self._view()

    def _view(self) -> None:
        """Let the cache see the rows that run."""
        rows = len(self.rows)
        self.cache.k, self.cache.v = (x[:, :rows] for x in self.store)
        del self.cache.length[rows:]

    def _step(self) -> None:
        """One token for every row."""
        last = [[(r.tokens or r.prompt)[-1]] for r in self.rows]
        out = self.lm.forward(torch.tensor(last), self.cache)
        self.cache.keep()
        logits, hidden = out.logits[:, -1].float(), out.hidden.half()
        heat = torch.tensor([r.temperature for r in self.rows])
        law = (logits / heat.clamp(min=0.1)[:, None]).softmax(-1)
        mark = torch.stack([d.uniform(()) for d in self.draws])
        pick = torch.where(heat > 0, inverse_cdf(law, mark), logits.argmax(-1))
        for r, t, h in zip(self.rows, pick.tolist(), hidden, strict=True):
            r.tokens.append(t)
            r.hidden.append(h)

    def _retire(self) -> list[Response]:
        """Take ended rows out; the last row moves into each one's place."""
        out = []
        for i in reversed(range(len(self.rows))):
            row = self.rows[i]
            if row.tokens[-1] not in self.lm.eos and (
                len(row.tokens) < self.max_new
            ):
                continue
            out.append(row)
            last, length = len(self.rows) - 1, self.cache.length
            for store in self.store:
                kept = store[:, last, :, : length[last]]
                store[:, i, :, : length[last]] = kept
            for column in (self.rows, self.draws, length):
                column[i] = column[last]
                column.pop()
        if out:
            self._view()
        return out


def save_shard(file: Path, responses: Sequence[Response]) -> None:
    """Write responses as one safetensors file, complete or not at all."""
    from safetensors.torch import save_file

    def flat(parts: list[list[int]]) -> Tensor:
        return torch.tensor([x for p in parts for x in p], dtype=torch.int32)

    tensors = {
        "prompt": flat([r.prompt for r in responses]),
        "prompt_len": flat([[len(r.prompt)] for r in responses]),
        "tokens": flat([r.tokens for r in responses]),
        "length": flat([[len(r.tokens)] for r in responses]),
        "number": flat([[r.number] for r in responses]),
        "hidden": torch.cat([h for r in responses for h in r.hidden]),
    }
    part = file.with_suffix(".part")
    save_file(tensors, part)
    part.rename(file)


def respond(
    lm: Llama,
    prompts: Sequence[list[int]],
    folder: Path,
    *,
    max_tokens: int,
    per_shard: int = 384,
    shards: Sequence[int] | None = None,
    **options: Any,
) -> int:
    """Answer prompts into shards until ``max_tokens``; returns the count.

    Args:
        prompts: token ids, in a fixed order.
        folder: where ``responses-00000.safetensors`` and on are put; the
            number is that of the first prompt.
        per_shard: prompts of a shard.
        shards: which shards to make, in this order; None is all.
        options: of `Responder`.
    Raises:
        ValueError: a shard beyond the prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    most = -(-len(prompts) // per_shard)
    total = 0
    bar = tqdm(total=max_tokens, unit="tok", disable=None)
    for number in range(most) if shards is None else shards:
        if total >= max_tokens:
            break
        if not 0 <= number < most:
            raise ValueError(f"shards must be in [0, {most}), got {number}")
        start = number * per_shard
        file = folder / f"responses-{start:05d}.safetensors"
        if file.exists():
            n = _count(file)
        else:
            group = prompts[start : start + per_shard]
            done = list(Responder(lm, **options).answer(group, start))
            n = sum(len(r.tokens) for r in done)
            if done:
                save_shard(file, sorted(done, key=lambda r: r.number))
        bar.update(n)
        total += n
    return total


def _count(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return int(f.get_tensor("length").sum())
