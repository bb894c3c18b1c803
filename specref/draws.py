"""Draws: the only source of randomness in the library.

A method asks two questions and nothing else: ``bernoulli(prob)`` and
``categorical(prob)``.  Three implementations answer them: `Seeded` with
reproducible uniforms, `Enumerate` with every outcome in turn (the proof
engine of `specref.laws`), `Recorded` from a tape.

Does not handle: gradients, or draws from continuous laws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Draws(Protocol):
    """What a drafter, a rule or a loop may ask of chance."""

    def bernoulli(self, prob: Tensor) -> Tensor:
        """Independent coins.  ``prob`` of any shape -> bool, same shape."""

    def categorical(self, prob: Tensor) -> Tensor:
        """Independent categories.  ``prob`` ``[..., V]`` -> long ``[...]``.

        Rows need not be normalised exactly; they are divided by their sum.
        """

    def checkpoint(self, key: tuple) -> None:
        """Says that the future depends on the past through ``key`` only."""


def _check(prob: Tensor) -> Tensor:
    """Refuse what is not a set of laws: the last place to catch a NaN."""
    total = prob.sum(-1)
    if not bool(torch.isfinite(total).all()) or bool((prob < 0).any()):
        raise ValueError(
            "prob must be finite and not negative, got NaN, inf or a "
            "negative entry (NaN logits upstream?)"
        )
    if bool((total <= 0).any()):
        raise ValueError("prob must have a positive sum, got an all-zero row")
    return total


def _check_coins(prob: Tensor) -> None:
    # The slack is for ratios that rounding lifts above 1.
    if not bool(((prob >= 0.0) & (prob <= 1.0 + 1e-9)).all()):
        raise ValueError(
            f"prob must be in [0, 1], got {prob.tolist()} (NaN logits "
            "upstream?)"
        )


def inverse_cdf(prob: Tensor, uniform: Tensor) -> Tensor:
    """Category of each row by inversion, summed in float64.

    Args:
        prob: ``[..., V]``, not negative, rows with a positive sum.
        uniform: ``[...]`` in [0, 1).
    Returns:
        long ``[...]``; never an entry of probability zero.
    """
    cdf = prob.to(torch.float64).cumsum(-1)
    mark = uniform.to(cdf).unsqueeze(-1) * cdf[..., -1:]
    hit = torch.searchsorted(cdf, mark, right=True).squeeze(-1)
    # Rounding can put the mark at the total: fall back to the last entry
    # with mass, which is the first place where the sum is complete.
    last = (cdf < cdf[..., -1:]).sum(-1)
    return torch.minimum(hit, last)


class Seeded:
    """Uniforms from a counter (Philox), made on the CPU in float64.

    The same ``seed`` and ``stream`` give the same numbers on any device,
    instruction set and thread count.  Row ``b`` of a batch uses stream
    ``b``, so that it equals its solo run.

    Raises:
        ValueError: ``seed`` or ``stream`` outside [0, 2**64).
    """

    def __init__(self, seed: int = 0, stream: int = 0) -> None:
        if not (0 <= seed < 2**64 and 0 <= stream < 2**64):
            raise ValueError(
                "seed and stream must be at least 0 and below 2**64, got "
                f"{seed}, {stream}"
            )
        self.seed, self.stream = seed, stream
        key = np.array([seed, stream], dtype=np.uint64)
        self._bits = np.random.Philox(key=key)

    def row(self, index: int) -> Seeded:
        """The draws of batch row ``index``: same seed, its own stream."""
        return self if index == 0 else Seeded(self.seed, self.stream + index)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """float64 in [0, 1), on the CPU."""
        raw = self._bits.random_raw(int(np.prod(shape, dtype=np.int64)))
        # The top 53 bits: every double in [0, 1) of that spacing, exactly.
        value = (np.asarray(raw) >> np.uint64(11)) * 2.0**-53
        return torch.from_numpy(value.reshape(tuple(shape)))

    def bernoulli(self, prob: Tensor) -> Tensor:
        _check_coins(prob)
        return self.uniform(prob.shape).to(prob.device) < prob

    def categorical(self, prob: Tensor) -> Tensor:
        _check(prob)
        mark = self.uniform(prob.shape[:-1]).to(prob.device)
        return inverse_cdf(prob, mark)

    def checkpoint(self, key: tuple) -> None:
        pass


class Recorded:
    """Replays a tape of outcomes, in the order in which they were drawn.

    Args:
        tape: one int per scalar draw (coins are 0 or 1).
    Raises:
        ValueError: when the tape ends early or names an impossible outcome.
    """

    def __init__(self, tape: Sequence[int]) -> None:
        self.tape, self.at = list(tape), 0

    def row(self, index: int) -> Recorded:
        return self

    def _next(self, law: Sequence[float]) -> int:
        if self.at >= len(self.tape):
            raise ValueError(
                f"tape has {len(self.tape)} outcomes, the run asks for more"
            )
        value = self.tape[self.at]
        self.at += 1
        if not 0 <= value < len(law) or law[value] <= 0.0:
            raise ValueError(
                f"tape outcome {self.at - 1} is {value}, which has "
                "probability zero in this run"
            )
        return value

    def bernoulli(self, prob: Tensor) -> Tensor:
        _check_coins(prob)
        flat = prob.reshape(-1).tolist()
        hits = [self._next((1.0 - x, x)) == 1 for x in flat]
        return torch.tensor(hits, device=prob.device).reshape(prob.shape)

    def categorical(self, prob: Tensor) -> Tensor:
        _check(prob)
        rows = prob.reshape(-1, prob.shape[-1]).tolist()
        picks = [self._next(row) for row in rows]
        out = torch.tensor(picks, dtype=torch.long, device=prob.device)
        return out.reshape(prob.shape[:-1])

    def checkpoint(self, key: tuple) -> None:
        pass


class Recorder:
    """Wraps other draws and keeps the tape that `Recorded` replays.

    The rows of a batch write to one tape, in the order of their draws.
    """

    def __init__(self, inner: Draws, tape: list[int] | None = None) -> None:
        self.inner = inner
        self.tape: list[int] = [] if tape is None else tape

    def row(self, index: int) -> Recorder:
        return Recorder(self.inner.row(index), self.tape)

    def bernoulli(self, prob: Tensor) -> Tensor:
        out = self.inner.bernoulli(prob)
        self.tape += [int(x) for x in out.reshape(-1)]
        return out

    def categorical(self, prob: Tensor) -> Tensor:
        out = self.inner.categorical(prob)
        self.tape += out.reshape(-1).tolist()
        return out

    def checkpoint(self, key: tuple) -> None:
        self.inner.checkpoint(key)


class Boundary(Exception):
    """Raised by `Enumerate` to stop a run at a checkpoint (see laws)."""

    def __init__(self, key: tuple) -> None:
        self.key = key


class Enumerate:
    """One branch of a run: replays ``prefix``, then takes first outcomes.

    `specref.laws.law` drives it.  After a run, ``taken[i]`` is the outcome
    of draw ``i``, ``probs[i]`` its probability and ``open[i]`` the later
    outcomes still to visit.  Outcomes of probability zero are no branches.

    Args:
        prefix: outcomes to replay, one per scalar draw with a choice.
        max_draws: refuse a run that asks for more (it may never end).
        skip: checkpoints to pass before stopping at the next one; None
            never stops.
    """

    def __init__(
        self,
        prefix: Sequence[int] = (),
        max_draws: int = 10_000,
        skip: int | None = None,
    ) -> None:
        self.prefix, self.max_draws, self.skip = list(prefix), max_draws, skip
        self.taken: list[int] = []
        self.probs: list[float] = []
        self.open: list[list[int]] = []

    def row(self, index: int) -> Enumerate:
        return self

    def _choose(self, law: list[float]) -> int:
        total = sum(law)
        options = [i for i, x in enumerate(law) if x > 0.0]
        if not 0.0 < total < math.inf or min(law) < 0.0:
            _check(torch.tensor(law))
        at = len(self.taken)
        if at >= self.max_draws:
            raise RuntimeError(
                f"run asked for more than {self.max_draws} draws: a law by "
                "enumeration needs a run that ends in every branch; bound "
                "it (max_new_tokens) or raise max_draws"
            )
        pick = self.prefix[at] if at < len(self.prefix) else options[0]
        if pick not in options:
            raise RuntimeError(
                f"draw {at} cannot be {pick} in this replay: run must be "
                "deterministic given its draws (state left over from an "
                "earlier run?)"
            )
        self.taken.append(pick)
        self.open.append([i for i in options if i > pick])
        self.probs.append(law[pick] / total)
        return pick

    def bernoulli(self, prob: Tensor) -> Tensor:
        _check_coins(prob)
        flat = prob.reshape(-1).tolist()
        hits = [self._choose([max(1.0 - x, 0.0), x]) == 1 for x in flat]
        return torch.tensor(hits, device=prob.device).reshape(prob.shape)

    def categorical(self, prob: Tensor) -> Tensor:
        rows = prob.reshape(-1, prob.shape[-1]).tolist()
        picks = [self._choose(row) for row in rows]
        out = torch.tensor(picks, dtype=torch.long, device=prob.device)
        return out.reshape(prob.shape[:-1])

    def checkpoint(self, key: tuple) -> None:
        if self.skip is None:
            return
        if self.skip == 0:
            raise Boundary(key)
        self.skip -= 1
