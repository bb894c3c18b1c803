"""A target whose next token is known in closed form, for planted heads.

A planted head computes the target's own law, by weights set by hand.  In any
engine it must be accepted always; one wrong tap, swapped half or lost bias
shows as acceptance below 1, which real checkpoints never tell from a bad
head.

The target reads its last three tokens.  Its stream holds one-hot blocks
``A`` (the token), ``B`` and ``C`` (the one and the two before), ``D`` (which
of some pairs ``A, B`` it is) and a constant ``K``.  Layer 0 fills ``B`` and
``C`` by attention that looks back exactly one or two places, and ``D`` by
its MLP; each later layer moves the ones of ``A``, ``B`` and ``C`` on by one
place, so that every tap shows the same token in another place.  All streams
of a depth have one length, so that norms only scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from specref.draws import Seeded
from specref.lm.llama import Layer, Llama, LlamaConfig

GAP = 50.0  # attention scores: exp(-50) is nothing in float64
GATE = 80.0  # gates are this steep: off is exp(-40)
SILENT = -60.0  # logit of tokens that are never said


def on() -> float:
    """What a SiLU gives for a gate that is on."""
    return float(F.silu(torch.tensor(GATE / 2, dtype=torch.float64)))


@dataclass
class World:
    """Sizes, the law's weights, and the target.

    Attributes:
        said: tokens that are ever said, the others' logit is `SILENT`.
        order: how many of the last tokens the law reads (1 to 3; 4 reads
            ``D`` too).  With order 1 the greedy text runs through ``said``.
        head_dim: of the attention heads, at least ``vocab``.
    """

    vocab: int = 9
    said: Sequence[int] = (1, 2, 3, 4, 6, 7, 8)
    order: int = 4
    layers: int = 8
    head_dim: int = 16
    heads: int = 5
    eps: float = 1e-12
    feature_scale: float = 3.0
    seed: int = 0
    dtype: torch.dtype = torch.float64
    weights: Tensor = field(init=False)  # [V, d] of the target's head
    target: Llama = field(init=False)

    def __post_init__(self) -> None:
        v = self.vocab
        if not 2 <= v <= self.head_dim:
            raise ValueError(
                f"vocab must be in [2, head_dim {self.head_dim}], got {v}"
            )
        if not 1 <= self.order <= 4:
            raise ValueError(f"order must be in [1, 4], got {self.order}")
        self.a, self.b, self.c, self.d = 0, v, 2 * v, 3 * v
        self.k = 4 * v
        self.width = -(-(self.k + 1) // 8) * 8
        self.weights = self._law()
        self.target = self._build()

    # -- the law -----------------------------------------------------------

    def _law(self) -> Tensor:
        """The output head: random over the blocks that the order reads."""
        v, said = self.vocab, list(self.said)
        source = Seeded(self.seed)
        out = torch.zeros(v, self.width, dtype=torch.float64)
        if self.order == 1:
            for i, token in enumerate(said):
                out[said[(i + 1) % len(said)], self.a + token] = 4.0
        else:
            end = {2: self.c, 3: self.d, 4: self.k}[self.order]
            out[:, :end] = 4.0 * source.uniform((v, end)) - 2.0
            out[:, self.k] = 2.0 * source.uniform((v,))
        silent = [t for t in range(v) if t not in said]
        out[silent] = 0.0
        out[silent, self.k] = SILENT
        return self._turn(out, self.layers - 1) / self.scale

    def _turn(self, rows: Tensor, times: int) -> Tensor:
        """Move the columns of A, B and C on, as the layers do."""
        out, v = rows.clone(), self.vocab
        for block in (self.a, self.b, self.c):
            part = rows[:, block : block + v]
            out[:, block : block + v] = part.roll(times, 1)
        return out

    def place(self, token: int, turns: int) -> int:
        """Where the one of ``token`` stands in a block after ``turns``
        layers that move it on."""
        return (token + turns) % self.vocab

    def column(self, block: int, token: int) -> Tensor:
        """``[V]`` what ``token`` in a block adds to the target's logits."""
        spot = block + self.place(token, self.turns)
        return self.weights[:, spot] * self.scale

    def constant(self) -> Tensor:
        """``[V]`` what ``K`` adds to the target's logits."""
        return self.weights[:, self.k] * self.scale

    @property
    def turns(self) -> int:
        """How often the last stream has been moved on."""
        return self.layers - 1

    def pairs(self) -> list[tuple[int, int]]:
        """``(token, token before)`` of each number of D from 1 up; number
        0 is any other pair."""
        some = list(self.said)
        return [
            (token, some[(2 * i + 1) % len(some)])
            for i, token in enumerate(some[: self.vocab - 1])
        ]

    # -- lengths -----------------------------------------------------------

    def unit(self, ones: int) -> float:
        """What a norm of weight 1 makes of a one in a stream of ``ones``
        ones."""
        return 1.0 / math.sqrt(ones / self.width + self.eps)

    @property
    def scale(self) -> float:
        """What stands for a one in the target's features."""
        return self.feature_scale * self.unit(5)

    # -- the target --------------------------------------------------------

    def config(self) -> LlamaConfig:
        """Sizes of the target."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.head_dim,
            intermediate_size=self.vocab + 3,
            rope_theta=100.0,
            rms_norm_eps=self.eps,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )

    def _build(self) -> Llama:
        lm = Llama(self.config()).to(self.dtype).requires_grad_(False).eval()
        v = self.vocab
        lm.embed.weight.zero_()
        for token in range(v):
            lm.embed.weight[token, [self.a + token, self.k]] = 1.0
        for i, layer in enumerate(lm.layers):
            clear(layer)
            if i:
                for h, block in enumerate((self.a, self.b, self.c)):
                    move = [
                        (
                            block + j,
                            [(block + (j + 1) % v, 1.0), (block + j, -1.0)],
                        )
                        for j in range(v)
                    ]
                    aim(layer, h, 0, self.k, self.unit(5))
                    carry(layer, h, move, self.unit(5))
                continue
            for h, block in enumerate((self.b, self.c)):
                copy = [(self.a + j, [(block + j, 1.0)]) for j in range(v)]
                aim(layer, h, h + 1, self.k, self.unit(2))
                carry(layer, h, copy, self.unit(2))
            self.pair_gates(layer, 0, 1.0)
        lm.norm.weight.fill_(self.feature_scale)
        lm.head.weight.copy_(self.weights)
        return lm

    def pair_gates(self, layer: Layer, turns: int, scale: float) -> None:
        """Let a layer's MLP write D, ``scale`` for a one, from A and B that
        have been moved on ``turns`` times."""
        gate, up = layer.gate_up.weight.chunk(2)
        one, unit = scale / on(), self.unit(4)
        for u, (token, before) in enumerate(self.pairs(), 1):
            gate[u, self.a + self.place(token, turns)] = GATE / unit
            gate[u, self.b + self.place(before, turns)] = GATE / unit
            gate[u, self.k] = -1.5 * GATE / unit
            layer.down.weight[self.d + u, u] = one
            layer.down.weight[self.d, u] = -one
        gate[0, self.k] = 0.5 * GATE / unit
        layer.down.weight[self.d, 0] = one
        up[: self.vocab, self.k] = 1.0 / unit


def clear(layer: Layer) -> None:
    """All matrices zero, all norms one: a layer that adds nothing."""
    for weight in layer.parameters():
        weight.data.fill_(1.0 if weight.dim() == 1 else 0.0)


def aim(layer: Layer, head: int, back: int, constant: int, one: float) -> None:
    """Let an attention head look exactly ``back`` places back.

    Args:
        constant: column of the attention's input that always holds ``one``.
    """
    c = layer.config
    half, size = c.head_dim // 2, c.head_dim
    turn = c.rope_theta ** (-torch.arange(half).double() * 2 / size)
    far = torch.arange(-back, c.max_position_embeddings).double()
    far = far[far != 0]
    least = (1 - torch.cos(far[:, None] * turn)).sum(1).min()
    sharp = math.sqrt(GAP * math.sqrt(size) / float(least))
    q = torch.cat((torch.ones(half), torch.zeros(half))) * sharp
    k = torch.cat((torch.cos(back * turn), torch.sin(back * turn))) * sharp
    shift = c.num_attention_heads * size
    rows = slice(head * size, (head + 1) * size)
    layer.qkv.weight[rows, constant] = (q / one).to(layer.qkv.weight.dtype)
    rows = slice(shift + head * size, shift + (head + 1) * size)
    layer.qkv.weight[rows, constant] = (k / one).to(layer.qkv.weight.dtype)


def carry(
    layer: Layer,
    head: int,
    moves: Sequence[tuple[int | Sequence[tuple[int, float]], Sequence]],
    one: float = 1.0,
) -> None:
    """What an attention head brings from where it looks.

    Args:
        moves: ``(source, goals)`` per value: a column of the attention's
            input, or several with factors; and rows of the output with
            factors.
        one: what a one is in the attention's input.
    """
    c = layer.config
    values = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    for j, (source, goals) in enumerate(moves):
        some = [(source, 1.0 / one)] if isinstance(source, int) else source
        for column, factor in some:
            layer.qkv.weight[values + head * c.head_dim + j, column] = factor
        for row, factor in goals:
            layer.o.weight[row, head * c.head_dim + j] += factor
