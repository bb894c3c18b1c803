"""Counts forwards, and says what they should cost.

A `Metered` model notes how many tokens each forward takes.  A `CostCurve`,
measured beforehand, turns such counts into seconds: the prediction that
stands beside every measured speedup.

Does not handle: how a pass's cost grows with the context behind it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from specref.lm.base import LM, Output


class Metered:
    """A model that counts its forwards by their number of tokens.

    Everything else is the model's own.

    Attributes:
        passes: tokens per row -> number of forwards.
        seconds: spent in them (a GPU would have to be waited for).
    """

    def __init__(self, lm: LM) -> None:
        self.lm, self.passes, self.seconds = lm, Counter[int](), 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def forward(self, tokens: Any, *args: Any, **options: Any) -> Output:
        """See `LM.forward`."""
        self.passes[tokens.shape[1]] += 1
        start = time.perf_counter()
        out = self.lm.forward(tokens, *args, **options)
        self.seconds += time.perf_counter() - start
        return out


class MeteredHead:
    """A head that counts what its states do; see `Metered`.

    Attributes:
        begins: new pairs per row -> number of `State.begin`.
        extends: nodes per row -> number of `State.extend`.
        seconds: spent in both.
    """

    def __init__(self, head: Any) -> None:
        self.head, self.seconds = head, 0.0
        self.begins, self.extends = Counter[int](), Counter[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)

    def state(self, batch: int, capacity: int) -> MeteredState:
        """See `Head.state`."""
        return MeteredState(self, self.head.state(batch, capacity))


class MeteredState:
    """The state of a `MeteredHead`."""

    def __init__(self, meter: MeteredHead, state: Any) -> None:
        self.meter, self.inner = meter, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def begin(self, fresh: Sequence[Any]) -> Tensor:
        """See `State.begin`."""
        self.meter.begins[max(len(f.tokens) for f in fresh)] += 1
        return self._timed(self.inner.begin, fresh)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `State.extend`."""
        self.meter.extends[tokens.shape[1]] += 1
        return self._timed(self.inner.extend, tokens, parents)

    def _timed(self, step: Callable[..., Tensor], *given: Any) -> Tensor:
        start = time.perf_counter()
        out = step(*given)
        self.meter.seconds += time.perf_counter() - start
        return out


class CostCurve:
    """Seconds of a forward over n tokens, between and beyond measured n.

    Args:
        seconds: measured n -> seconds; at least two n.
    Raises:
        ValueError: fewer than two points.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        if len(seconds) < 2:
            raise ValueError(
                f"seconds must have at least two sizes, got {list(seconds)}"
            )
        self.sizes = np.array(sorted(seconds), dtype=float)
        self.seconds = np.array([seconds[int(n)] for n in self.sizes])

    def __call__(self, n: int) -> float:
        """Seconds for n tokens: linear between points, and with the last
        slope beyond the largest."""
        x, y = self.sizes, self.seconds
        if n <= x[-1]:
            return float(np.interp(n, x, y))
        slope = max((y[-1] - y[-2]) / (x[-1] - x[-2]), 0.0)
        return float(y[-1] + slope * (n - x[-1]))

    def total(self, passes: Mapping[int, int]) -> float:
        """Seconds of all counted passes."""
        return sum(count * self(n) for n, count in passes.items())
