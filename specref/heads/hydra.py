"""Hydra: Medusa's heads, told what was guessed above them.

Ankner et al. 2024, 2402.05109.  Head ``i`` reads the newest feature, the
embedding of the newest token and those of the ``i - 1`` guesses above: its
law depends on the path, and a tree is drafted level by level.  Hydra++
(section 4) puts a decoder layer over the target's features in front, whose
output stands in for the newest feature: the heads then see the whole text.

Does not handle: training (`specref.train`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specref.heads.base import Pairs, Text, after
from specref.heads.blocks import DepthHeads, DepthState, ResBlock
from specref.heads.pairs import PairState
from specref.lm.llama import Attend, Layer, Llama, RMSNorm
from specref.tree import ROOT


class Hydra(DepthHeads):
    """Per depth a wide block, ``blocks - 1`` square ones, and the output.

    Args:
        heads: number of heads: levels it can draft.
        blocks: residual blocks of each.
        skip: whether the wide block has a linear skip (published heads
            do); without, the feature alone is passed around it.
        mix, own_head, head_bias: see `DepthHeads`; published heads have
            ``own_head=True, head_bias=True``.
        prefix: Hydra++: a decoder layer over the features in front.  It
            starts as the identity.
        prefix_norm: a norm after that layer (published heads have one).
        base: a `Hydra`, or a name that `resolve_head` knows: the heads are
            its, frozen, and only the prefix layer is trained and saved.
        scales: of embeddings and features, as in `Eagle`; `fold` moves
            them into the blocks.
    Raises:
        ValueError: no block, or a ``base`` that does not fit.
    """

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        heads: int = 3,
        blocks: int = 1,
        skip: bool = True,
        mix: bool = False,
        own_head: bool = False,
        head_bias: bool = False,
        prefix: bool = False,
        prefix_norm: bool = False,
        base: Hydra | str | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(target, words, heads, mix, own_head, head_bias)
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        if base is not None and not prefix:
            raise ValueError("base needs prefix=True: it gives the heads")
        e, f = (1.0, 1.0) if base is not None else scales
        self.blocks = nn.ModuleList(
            nn.Sequential(*_blocks(self.width, i + 1, blocks, skip, e, f))
            for i in range(heads)
        )
        self.prefix = self.prefix_norm = None
        if prefix:
            self.prefix = Layer(self.config)
            self.prefix.index = 0
            nn.init.zeros_(self.prefix.o.weight)
            nn.init.zeros_(self.prefix.down.weight)
        if prefix_norm:
            self.prefix_norm = RMSNorm(self.width, self.config.rms_norm_eps)
        self.borrowed = base is not None
        if base is not None:
            self._borrow(base, target)

    def _borrow(self, base: Hydra | str, target: Llama) -> None:
        """Take over another one's heads, frozen."""
        from specref.heads.files import resolve_head

        other = resolve_head(base, target)
        if not isinstance(other, Hydra) or other.prefix is not None:
            raise ValueError("base must be a Hydra without a prefix layer")
        if not torch.equal(other.words, self.words):
            raise ValueError(
                f"base has {len(other.words)} words, this head "
                f"{len(self.words)}: they must be the same, in order"
            )
        state = {n: w.detach() for n, w in other.trained().items()}
        mine = DepthHeads.trained(self)
        names = {n for n in mine if not n.startswith("prefix")}
        if names != set(state):
            raise ValueError(
                "base must have the same options as this head; they differ "
                f"in {sorted(names ^ set(state))[:3]}"
            )
        with torch.no_grad():
            for name in names:
                mine[name].copy_(state[name])
                mine[name].requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        """See `Head.trained`."""
        own = super().trained()
        if not self.borrowed:
            return own
        return {n: w for n, w in own.items() if n.startswith("prefix")}

    def guess(self, hidden: Tensor, path: Tensor, depth: int) -> Tensor:
        """Output ``[..., d]`` of a depth.

        Args:
            hidden: ``[..., d]`` the feature of the newest pair, or what
                the prefix layer makes of it.
            path: ``[..., depth + 1]`` the newest pair's token and the
                ``depth`` tokens below it.
        """
        told = self.embed(path).flatten(-2)
        return self.blocks[depth](torch.cat((hidden, told), -1))

    def fuse(self, hidden: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """See `PairHead.fuse`, for the prefix layer."""
        return hidden

    def step(self, tokens: Tensor, features: Tensor, at: Attend) -> Tensor:
        """The prefix layer over features ``[B, n, d]``, see `PairHead`."""
        out = self.prefix(features, at)
        return out if self.prefix_norm is None else self.prefix_norm(out)

    def read(self, hidden: Tensor) -> Tensor:
        """What stands for the newest feature at every position of whole
        texts, ``[B, n, d]``."""
        if self.prefix is None:
            return hidden
        batch, n, _ = hidden.shape
        where = torch.arange(n, device=hidden.device)
        cos, sin = self.angles(where.expand(batch, n), self.dtype)
        causal = (where[:, None] >= where).expand(batch, n, n)
        return self.step(where, hidden, Attend(cos, sin, causal, None))

    def rollout(self, text: Text, depth: int) -> list[Tensor]:
        """See `Head.rollout`.

        Raises:
            ValueError: ``depth`` above the number of heads.
        """
        self.reach(depth - 1)
        hidden, said = self.read(text.hidden), text.tokens[:, 1:]
        path = torch.stack([after(said, s) for s in range(depth)], -1)
        return [
            self.guess(hidden, path[..., : s + 1], s) for s in range(depth)
        ]

    def state(self, batch: int, capacity: int) -> HydraState:
        """See `Head.state`."""
        return HydraState(self, batch, capacity)


def _blocks(
    d: int, told: int, blocks: int, skip: bool, e: float, f: float
) -> list[ResBlock]:
    """The blocks of one head, which is told of ``told`` tokens."""
    wide = narrow = None
    if (e, f) != (1.0, 1.0):
        narrow = torch.full((d,), f)
        wide = torch.cat((narrow, torch.full((told * d,), e)))
    first = ResBlock((told + 1) * d, d, skip, wide)
    rest = [ResBlock(d, d, scale=narrow) for _ in range(blocks - 1)]
    return [first, *rest]


class HydraState(DepthState):
    """See `State`.  Every pending node knows the tokens above it."""

    def __init__(self, head: Hydra, batch: int, capacity: int) -> None:
        super().__init__(head, batch)
        self.prefix = None
        if head.prefix is not None:
            self.prefix = PairState(head, batch, capacity)
            self.root = self.prefix.root
        # Per row the root's path, then those of pending nodes; entry 0 of
        # a path is the newest pair's token.
        self.paths = torch.zeros(
            batch, 1, head.levels, dtype=torch.long, device=head.device
        )

    def take(self, fresh: Sequence[Pairs]) -> None:
        """See `DepthState.take`."""
        super().take(fresh)
        if self.prefix is not None:
            self.prefix.take(fresh)
        self.paths = self.paths[:, :1]
        for b, f in enumerate(fresh):
            if f.tokens:
                self.paths[b, 0, 0] = f.tokens[-1]

    def begin(self, fresh: Sequence[Pairs]) -> Tensor:
        """See `State.begin`."""
        self.take(fresh)
        out = self.head.guess(self.root, self.paths[:, 0, :1], 0)
        return self.head.logits(out, 0)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See `State.extend`."""
        head, depth = self.head, self.deepen(parents)
        place = head.device
        up = parents.to(place).clamp(min=ROOT) + 1  # padding reads anything
        mine = self.paths.gather(1, up[..., None].expand(-1, -1, head.levels))
        mine.scatter_(
            2, depth[..., None].to(place), tokens[..., None].to(place)
        )
        self.paths = torch.cat((self.paths, mine), 1)
        some = depth.unique().tolist()
        hidden = self.root[:, None].expand(-1, depth.shape[1], -1)
        if len(some) == 1:
            return self._say(hidden, mine, some[0])
        out = hidden.new_empty(*depth.shape, head.vocab_size)
        for d in some:
            b, i = (depth == d).nonzero(as_tuple=True)
            b, i = b.to(place), i.to(place)
            out[b, i] = self._say(hidden[b, i], mine[b, i], d)
        return out

    def _say(self, hidden: Tensor, path: Tensor, depth: int) -> Tensor:
        out = self.head.guess(hidden, path[..., : depth + 1], depth)
        return self.head.logits(out, depth)
