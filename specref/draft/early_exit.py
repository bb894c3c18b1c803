"""Early exit: the target's own first layers as the draft.

`EarlyExit` is the model cut after ``layers`` layers, with the target's norm
and head and a cache of that depth; `ModelDrafter` drafts with it as with
any other.  Useful when the model was trained for it (LayerSkip, Elhoushi et
al. 2024, 2404.16710); on one that was not, its proposals are poor but the
output is exact all the same.

Does not handle: sharing the first layers' cache with the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specref.lm.base import Output
from specref.lm.cache import StaticCache
from specref.lm.llama import Llama


class EarlyExit:
    """The first ``layers`` layers of a `Llama`, as an `LM`.

    Raises:
        TypeError: the target is no `Llama`.
        ValueError: ``layers`` outside 1 .. all but one.
    """

    def __init__(self, lm: Llama, layers: int) -> None:
        if not isinstance(lm, Llama):
            raise TypeError(
                "early exit needs a specref Llama as target, got "
                f"{type(lm).__name__}"
            )
        most = lm.config.num_hidden_layers - 1
        if not 1 <= layers <= most:
            raise ValueError(f"layers must be in [1, {most}], got {layers}")
        self.lm, self.layers = lm, layers
        self.vocab_size, self.eos = lm.vocab_size, lm.eos
        self.config = replace(lm.config, num_hidden_layers=layers)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        lm = self.lm
        return StaticCache(self.config, batch, capacity, lm.device, lm.dtype)

    def forward(
        self,
        tokens: Tensor,
        cache: StaticCache,
        parents: Tensor | None = None,
        taps: Sequence[int] = (),
        logits: bool = True,
    ) -> Output:
        """See `LM.forward`."""
        return self.lm.forward(
            tokens, cache, parents, taps, logits, layers=self.layers
        )
