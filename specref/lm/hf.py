"""`HF`: any transformers causal language model behind the `LM` protocol.

The model runs unchanged, with its own modelling code and a `DynamicCache`;
trees are 4D attention masks and position ids.  Every layer keeps its full
keys and values and sliding windows are part of the mask, so that any state
can be rolled back.

Does not handle: recurrent or chunked state (refused), encoder-decoders,
ALiBi positions, flash attention (takes no 4D mask).  Needs transformers
4.57 or later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specref.lm.base import Output, Path
from specref.lm.hf_checks import (
    FULL,
    SLIDING,
    check,
    eos_of,
    text_config,
    windows,
)
from specref.lm.pending import Pending, within


class HFCache(Pending):
    """A `DynamicCache` with per-row lengths.

    Row ``b`` keeps its committed tokens in slots ``0 .. length[b] - 1``;
    pending nodes of all rows start behind the longest one, because that is
    where a `DynamicCache` appends.  Slots between are masked.

    Args:
        pad: per row, leading tokens that are padding: nobody sees them and
            positions start behind them.  None for no padding.
    """

    def __init__(
        self, batch: int, capacity: int, pad: Sequence[int] | None = None
    ) -> None:
        from transformers import DynamicCache

        super().__init__(batch, capacity)
        if pad is not None and len(pad) != batch:
            raise ValueError(
                f"pad must have one entry per row ({batch}), got {len(pad)}"
            )
        self.pad = list(pad) if pad is not None and any(pad) else None
        # Without a config every layer is a full one, also where the model
        # would drop what is behind a sliding window.
        self.kv = DynamicCache()

    def layers(self) -> list[Any]:
        """The layers that hold keys and values so far."""
        layers = self.kv.layers
        return [x for x in layers if getattr(x, "keys", None) is not None]

    def keep(self, path: Path | None = None) -> None:
        """See `Cache.keep`."""
        rows = self.chosen(path)
        first = max(self.length)
        news = [n + len(r) for n, r in zip(self.length, rows, strict=True)]
        width = max(news)
        if self.even and all(r == list(range(len(r))) for r in rows):
            self._crop(width)
        else:
            source = [
                # Beyond its end a row repeats slot 0: masked, never read.
                ([*range(n), *(first + i for i in row)] + [0] * width)[:width]
                for n, row in zip(self.length, rows, strict=True)
            ]
            self._gather(source)
        self.advance(rows)

    def _crop(self, width: int) -> None:
        for layer in self.layers():
            layer.keys = layer.keys[:, :, :width]
            layer.values = layer.values[:, :, :width]

    def _gather(self, source: list[list[int]]) -> None:
        """Slot ``j`` of row ``b`` becomes what slot ``source[b][j]`` was."""
        for layer in self.layers():
            index = torch.tensor(source, device=layer.keys.device)
            index = index[:, None, :, None]
            for name in ("keys", "values"):
                old = getattr(layer, name)
                wide = index.expand(-1, old.shape[1], -1, old.shape[3])
                setattr(layer, name, old.gather(2, wide))

    def truncate(self, length: Sequence[int]) -> None:
        """See `Cache.truncate`."""
        self.retreat(length)
        self._crop(max(self.length))


class HF:
    """A transformers causal language model as an `LM`.

    Args:
        model: in evaluation mode; attention "sdpa" or "eager".
        vocab_size: width of the logits, the model's own by default.  A
            smaller number cuts the padding of the head off, so that ids
            beyond the tokenizer are never drafted or sampled; a larger one
            (a draft whose head is padded less than the target's) gives the
            extra ids probability zero and reads them as token 0.
    Raises:
        TypeError: not a causal language model.
        ValueError: a model whose state cannot follow a tree or be rolled
            back; the message says what it is.
    """

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        self.model = model
        self.config = text_config(model)
        self._arguments = check(model, self.config)
        self.own_vocab_size = self.config.vocab_size
        self.vocab_size = vocab_size or self.own_vocab_size
        self.window, self._types = windows(self.config)
        self.max_positions = getattr(
            self.config, "max_position_embeddings", None
        )
        self.eos = eos_of(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def new_cache(
        self, batch: int, capacity: int, pad: Sequence[int] | None = None
    ) -> HFCache:
        """See `LM.new_cache`; ``pad`` as in `HFCache`."""
        return HFCache(batch, capacity, pad)

    def forward(
        self,
        tokens: Tensor,
        cache: HFCache,
        parents: Tensor | None = None,
        taps: Sequence[int] = (),
        logits: bool = True,
    ) -> Output:
        """See `LM.forward`.  Logits of half-precision models are widened
        to float32, as transformers does before it samples."""
        cache.admit(tokens, parents)
        n = tokens.shape[1]
        where, mask = self._view(n, cache, tokens.device)
        if self.vocab_size > self.own_vocab_size:
            tokens = tokens.masked_fill(tokens >= self.own_vocab_size, 0)
        ask = {"logits_to_keep": 1} if not logits else {}
        end = self.config.num_hidden_layers
        with _LastStream(self.model, end in taps) as last:
            out = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=where,
                use_cache=True,
                return_dict=True,
                output_hidden_states=True,
                **{self._arguments["cache"]: cache.kv},
                **{k: v for k, v in ask.items() if k in self._arguments},
            )
        cache.pending += n
        states = [*out.hidden_states[:-1], last.value]
        kept = tuple(states[t] for t in taps)
        scores = self._widen(out.logits) if logits else None
        return Output(scores, out.hidden_states[-1], kept)

    __call__ = forward

    def _view(
        self, n: int, cache: HFCache, device: torch.device
    ) -> tuple[Tensor, Any]:
        """Positions ``[B, n]`` and the mask argument of the model."""
        batch, used = len(cache.length), max(cache.length) + cache.pending
        simple = cache.even and cache._parents is None and cache.pad is None
        if simple and self.window is None:
            where = torch.arange(used, used + n, device=device)
            return where.expand(batch, n), None
        first = torch.full((batch, 1), max(cache.length), device=device)
        where, at, allowed = cache.look(n, first, used + n)
        if cache.pad is not None:
            pad = torch.tensor(cache.pad, device=device).unsqueeze(1)
            slot = torch.arange(used + n, device=device)
            own = slot == slot[used:, None]  # a padding node sees itself
            allowed = (allowed & (slot >= pad).unsqueeze(1)) | own
            where = (where - pad).clamp(min=0)
            at = at - pad
        full = self._additive(allowed)
        if self.window is None:
            return where, full
        near = self._additive(within(allowed, where, at, self.window))
        if self._types == {FULL, SLIDING}:
            return where, {FULL: full, SLIDING: near}
        return where, near

    def _additive(self, allowed: Tensor) -> Tensor:
        """``[B, 1, n, span]``: 0 where allowed, the lowest number else."""
        low = torch.finfo(self.dtype).min
        shape, device = allowed.shape, allowed.device
        out = torch.zeros(shape, dtype=self.dtype, device=device)
        return out.masked_fill_(~allowed, low).unsqueeze(1)

    def _widen(self, logits: Tensor) -> Tensor:
        """``[B, n, vocab_size]`` from the model's own width."""
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        more = self.vocab_size - logits.shape[-1]
        if more <= 0:
            return logits[..., : self.vocab_size]
        return torch.nn.functional.pad(logits, (0, more), value=-torch.inf)


class _LastStream:
    """Catches the stream before the final norm, which transformers does
    not return, by a forward hook for the time of one call."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self.value: Tensor | None = None
        self._layer = _last_layer(model) if wanted else None

    def __enter__(self) -> _LastStream:
        if self._layer is not None:
            self._hook = self._layer.register_forward_hook(self._catch)
        return self

    def _catch(self, module: Any, inputs: Any, out: Any) -> None:
        self.value = out[0] if isinstance(out, tuple) else out

    def __exit__(self, *error: Any) -> None:
        if self._layer is not None:
            self._hook.remove()


def _last_layer(model: Any) -> Any:
    for name in ("layers", "h"):
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)[-1]
    raise ValueError(
        f"the last tap of {type(model).__name__} is not available: its "
        "layers were not found; tap earlier layers"
    )
