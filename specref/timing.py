"""Timing: medians with their spread, pass costs, where and when.

Things compared are run in turns, so that a slow minute hits all alike.

Does not handle: several devices.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from specref.heads.base import Pairs
from specref.meter import CostCurve, Metered, MeteredHead

WILD = 0.5  # refuse when (q3 - q1) / median of the baseline exceeds this


@dataclass
class Spread:
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values; a single one has none."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        q1, q2, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(q2, q1, q3)

    @property
    def wild(self) -> bool:
        return (self.q3 - self.q1) / self.median > WILD

    def json(self) -> dict[str, float]:
        return {k: round(v, 4) for k, v in vars(self).items()}


def provenance(lm: Any, command: str) -> dict[str, Any]:
    """Where, when and how figures were measured."""
    cuda = lm.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "dtype": str(getattr(lm, "dtype", "float32")).removeprefix("torch."),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def _cpu_name() -> str:
    cores = os.cpu_count()
    try:
        with open("/proc/cpuinfo") as f:
            names = [x for x in f if x.startswith("model name")]
        return f"{names[0].split(':')[1].strip()}, {cores} cores"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {cores} cores"


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its wall time, in seconds."""
    start = time.perf_counter()
    out = run()
    return out, time.perf_counter() - start


def interleave(
    runs: dict[Any, Callable[[], Any]], repeats: int, warm: int = 2
) -> dict[Any, Spread]:
    """Seconds of each run, taken in turns."""
    took: dict[Any, list[float]] = {name: [] for name in runs}
    for i in range(repeats + warm):
        for name, run in runs.items():
            _, seconds = timed(run)
            if i >= warm:
                took[name].append(seconds)
    return {name: Spread.of(values) for name, values in took.items()}


def pass_steps(
    lm: Any, sizes: Sequence[int], past: int = 128
) -> dict[int, Callable[[], Any]]:
    """For each k, a function that runs one forward over k new tokens past
    ``past`` others and forgets them again."""
    cache = lm.new_cache(1, past + max(sizes) + 1)
    ids = torch.arange(past + max(sizes)) % min(lm.vocab_size, 1000)
    ids = ids.to(lm.device)[None]

    def step(k: int) -> None:
        out = lm.forward(ids[:, past : past + k], cache)
        cache.keep([[]])
        out.logits[0, -1, 0].item()  # waits for a GPU

    with torch.inference_mode():
        lm.forward(ids[:, :past], cache, logits=False)
        cache.keep()
    return {k: partial(step, k) for k in sizes}


def pass_costs(
    lm: Any, sizes: Sequence[int], past: int = 128, repeats: int = 15
) -> dict[int, Spread]:
    """Seconds of one forward over k new tokens, past ``past`` others."""
    steps = pass_steps(lm, sizes, past)
    with torch.inference_mode():
        return interleave(steps, repeats)


def head_costs(
    head: Any, sizes: Sequence[int], past: int = 128, repeats: int = 15
) -> dict[str, dict[int, Spread]]:
    """Seconds of ``begin`` with k new pairs and of ``extend`` by k nodes,
    past ``past`` pairs, in a state of one row."""
    took: dict[str, dict[int, list[float]]] = {
        name: {k: [] for k in sizes} for name in ("begin", "extend")
    }
    with torch.inference_mode():
        room = past + (repeats + 3) * (max(sizes) + 1) * 2
        state = head.state(1, room)
        state.begin([_pairs(head, past)])
        for i in range(repeats + 2):
            for k in sizes:
                if i % 4 == 0:  # stay near the asked past
                    state = head.state(1, room)
                    state.begin([_pairs(head, past)])
                _, begun = timed(partial(state.begin, [_pairs(head, k)]))
                ids = torch.zeros(1, k, dtype=torch.long)
                grow = partial(state.extend, ids, torch.full((1, k), -1))
                _, grown = timed(grow)
                if i > 1:
                    took["begin"][k].append(begun)
                    took["extend"][k].append(grown)
    return {
        name: {k: Spread.of(v) for k, v in rows.items()}
        for name, rows in took.items()
    }


def _pairs(head: Any, count: int) -> Pairs:
    """Pairs of the right shapes."""
    wide = torch.ones(count, head.width, device=head.device, dtype=head.dtype)
    return Pairs(wide, (wide,) * len(head.taps), (1,) * count)


class Curves:
    """Cost curves of every model that a plan runs, measured once.

    Args:
        sizes: tokens per measured pass.
        past: committed tokens behind each measured pass.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (1, 2, 3, 5, 9, 17, 33, 65),
        past: int = 96,
        repeats: int = 9,
    ) -> None:
        self.sizes, self.past, self.repeats = sizes, past, repeats
        self.known: dict[int, tuple[Any, Any]] = {}

    def of(self, lm: Any) -> CostCurve:
        """The curve of a model; measures it on first sight."""
        if id(lm) not in self.known:
            took = pass_costs(lm, self.sizes, self.past, self.repeats)
            curve = CostCurve({n: s.median for n, s in took.items()})
            self.known[id(lm)] = lm, curve  # holding lm keeps its id taken
        return self.known[id(lm)][1]

    def of_head(self, head: Any) -> dict[str, CostCurve]:
        """The curves of a head's two steps, see `head_costs`."""
        if id(head) not in self.known:
            sizes = [n for n in self.sizes if n <= 33]
            took = head_costs(head, sizes, self.past, self.repeats)
            curves = {
                name: CostCurve({n: s.median for n, s in rows.items()})
                for name, rows in took.items()
            }
            self.known[id(head)] = head, curves
        return self.known[id(head)][1]

    def price(self, meter: Metered | MeteredHead) -> float:
        """Seconds that what a meter counted should take."""
        if isinstance(meter, Metered):
            return self.of(meter.lm).total(meter.passes)
        curves = self.of_head(meter.head)
        begun = curves["begin"].total(meter.begins)
        return begun + curves["extend"].total(meter.extends)
