"""Rotary positions: the frequencies of a configuration, and the rotation.

Does not handle: scaling other than "llama3" and "linear", interleaved pairs
(`lm.gguf` reorders those once, on reading).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from specref.lm.llama import LlamaConfig


def rotary(config: LlamaConfig, device: torch.device | str) -> Tensor:
    """Inverse frequencies ``[head_dim / 2]``, float32 as peers compute it."""
    half = torch.arange(0, config.head_dim, 2, device=device).float()
    inv = 1.0 / config.rope_theta ** (half / config.head_dim)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return inv
    if kind == "linear":
        return inv / scaling["factor"]
    if kind != "llama3":
        raise ValueError(
            "rope_scaling must be of type 'default', 'linear' or 'llama3', "
            f"got {kind!r}"
        )
    # Llama 3.1: low frequencies are divided by the factor, high ones kept,
    # those between interpolated.
    old = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old * inv / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return inv * (smooth + (1 - smooth) / scaling["factor"])


class Angles:
    """cos and signed sin of positions, from a table made once per device.

    Args:
        config: sizes and frequencies.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, positions: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Each ``[B, n, head_dim]`` for positions ``[B, n]``."""
        old = self._table and (self._table[0].device, self._table[0].dtype)
        if old != (positions.device, dtype):
            inv = rotary(self.config, positions.device)
            where = torch.arange(
                self.config.max_position_embeddings, device=positions.device
            )
            angle = torch.outer(where.float(), inv)
            sin = angle.sin()
            self._table = (
                torch.cat((angle.cos(),) * 2, -1).to(dtype),
                torch.cat((-sin, sin), -1).to(dtype),
            )
        cos, sin = self._table
        return F.embedding(positions, cos), F.embedding(positions, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, n, heads, head_dim]`` (half-split pairs).

    ``sin`` carries the sign of the swapped half, so that one roll and one
    fused multiply-add do it.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
