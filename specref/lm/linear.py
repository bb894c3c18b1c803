"""A linear layer with four ways to hold its weight.

Plain (any device, trainable); packed once for oneDNN on the CPU, which
otherwise lays the matrix out again on every call with more than one row;
weight-only int8 with one scale per output; weight-only int4 with a scale
and a zero per group of 32 inputs.  The last two are for drafts; their
kernels read weights fast but multiply many rows slowly, so that wide inputs
(prompts) can be sent to a layer that is not rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # inputs that share a scale
BLOCK = 16  # outputs that the int4 kernel takes at a time
NARROW = {8: 6, 4: 16}  # rows up to which the rounded kernels are faster


class Linear(nn.Module):
    """``[..., inputs] -> [..., outputs]``."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=0.02)
        self._packed: Tensor | None = None
        self._int8: tuple[Tensor, Tensor] | None = None
        self._int4: tuple[Tensor, Tensor] | None = None
        # In a tuple, so that it does not become a part of this module.
        self._wide: tuple[Linear, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(
                x, self._packed, self.bias, "none", [], ""
            )
        if self._int8 is None and self._int4 is None:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, x.shape[-1])
        if self._wide is not None and flat.shape[0] > self._wide[1]:
            exact = self._wide[0]
            return exact(x.to(exact.weight.dtype)).to(x.dtype)
        if self._int8 is not None:
            out = torch._weight_int8pack_mm(flat, *self._int8)
        else:
            weight, scales = self._int4
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat, weight, GROUP, scales
            )
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def pack(self) -> None:
        """Repack for the CPU; a no-op on other devices."""
        usable = self.weight.device.type == "cpu" and self.weight.dtype in (
            torch.float32,
            torch.bfloat16,
        )
        if self._packed is not None:
            return  # also when shared with another model
        if usable and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(
                self.weight.detach(), 8
            )

    @property
    def fits_int4(self) -> bool:
        """Whether `quantize` to 4 bits is possible."""
        outputs, inputs = self.weight.shape
        return inputs % GROUP == 0 and outputs % BLOCK == 0

    def quantize(self, bits: int = 8, wide: Linear | None = None) -> None:
        """Round a bfloat16 weight to ``bits`` 8 or 4 (inference only).

        Args:
            wide: layer that takes inputs of more rows than `NARROW`.
        Raises:
            ValueError: other ``bits``, or, for 4, inputs not a multiple of
                32 or outputs not one of 16.
        """
        full = self.weight.detach().float()
        self._packed = self._int8 = self._int4 = None
        if bits == 8:
            scale = (full.abs().amax(1) / 127.0).clamp(min=1e-12)
            rounded = (full / scale[:, None]).round().to(torch.int8)
            self._int8 = rounded, scale.to(self.weight.dtype)
        elif bits == 4:
            if not self.fits_int4:
                outputs, inputs = self.weight.shape
                raise ValueError(
                    f"int4 needs inputs in groups of {GROUP} and outputs in "
                    f"groups of {BLOCK}, got {inputs} and {outputs}: use int8"
                )
            self._int4 = _int4(full, self.weight.dtype)
        else:
            raise ValueError(f"bits must be 8 or 4, got {bits}")
        self._wide = None if wide is None else (wide, NARROW[bits])


def _int4(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes 0..15 between each group's smallest and largest weight.

    A weight that came from a 4-bit file with the same groups (GGUF's Q4_1)
    gets its own codes back; what differs is the rounding of the scales.
    """
    outputs, inputs = wide.shape
    groups = wide.view(outputs, inputs // GROUP, GROUP)
    low = groups.amin(-1, keepdim=True)
    step = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-12)
    codes = ((groups - low) / step).round().clamp(0, 15).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        codes.view(outputs, inputs), 1
    )
    # The kernel reads (code - 8) * scale + zero, laid out [groups, out, 2].
    scales = torch.cat((step, low + 8 * step), -1).transpose(0, 1)
    return packed, scales.contiguous().to(dtype)
