"""Which of the target's layers a draft should start from.

Layers are taken out one at a time, each time the one without which the
law moves least: mean KL(p, q) over the positions of a small corpus.
Greedy, so not the best subset of its size, but far better than every n-th.

Does not handle: models whose layers differ in kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specref.lm.llama import Attend, Llama


@torch.inference_mode()
def prune(
    target: Llama, tokens: Tensor, keep: int, vocab: int = 8_192
) -> list[tuple[list[int], float]]:
    """Take layers out until ``keep`` are left.

    Args:
        tokens: ``[B, n]`` rows of text, no padding.
        vocab: compare laws over the first (most common) ids only.
    Returns:
        after each removal, the layers left and the KL in nats.
    Raises:
        ValueError: ``keep`` outside 1 .. number of layers.
    """
    left = list(range(target.config.num_hidden_layers))
    if not 1 <= keep <= len(left):
        raise ValueError(f"keep must be in [1, {len(left)}], got {keep}")
    x, cos, sin, allowed = target.begin(tokens, None, None)
    at = Attend(cos, sin, allowed, None)
    head = target.head.weight[:vocab]

    def run(x: Tensor, layers: list[int]) -> Tensor:
        for i in layers:
            x = target.layers[i](x, at)
        return F.linear(target.norm(x), head).log_softmax(-1)

    truth = run(x, left)
    p, out = truth.exp(), []
    while len(left) > keep:
        above, scores = x, []
        for spot, layer in enumerate(left):
            rest = run(above, left[spot + 1 :])
            kl = float((p * (truth - rest)).sum(-1).mean())
            scores.append((kl, layer))
            above = target.layers[layer](above, at)
        kl, worst = min(scores)
        left = [i for i in left if i != worst]
        out.append((left, kl))
    return out
