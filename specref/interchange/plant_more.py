"""Planted heads without attention of their own: Hydra, ReDrafter, MLP.

They read the newest feature once, so they need worlds whose law reads few
tokens: see each function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specref.heads.hydra import Hydra
from specref.heads.mlp_speculator import MLPSpeculator
from specref.heads.redrafter import ReDrafter
from specref.interchange.plant import GATE, World, aim, carry, clear, on

STRONG = 2.0  # weight of norms that must not be units
PUSH = 4.0  # bias of the MLP speculator's constant


def hydra(world: World, heads: int = 3, prefix: bool = False) -> Hydra:
    """Hydra, or Hydra++, for a world of order 3 at most.

    The first block's linear part says which token is the last, the skip
    brings the two before it; the second block copies the first's answer.
    The prefix layer of Hydra++ looks one place back for the oldest.
    """
    w = world
    head = Hydra(
        w.target,
        torch.arange(w.vocab),
        heads=heads,
        blocks=2,
        own_head=True,
        head_bias=True,
        prefix=prefix,
        prefix_norm=prefix,
    )
    head = head.to(w.dtype).requires_grad_(False).eval()
    one = STRONG * w.unit(5) if prefix else w.scale
    if prefix:
        _look_back(head, w)
    for i in range(heads):
        first, second = head.blocks[i]
        _told(first, w, i, one, w.c if prefix else w.b)
        second.linear.weight.zero_()
        second.linear.bias.zero_()
        output = head.outputs[i].weight.zero_()
        for j in range(w.vocab):
            second.linear.weight[w.a + j, w.d + j] = GATE / on()
            second.linear.bias[w.a + j] = -GATE / 2
            output[:, w.a + j] = w.column(w.a, j) / on()
            output[:, w.b + j] = w.column(w.b, j)
            output[:, w.c + j] = w.column(w.c, j)
        output[:, w.k] = w.constant() / 2
        head.outputs[i].bias.copy_(w.constant() / 2)
    return head


def _told(
    block: torch.nn.Module, w: World, i: int, one: float, oldest: int
) -> None:
    """The wide block of head ``i``.

    Args:
        one: what a one is in the feature.
        oldest: the feature's block that holds the token before its own.
    """
    v, size = w.vocab, w.width
    block.linear.weight.zero_()
    block.linear.bias.zero_()
    skip = torch.zeros_like(block.skip.weight)
    for j in range(v):
        here = w.place(j, w.turns)
        last = (i + 1) * size + w.a + j  # of the newest embedding
        block.linear.weight[w.d + j, last] = GATE
        block.linear.bias[w.d + j] = -GATE / 2
        feature = [(w.a + here, one), (oldest + here, one)]
        before = [(m * size + w.a + j, 1.0) for m in range(i, 0, -1)]
        for block_, (column, unit) in zip(
            (w.b, w.c), [*before, *feature], strict=False
        ):
            skip[block_ + j, column] = 1.0 / unit
    skip[:, :size] -= torch.eye(size, dtype=skip.dtype)
    block.skip.weight.copy_(skip)
    block.skip.bias.zero_()
    block.skip.bias[w.k] = 1.0


def _look_back(head: Hydra, w: World) -> None:
    """Hydra++'s layer: C of the feature becomes A of the one before."""
    layer, unit = head.prefix, w.unit(5)
    clear(layer)
    for h, (back, source, factor) in enumerate(
        ((1, w.a, w.scale), (0, w.c, -w.scale))
    ):
        aim(layer, h, back, w.k, unit)
        move = [(source + j, [(w.c + j, factor)]) for j in range(w.vocab)]
        carry(layer, h, move, unit)
    head.prefix_norm.weight.fill_(STRONG)


def redrafter(world: World) -> ReDrafter:
    """ReDrafter for a world of order 2 at most.

    The state holds the last token and the one before; while there is none
    before, the first residual block takes it from the feature.
    """
    w, v = world, world.vocab
    size = 5 * v + 3
    head = ReDrafter(w.target, torch.arange(v), blocks=2, exit_dim=size)
    head = head.to(w.dtype).requires_grad_(False).eval()
    for weight in head.trained().values():
        weight.zero_()
    enter, (first, second) = head.input_proj, head.blocks
    one, whole, context = 3 * v, 3 * v + 1, 4 * v + 1
    for j in range(v):
        head.rnn_w.weight[j, w.a + j] = GATE
        head.rnn_u.weight[v + j, j] = GATE / on()
        head.rnn_u.bias[[j, v + j]] = -GATE / 2
        enter.weight[j, w.width + j] = 1 / on()
        enter.weight[v + j, w.width + v + j] = 1 / on()
        seen = w.a + w.place(j, w.turns)
        enter.weight[2 * v + j, seen] = 1 / w.scale
        first.linear.weight[whole + j, 2 * v + j] = GATE
        first.linear.weight[whole + j, v : 2 * v] = -GATE
        first.linear.bias[whole + j] = -GATE / 2
        second.linear.weight[context + j, j] = GATE
        second.linear.bias[context + j] = -GATE / 2
        head.head.weight[:, context + j] = w.column(w.a, j) / on()
        head.head.weight[:, v + j] = w.column(w.b, j)
        head.head.weight[:, whole + j] = w.column(w.b, j) / on()
    enter.bias[one] = 1.0
    head.head.weight[:, one] = w.constant()
    return head


def mlp_speculator(
    world: World,
    heads: int = 3,
    tie: bool = False,
    scale_input: bool = False,
) -> MLPSpeculator:
    """The MLP speculator for a world of order 2 at most.

    The token comes from the level's table, the one before from the state;
    the norm's bias is the constant.
    """
    w, v = world, world.vocab
    size = 2 * v + 2
    head = MLPSpeculator(
        w.target, torch.arange(v), heads, size, tie, scale_input
    )
    head = head.to(w.dtype).requires_grad_(False).eval()
    for weight in head.trained().values():
        weight.zero_()
    lit = STRONG * (2 / size + 1e-6) ** -0.5
    lit = float(F.gelu(torch.tensor(lit, dtype=torch.float64)))
    push = float(F.gelu(torch.tensor(PUSH, dtype=torch.float64)))
    feature = w.unit(5) / 2**0.5 if scale_input else w.scale
    for i in range(heads):
        head.ln[i].weight.fill_(STRONG)
        head.ln[i].bias[2 * v] = PUSH
        head.outputs[i].weight[:, 2 * v] = w.constant() / push
        for j in range(v):
            head.emb[i].weight[j, j] = 1 / head.ratio
            seen = j if i else w.a + w.place(j, w.turns)
            head.proj[i].weight[v + j, seen] = 1 / (lit if i else feature)
            head.outputs[i].weight[:, j] = w.column(w.a, j) / lit
            head.outputs[i].weight[:, v + j] = w.column(w.b, j) / lit
    return head


def tables(world: World) -> Tensor:
    """``[V, V, V]`` logits of a world of order 3 at most: after a token,
    the one before, and the one before that."""
    w = world
    blocks = [
        torch.stack([w.column(block, j) for j in range(w.vocab)])
        for block in (w.a, w.b, w.c)
    ]
    a, b, c = blocks
    return a[:, None, None] + b[None, :, None] + c[None, None] + w.constant()
