"""A linear layer with three ways to hold its weight.

Plain (any device, trainable); packed once for oneDNN on the CPU, which
otherwise lays the matrix out again on every call with more than one row;
and weight-only int8 with one scale per output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """``[..., inputs] -> [..., outputs]``."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=0.02)
        self._packed: Tensor | None = None
        self._int8: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(
                x, self._packed, self.bias, "none", [], ""
            )
        if self._int8 is not None:
            flat = x.reshape(-1, x.shape[-1])
            out = torch._weight_int8pack_mm(flat, *self._int8)
            out = out.view(*x.shape[:-1], -1)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Repack for the CPU; a no-op on other devices."""
        usable = self.weight.device.type == "cpu" and self.weight.dtype in (
            torch.float32,
            torch.bfloat16,
        )
        if usable and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(
                self.weight.detach(), 8
            )

    def quantize(self) -> None:
        """Round the weight to int8 with one scale per output row."""
        wide = self.weight.detach().float()
        scale = (wide.abs().amax(1) / 127.0).clamp(min=1e-12)
        rounded = (wide / scale[:, None]).round().to(torch.int8)
        self._int8 = rounded, scale.to(self.weight.dtype)
        self._packed = None
