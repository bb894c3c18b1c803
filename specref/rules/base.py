"""What a rule is: a pure function of (tree, target laws, draws).

A rule never sees a model.  It says whether it is lossless and which kinds
of proposal it is lossless for; a proposal of another kind is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from specref.draws import Draws
from specref.tree import Tree


@dataclass(frozen=True)
class Verdict:
    """What a rule decides.

    Attributes:
        path: accepted nodes, from the first level down (a path of the
            tree); empty when nothing was accepted.
        token: the one extra token: a correction where the path stopped
            early, the bonus where it reached a leaf.
    """

    path: tuple[int, ...]
    token: int


Decide = Callable[..., Verdict]


@dataclass(frozen=True)
class Rule:
    """An acceptance rule with what it promises.

    Attributes:
        name: as in the registry.
        decide: ``(tree, p, draws) -> Verdict`` with ``p`` ``[n + 1, V]``:
            row 0 is the target's law after the last committed token, row
            ``i + 1`` its law after node ``i``.
        lossless: the output law equals the target's, for ``admits``.
        admits: kinds of `Tree` it accepts.
        chains_only: refuses trees that branch.
        paper: where it comes from.
    """

    name: str
    decide: Decide
    lossless: bool
    admits: frozenset[str]
    paper: str
    chains_only: bool = False

    def __call__(self, tree: Tree, p: Tensor, draws: Draws) -> Verdict:
        self.check(tree, p)
        return self.decide(tree, p, draws)

    def check(self, tree: Tree, p: Tensor) -> None:
        """Raises ValueError for a proposal this rule would bias."""
        if p.shape[0] != len(tree) + 1:
            raise ValueError(
                f"p must have one row per node plus one, got {p.shape[0]} "
                f"rows for {len(tree)} nodes"
            )
        if not len(tree):
            return
        if tree.kind not in self.admits:
            raise ValueError(
                f"rule {self.name!r} would be biased for a proposal of kind "
                f"{tree.kind!r}: it admits {sorted(self.admits)}"
            )
        if self.chains_only and not tree.is_chain:
            raise ValueError(
                f"rule {self.name!r} needs a chain, got a tree that branches"
            )


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm([p - q]_+), ``[V]``; p itself where nothing is left over.

    The all-zero case is p = q up to rounding, in which the caller can
    only be here with probability of the order of the rounding.
    """
    rest = (p - q).clamp(min=0.0)
    total = rest.sum()
    return rest / total if total > 0 else p


def stop_at(tree: Tree, node: int, token: int) -> Verdict:
    """The verdict that accepts down to ``node`` and adds ``token``."""
    return Verdict(tuple(tree.path(node)), int(token))


def draw(law: Tensor, draws: Draws) -> int:
    """One token of ``law`` ``[V]``."""
    return int(draws.categorical(law))
