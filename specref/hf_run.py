"""One call of transformers' ``generate``, from its rows to its result.

Does not handle: what `specref.hf_generate` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specref.decode import Request, Round
from specref.draws import Draws
from specref.tagged import Tagged
from specref.warp import Sampling, Warp


@dataclass
class Ask(Request):
    """A request whose rows end when the run's criteria say so."""

    run: Any = None

    def stopped(self, row: Sequence[int], new: Sequence[int]) -> bool:
        return self.run.step(row, new)


class Run:
    """One call of ``generate``: what it was given and what came of it.

    Args:
        lm: the target.
        padded: ``[B, n]`` ids as transformers has them.
        prompts: the rows without padding.
        config: the prepared generation config.
    Attributes:
        processors, criteria: as transformers prepared them.
        new: tokens of each row so far.
    """

    def __init__(
        self,
        lm: Any,
        padded: Tensor,
        prompts: list[list[int]],
        config: Any,
    ) -> None:
        self.target, self.padded = Tagged(lm), padded
        self.prompts, self.config = prompts, config
        self.processors: list[Any] = []
        self.criteria: Any = None
        batch = len(prompts)
        self.new: list[list[int]] = [[] for _ in range(batch)]
        self.ended = [False] * batch
        self.sent = 0  # columns that a streamer has
        self.kept: dict[str, list[list[Tensor]]] = {
            name: [[] for _ in range(batch)]
            for name in ("scores", "logits")
            if config.return_dict_in_generate
            and getattr(config, f"output_{name}")
        }
        self.pad = self._filler()

    def _filler(self) -> int:
        pad = getattr(self.config, "_pad_token_tensor", None)
        if pad is None and len(self.prompts) > 1:
            raise ValueError(
                "pad_token_id must be set for a batch: its rows can end at "
                "different lengths"
            )
        return 0 if pad is None else int(pad)

    def request(self, draws: Draws) -> Ask:
        """What the loop is asked for: rows with tags, exact limits."""
        ends = getattr(self.config, "_eos_token_tensor", None)
        eos = [] if ends is None else ends.reshape(-1).tolist()
        return Ask(
            [[b, *row] for b, row in enumerate(self.prompts)],
            [draws.row(b) for b in range(len(self.prompts))],
            self.config.max_length - self.padded.shape[1],
            self.sampling(self.process_tagged),
            frozenset(eos),
            run=self,
        )

    def sampling(self, process: Callable) -> Sampling:
        """The law: warpers are among the processors, so no warp of ours."""
        warp = Warp(1.0 if self.config.do_sample else 0.0)
        return Sampling(warp, (process,) if self.processors else ())

    def process_tagged(self, ids: Tensor, scores: Tensor) -> Tensor:
        """A processor for prefixes ``[1, m]`` that begin with a tag."""
        b = int(ids[0, 0])
        return self.process(b, ids[:, 1 + len(self.prompts[b]) :], scores)

    def process_untagged(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The same for a draft's prefixes: the longest prompt that fits.

        Only where one row's prompt and text repeat another row's longer
        prompt could it be the wrong row; proposals may come from any law,
        so the output would be exact still.
        """
        row = ids[0].tolist()
        fits = [
            b for b, p in enumerate(self.prompts) if row[: len(p)] == p
        ]
        b = max(fits, key=lambda b: len(self.prompts[b]))
        return self.process(b, ids[:, len(self.prompts[b]) :], scores)

    def process(self, b: int, new: Tensor, scores: Tensor) -> Tensor:
        """``[1, V]`` scores of row ``b`` after ``new`` ``[1, k]`` tokens.

        Processors may hold one entry per row of the batch: they get a
        whole batch in which every row is this one.
        """
        home, batch = self.padded.device, len(self.prompts)
        ids = torch.cat((self.padded[b : b + 1], new.to(home)), 1)
        ids, out = ids.repeat(batch, 1), scores.to(home).repeat(batch, 1)
        for process in self.processors:
            out = for_row(process, b)(ids, out)
        return out[b : b + 1].to(scores.device)

    def step(self, row: Sequence[int], new: Sequence[int]) -> bool:
        """Called after each token: keep its scores, ask the criteria."""
        b = row[0]
        before = len(row) - 1 - len(self.prompts[b])
        if self.kept:
            raw = self.target.logits_after(b, new[before:-1])[None].clone()
            self._keep("logits", b, raw)
            if "scores" in self.kept:
                past = torch.tensor([list(new[:-1])], dtype=torch.long)
                self._keep("scores", b, self.process(b, past, raw.clone()))
        tail = torch.tensor([list(new)], device=self.padded.device)
        ids = torch.cat((self.padded[b : b + 1], tail), 1)
        scores = self.kept.get("scores")
        seen = None if scores is None else tuple(scores[b])
        self.ended[b] = bool(self.criteria(ids, seen).any())
        return self.ended[b]

    def _keep(self, name: str, b: int, value: Tensor) -> None:
        if name in self.kept:
            self.kept[name][b].append(value)

    def take(self, one: Round, streamer: Any) -> None:
        """Learn a round's tokens and stream what is complete."""
        for row, tokens in zip(self.new, one.tokens, strict=True):
            row += tokens
        if streamer is None:
            return
        if len(self.new) == 1:
            streamer.put(torch.tensor(one.tokens[0]))
            return
        # A batch streams columns, as generate does, once all rows have one.
        going = [
            len(row)
            for row, end in zip(self.new, self.ended, strict=True)
            if not end
        ]
        ready = min(going) if going else max(map(len, self.new))
        for i in range(self.sent, ready):
            streamer.put(torch.tensor([self._at(b, i) for b in self._rows]))
        self.sent = max(self.sent, ready)

    @property
    def _rows(self) -> range:
        return range(len(self.new))

    def _at(self, b: int, i: int) -> int:
        return self.new[b][i] if i < len(self.new[b]) else self.pad

    def result(self) -> Any:
        """What ``generate`` returns."""
        width = max(map(len, self.new))
        new = [[self._at(b, i) for i in range(width)] for b in self._rows]
        tail = torch.tensor(new, device=self.padded.device)
        ids = torch.cat((self.padded, tail), 1)
        if not self.config.return_dict_in_generate:
            return ids
        from transformers.generation import GenerateDecoderOnlyOutput

        steps = {name: self._steps(name, width) for name in self.kept}
        return GenerateDecoderOnlyOutput(sequences=ids, **steps)

    def _steps(self, name: str, width: int) -> tuple[Tensor, ...]:
        rows = self.kept[name]
        none = torch.zeros_like(rows[0][0])
        return tuple(
            torch.cat([row[i] if i < len(row) else none for row in rows])
            for i in range(width)
        )


def for_row(process: Any, b: int) -> Any:
    """The processor as row ``b`` of the batch has it."""
    from transformers import PrefixConstrainedLogitsProcessor as Constrained

    if not isinstance(process, Constrained):
        return process
    # It calls a function of the row's number: every row must be this one.
    allowed, beams = process._prefix_allowed_tokens_fn, process._num_beams
    return Constrained(lambda _, ids: allowed(b // beams, ids), 1)
