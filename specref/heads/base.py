"""What a head is: a module that drafts from the target's features.

Position ``t`` of a text holds token ``x_t``; the target's feature there,
``f_t``, is what predicts ``x_{t+1}``.  When a round begins, the features of
all committed tokens but the last are known.  So a head is fed *pairs*
``(f_t, x_{t+1})``: the feature, and the token that was drawn from it.  After
the newest pair it must say what follows that token, and then what follows
its own guesses.

A head gives three things.  `Head.rollout` drafts from every position of a
known text at once (training, and acceptance by depth); `Head.state` drafts
in the decode loop (`specref.draft.head`); `Head.project` turns what either
returns into logits over ``words``, the head's own output vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from specref.lm.linear import Linear
from specref.lm.llama import Llama, LlamaConfig
from specref.lm.rotary import Angles


@dataclass(frozen=True)
class Pairs:
    """New pairs of one row, oldest first; there may be none.

    Attributes:
        hidden: ``[n, d]`` features after the target's last norm.
        taps: one ``[n, d]`` per entry of `Head.taps`.
        tokens: ``n`` tokens; ``tokens[i]`` was drawn after ``hidden[i]``.
    """

    hidden: Tensor
    taps: tuple[Tensor, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """Known texts with the target's features, padded behind.

    Attributes:
        tokens: ``[B, n + 1]``; ``tokens[:, t + 1]`` follows ``hidden[:, t]``.
        hidden: ``[B, n, d]``.
        taps: one ``[B, n, d]`` per entry of `Head.taps`.
    """

    tokens: Tensor
    hidden: Tensor
    taps: tuple[Tensor, ...] = ()


class State(Protocol):
    """A head in the decode loop: a `grow.Stepper` that reads pairs."""

    pending: int  # nodes stepped since `begin`

    def begin(self, fresh: Sequence[Pairs]) -> Tensor:
        """Drop pending nodes, take in each row's new pairs; logits
        ``[B, V]`` of what follows the newest pair.  A row without new
        pairs keeps its place (its logits are not read)."""

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits ``[B, m, V]`` after new nodes (parents as in `LM`)."""


class Head(nn.Module):
    """Base of all heads.

    Args:
        target: the model whose features it reads.  Its embedding is
            shared; the rows of its output head for ``words`` are copied.
        words: ``[v]`` token ids that the head can draft, the most frequent
            first (`truncate` keeps a front part).
        layers: decoder layers of its own, for the cache.
        config: sizes of its layers; the target's unless given.

    Attributes:
        taps: layers of the target whose input it reads (see `Output`).
        levels: deepest level it can draft; None is any.
        own_head: whether the output head is trained and saved.
    """

    taps: tuple[int, ...] = ()
    levels: int | None = None
    own_head: bool = False

    def __init__(
        self,
        target: Llama,
        words: Tensor,
        layers: int = 1,
        config: LlamaConfig | None = None,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        top = target.vocab_size
        if len(words) == 0 or not 0 <= int(words.min()) <= int(words.max()):
            raise ValueError("words must hold at least one token id of 0 up")
        if int(words.max()) >= top or len(words.unique()) != len(words):
            raise ValueError(
                f"words must be different token ids below {top}, got up to "
                f"{int(words.max())}"
            )
        self.config = replace(
            config or target.config,
            num_hidden_layers=layers,
            sliding_window=None,
        )
        self.vocab_size, self.width = top, self.config.hidden_size
        self.angles = Angles(self.config)
        self.embed = target.embed
        self.register_buffer("words", words.to(target.device))
        self.head = Linear(self.width, len(words))
        if self.width == target.config.hidden_size:
            rows = target.head.weight.detach()[self.words]
            self.head.weight = nn.Parameter(rows.clone(), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def project(self, out: Tensor, depth: int = 0) -> Tensor:
        """``[..., d]`` -> ``[..., v]`` logits over ``words``.

        Args:
            depth: levels below the newest pair's token (heads that have
                one output per depth).
        """
        return self.head(out)

    def logits(self, out: Tensor, depth: int = 0) -> Tensor:
        """``[..., d]`` -> ``[..., V]``; ``-inf`` outside ``words``."""
        some = self.project(out, depth)
        full = some.new_full((*some.shape[:-1], self.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.words, some)

    def rollout(self, text: Text, depth: int) -> list[Tensor]:
        """Draft from every pair of known texts.

        Returns:
            ``depth`` tensors ``[B, n, d]``.  Entry ``[:, t]`` of number
            ``s`` predicts ``x_{t+s+2}`` from the features up to ``f_t`` and
            the tokens up to ``x_{t+s+1}`` (zeros stand in for tokens beyond
            the text; what comes of them is not to be read).
        """
        raise NotImplementedError

    def state(self, batch: int, capacity: int) -> State:
        """A fresh state for ``batch`` rows of at most ``capacity`` pairs
        and pending nodes together."""
        raise NotImplementedError

    def start_near(self, target: Llama) -> None:
        """Turn random weights into a start for training: where a head can,
        the newest feature passes through, so that the first guess for the
        next token's successor is what the target said before it."""

    def truncate(self, count: int) -> Head:
        """Keep the ``count`` most frequent words (FR-Spec, Zhao et al.
        2025, 2502.14856): a cheaper head, and still any head's law.

        Raises:
            ValueError: ``count`` outside 1 .. number of words.
        """
        if not 1 <= count <= len(self.words):
            raise ValueError(
                f"vocab must be in [1, {len(self.words)}], got {count}"
            )
        self.words = self.words[:count].clone()
        self.head.weight = nn.Parameter(
            self.head.weight.detach()[:count].clone(), requires_grad=False
        )
        self.head._packed = None
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """What is the head's own, by name: trained and saved."""
        theirs = ("embed.",) if self.own_head else ("embed.", "head.")
        named = self.named_parameters()
        return {n: w for n, w in named if not n.startswith(theirs)}

    def pack(self) -> Head:
        """Lay every weight out once for this CPU (inference only)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        return self


def after(tokens: Tensor, shift: int) -> Tensor:
    """``tokens`` ``[B, n]`` read ``shift`` places later, zeros at the end."""
    if shift == 0:
        return tokens
    out = torch.zeros_like(tokens)
    out[:, :-shift] = tokens[:, shift:]
    return out
