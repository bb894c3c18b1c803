"""What Medusa and Hydra share: residual blocks and one output per depth.

A head of this family has no loop of its own: the drafts of depth ``s`` come
from the block number ``s``, which is trained for that distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specref.heads.base import Head, Pairs
from specref.lm.linear import Linear
from specref.lm.llama import Llama
from specref.tree import DEAD, ROOT


class ResBlock(nn.Module):
    """``x[:width] + SiLU(W x + b)``, and ``R x + r`` when it has a skip.

    All four start at zero, so that the block starts as the first ``width``
    inputs.  Medusa's blocks have no skip and as many inputs as outputs;
    the first block of a Hydra head has more inputs, and its published form
    a linear skip, which is ``R`` plus the identity on the first inputs.

    Args:
        skip: whether it has ``R`` and ``r``.
        scale: ``[inputs]`` what ``W`` and ``R`` see is multiplied with,
            until `fold`; None is one.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        skip: bool = False,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.linear = Linear(inputs, width, True)
        nn.init.zeros_(self.linear.weight)
        self.skip = Linear(inputs, width, True) if skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` -> ``[..., width]``."""
        u = x if self.scale is None else x * self.scale
        out = x[..., : self.width] + F.silu(self.linear(u))
        return out if self.skip is None else out + self.skip(u)

    def fold(self) -> None:
        """Move the scale into the weights: the same function."""
        if self.scale is None:
            return
        with torch.no_grad():
            self.linear.weight.mul_(self.scale)
            if self.skip is not None:
                self.skip.weight.mul_(self.scale)
        self.scale = None


class DepthHeads(Head):
    """Blocks and an output head per depth; depth 0 follows the newest pair.

    Args:
        heads: number of depths.
        mix: the output of a depth is the target's rows times ``I + M`` with
            a trained ``M`` ``[d, d]`` per depth: the part of a published
            output head that a small file can hold.
        own_head: one trained matrix per depth instead, as published; it
            starts as the target's rows.
        head_bias: whether these matrices have a bias (Hydra's have).
    Raises:
        ValueError: no head, or both kinds of output.
    """

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        heads: int,
        mix: bool,
        own_head: bool,
        head_bias: bool,
    ) -> None:
        super().__init__(target, words)
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if own_head and mix:
            raise ValueError("mix must be False where own_head is True")
        self.levels, self.own_head = heads, own_head
        self.mix = self.outputs = None
        if mix:
            square = [Linear(self.width, self.width) for _ in range(heads)]
            for matrix in square:
                nn.init.zeros_(matrix.weight)
            self.mix = nn.ModuleList(square)
        if own_head:
            self.outputs = nn.ModuleList(
                Linear(self.width, len(words), head_bias) for _ in range(heads)
            )
            for output in self.outputs:
                output.weight = nn.Parameter(self.head.weight.clone())
            self.head = self.outputs[0]  # not a second copy

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """See `Head.project`."""
        if self.outputs is not None:
            return self.outputs[depth](out)
        if self.mix is not None:
            out = out + self.mix[depth](out)
        return self.head(out)

    def reach(self, depth: int) -> None:
        """Raises ValueError for a depth (0 first) that has no head."""
        if depth >= self.levels:
            raise ValueError(
                f"depth must be at most {self.levels}, the number of heads, "
                f"got {depth + 1}"
            )

    def truncate(self, count: int) -> Head:
        """See `Head.truncate`."""
        super().truncate(count)
        for output in (self.outputs or [])[1:]:
            output.weight = nn.Parameter(output.weight.detach()[:count])
            output._packed = None
        for output in self.outputs or []:
            if output.bias is not None:
                output.bias = nn.Parameter(output.bias.detach()[:count])
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """See `Head.trained`; ``head`` is a name of the first output."""
        named = self.named_parameters(remove_duplicate=False)
        return {
            n: w for n, w in named if not n.startswith(("embed.", "head."))
        }

    def fold(self) -> None:
        """Move all scales into the weights: the same head."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.fold()


class DepthState:
    """The newest pair of each row, and the depths of pending nodes.

    Nothing else needs to be kept: no head of this family reads what an
    earlier pass of its own computed.
    """

    def __init__(self, head: DepthHeads, batch: int) -> None:
        self.head = head
        self.root = torch.zeros(
            batch, head.width, device=head.device, dtype=head.dtype
        )
        self.depth = torch.zeros(batch, 0, dtype=torch.long)  # of pending

    @property
    def pending(self) -> int:
        return self.depth.shape[1]

    def take(self, fresh: Sequence[Pairs]) -> None:
        """Drop pending nodes and remember each row's newest pair."""
        self.depth = self.depth[:, :0]
        for b, f in enumerate(fresh):
            if f.tokens:
                self.root[b] = f.hidden[len(f.tokens) - 1]

    def deepen(self, parents: Tensor) -> Tensor:
        """Depths ``[B, m]`` of new nodes, 1 below the newest pair's token.

        Padding is as deep as the deepest, so that a level is one depth.
        """
        parents = parents.cpu()
        top = self.depth.new_zeros(len(parents), 1)
        known = torch.cat((top, self.depth), 1)
        depth = known.gather(1, parents.clamp(min=ROOT) + 1) + 1
        dead = parents == DEAD
        depth[dead] = depth[~dead].max() if bool((~dead).any()) else 1
        self.head.reach(int(depth.max()))
        self.depth = torch.cat((self.depth, depth), 1)
        return depth
