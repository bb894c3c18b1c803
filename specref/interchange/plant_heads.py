"""Heads planted for a `World`: what they draft is the target's own law.

Every tensor has a part in it, so that one that is lost, swapped or scaled
costs acceptance (but one: of two layers of EAGLE-3, the first has an empty
MLP, whose norm nothing reads).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specref.heads.eagle import Eagle
from specref.heads.eagle3 import Eagle3
from specref.heads.medusa import Medusa
from specref.interchange.plant import GATE, World, aim, carry, clear, on
from specref.lm.llama import Layer

RESIDUAL = 1.7  # weight of EAGLE-3's feature norm, so that it is no unit
ENTRY = 1.3  # weight of the norms before fc


def words(world: World) -> Tensor:
    """``[v]`` the tokens that are said: a planted draft vocabulary."""
    return torch.tensor(sorted(world.said))


def eagle(world: World) -> Eagle:
    """EAGLE-1: features of the target in, features of the target out.

    ``A`` comes from the embedding, ``B`` from the feature's ``A``, ``C`` by
    attention from the pair before, ``D`` from the MLP, ``K`` from the bias.
    """
    w, one = world, world.scale
    every = torch.arange(w.vocab)
    head = Eagle(w.target, every).to(w.dtype).requires_grad_(False).eval()
    layer = head.layers[0]
    head.fc.weight.zero_()
    head.fc.bias.zero_()
    clear(layer)
    for j in range(w.vocab):
        here = w.place(j, w.turns)
        head.fc.weight[w.a + here, w.a + j] = one
        head.fc.weight[w.b + here, w.width + w.a + here] = 1.0
    head.fc.bias[w.k] = one
    aim(layer, 0, 1, w.k, one)
    move = [(w.b + j, [(w.c + j, 1.0)]) for j in range(w.vocab)]
    carry(layer, 0, move)
    w.pair_gates(layer, w.turns, one)
    return head


def eagle3(
    world: World,
    taps: Sequence[int] | None = None,
    layers: int = 1,
    norm_before_residual: bool = False,
    norm_before_fc: bool = False,
    fc_norm: bool = False,
    norm_output: bool = False,
) -> Eagle3:
    """EAGLE-3: the last stream from three taps that all matter; the flags
    are those of `Eagle3`.

    The layer takes off what the fed feature holds of the last position and
    writes what holds of the next.  With ``norm_output`` it writes a one
    more than that, which the norm takes away before it is fed back.
    """
    w = world
    head = Eagle3(
        w.target,
        words(w),
        taps,
        layers=layers,
        norm_before_residual=norm_before_residual,
        norm_before_fc=norm_before_fc,
        fc_norm=fc_norm,
        norm_output=norm_output,
    )
    if len(head.taps) != 3 or min(head.taps) < 1:
        raise ValueError(
            f"taps must be three layers from 1 up, got {list(head.taps)}"
        )
    head = head.to(w.dtype).requires_grad_(False).eval()
    fed = w.scale if norm_output else 1.0
    _fuse(head, w, fed)
    head.layer.feature_norm.weight.fill_(RESIDUAL)
    out = RESIDUAL * w.unit(5) if norm_before_residual else fed
    head.norm.weight.fill_(w.feature_scale)
    clear_but_norm(head.layer)
    _advance(head.layer, w, out)
    for layer in head.more:
        clear(layer)
    last = head.more[-1] if layers > 1 else head.layer
    pairs = [w.d + j for j in range(w.vocab)]
    if layers > 1:
        aim(last, 0, 0, w.k, w.unit(5))
        carry(last, 0, [(r, [(r, -out)]) for r in pairs], w.unit(5))
    else:
        seen = RESIDUAL * w.unit(5)
        aim(last, 4, 0, w.width + w.k, seen)
        move = [(w.width + r, [(r, -out)]) for r in pairs]
        carry(last, 4, move, seen)
    w.pair_gates(last, w.turns, out)
    if norm_output:
        # Five ones, and an extra of twice their size in a spare column.
        last.down.weight[w.k + 1, 0] = 2 * out / on()
        head.norm.weight.fill_(w.scale * (9 / w.width) ** 0.5)
        head.norm.weight[w.k + 1] = 0.0
    head.head.weight.copy_(w.weights[head.words])
    return head


def clear_but_norm(layer: Layer) -> None:
    """All matrices zero, norms as they are."""
    for weight in layer.parameters():
        if weight.dim() > 1:
            weight.data.zero_()


def _fuse(head: Eagle3, w: World, fed: float) -> None:
    """``fc``: the last stream, ``fed`` for a one, from three taps: ``A`` by
    halves from the first and the last, ``B`` from the second."""
    head.fc.weight.zero_()
    seen = 1.0
    if head.input_norm is not None:
        head.input_norm.weight.fill_(ENTRY)
        seen = ENTRY * w.unit(5)
    if head.tap_norms is not None:
        for norm in head.tap_norms:
            norm.weight.fill_(ENTRY)
        seen = ENTRY * w.unit(5)
    share = ((0, w.a, 0.5), (2, w.a, 0.5), (1, w.b, 1.0), (2, w.c, 1.0))
    for i, block, part in share:
        for j in range(w.vocab):
            row = block + w.place(j, w.turns)
            column = i * w.width + block + w.place(j, head.taps[i] - 1)
            head.fc.weight[row, column] = part * fed / seen
    last = (len(head.taps) - 1) * w.width
    for row in (*range(w.d, w.d + w.vocab), w.k):
        head.fc.weight[row, last + row] = fed / seen


def _advance(layer: Layer, w: World, out: float) -> None:
    """The wide layer's attention: from one position to the next.

    Its input is the normed embedding, then the normed feature.
    """
    e, f = w.unit(2), RESIDUAL * w.unit(5)
    said, v, t = w.width, w.vocab, w.turns
    for h, back in enumerate((0, 0, 0, 1)):
        aim(layer, h, back, said + w.k, f)
    token = [
        (
            [(w.a + j, 1 / e), (said + w.a + w.place(j, t), -1 / f)],
            [(w.a + w.place(j, t), out)],
        )
        for j in range(v)
    ]
    before = [
        (
            [(said + w.a + j, 1 / f), (said + w.b + j, -1 / f)],
            [(w.b + j, out)],
        )
        for j in range(v)
    ]
    carry(layer, 0, token)
    carry(layer, 1, before)
    # C twice by half: B of this position, A of the one before.
    older = [
        (
            [(said + w.b + j, 0.5 / f), (said + w.c + j, -1 / f)],
            [(w.c + j, out)],
        )
        for j in range(v)
    ]
    carry(layer, 2, older)
    add = [(said + w.a + j, [(w.c + j, 0.5 * out)]) for j in range(v)]
    carry(layer, 3, add, f)


def medusa(world: World, heads: int = 3, own_head: bool = True) -> Medusa:
    """Medusa for a world of order 1: head ``i`` says what comes ``i + 2``
    places after the feature's own token.

    Raises:
        ValueError: a world of another order, whose far tokens no linear
            output can tell.
    """
    w = world
    if w.order != 1:
        raise ValueError(f"a planted Medusa needs order 1, got {w.order}")
    every = torch.arange(w.vocab)
    head = Medusa(w.target, every, heads, own_head=own_head)
    head = head.to(w.dtype).requires_grad_(False).eval()
    said, gate = list(w.said), GATE / w.scale
    for i in range(heads):
        block = head.blocks[i][0].linear
        block.weight.zero_()
        block.bias.zero_()
        for n, token in enumerate(said):
            later = said[(n + i + 1) % len(said)]
            # The target's own head says what follows the token in A; an
            # output of its own reads D, by number.
            row = w.d + n if own_head else w.a + w.place(later, w.turns)
            # On by its bias, and off where any other token stands.
            block.weight[row, w.a : w.a + w.vocab] = -gate
            block.weight[row, w.a + w.place(token, w.turns)] = 0.0
            block.bias[row] = GATE / 2
        if own_head:
            output = head.outputs[i].weight.zero_()
            for n in range(len(said)):
                output[said[(n + i + 2) % len(said)], w.d + n] = 1.0
    return head
