"""Input checks that every closed form shares, with one sentence each.

Does not handle: repairing input.  Nothing is clamped or renormalised.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
SUM_TOLERANCE = 1e-6  # a float32 softmax over a large vocabulary passes


def numbers(name: str, value: ArrayLike) -> Array:
    """float64 array of finite numbers."""
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a number or an array of numbers of one shape, "
            f"got {value!r}"
        ) from None
    if not np.isfinite(out).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return out


def between(
    name: str,
    value: ArrayLike,
    low: float,
    high: float,
    open_low: bool = False,
) -> Array:
    """Numbers in [low, high], or in (low, high]."""
    out = numbers(name, value)
    bad = (out <= low if open_low else out < low) | (out > high)
    if bad.any():
        left = "(" if open_low else "["
        right = "inf)" if np.isinf(high) else f"{high:g}]"
        raise ValueError(
            f"{name} must be in {left}{low:g}, {right}, got {out[bad][0]:g}"
        )
    return out


def chances(name: str, value: ArrayLike) -> Array:
    """Numbers in [0, 1]."""
    return between(name, value, 0.0, 1.0)


def not_negative(name: str, value: ArrayLike) -> Array:
    return between(name, value, 0.0, np.inf)


def positive(name: str, value: ArrayLike) -> Array:
    return between(name, value, 0.0, np.inf, open_low=True)


def counts(name: str, value: ArrayLike, least: int) -> Array:
    """Whole numbers of at least ``least``, as float64."""
    out = numbers(name, value)
    if (out != np.floor(out)).any():
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if (out < least).any():
        raise ValueError(f"{name} must be at least {least}, got {out.min():g}")
    return out


def count(name: str, value: ArrayLike, least: int) -> int:
    """One whole number of at least ``least``."""
    out = counts(name, value, least)
    if out.ndim:
        raise ValueError(f"{name} must be one number, got shape {out.shape}")
    return int(out)


def laws(name: str, value: ArrayLike) -> Array:
    """``[..., V]``: rows that are probability laws."""
    out = numbers(name, value)
    if not out.ndim or not out.shape[-1]:
        raise ValueError(f"{name} must have shape [..., V], got {out.shape}")
    if (out < 0).any():
        raise ValueError(
            f"{name} must not be negative, got {out.min():g}: give "
            "probabilities, not logits"
        )
    off = np.abs(out.sum(-1) - 1.0)
    if (off > SUM_TOLERANCE).any():
        total = out.sum(-1).reshape(-1)[off.argmax()]
        raise ValueError(f"{name} must sum to 1, got a sum of {total:.9g}")
    return out


def law(name: str, value: ArrayLike) -> Array:
    """``[V]``: one probability law."""
    out = laws(name, value)
    if out.ndim != 1:
        raise ValueError(
            f"{name} must be one law of shape [V], got shape {out.shape}"
        )
    return out


def pair(p: ArrayLike, q: ArrayLike) -> tuple[Array, Array]:
    """Two laws over one vocabulary, ``[V]`` each."""
    left, right = law("p", p), law("q", q)
    same_vocabulary(left, right)
    return left, right


def same_vocabulary(p: Array, q: Array) -> None:
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(
            "p and q must be over one vocabulary, got "
            f"{p.shape[-1]} and {q.shape[-1]} tokens"
        )


def chance(value: Array) -> float | Array:
    """`plain`, without the rounding that lifts a sum of shares above 1."""
    return plain(np.minimum(value, 1.0))


def plain(value: Array) -> float | Array:
    """A float where nothing was broadcast, else the array."""
    out = np.asarray(value)
    return out if out.ndim else float(out)
