"""Features of more layers: what EAGLE-3 and GLIDE read of the target.

`specref.train.respond` stores the features after the last norm, which cost
nothing while a response is generated.  Those of the layers below come from
one forward over each stored text and lie beside its shard, position for
position.

Does not handle: choosing layers; see the heads that use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from specref.lm.llama import Llama


def tap_file(shard: Path) -> Path:
    """The file with the taps of a shard of responses."""
    return shard.with_name(shard.name.replace("responses", "taps"))


def add_taps(
    lm: Llama, folder: Path, layers: Sequence[int], size: int = 2_048
) -> None:
    """Write ``taps-*.safetensors`` for every shard that lacks one.

    Args:
        layers: taps in the convention of `Output.taps`: the residual
            stream that enters a layer.
        size: token positions of one forward.
    Raises:
        FileNotFoundError: no shard there.
    """
    files = sorted(folder.glob("responses-*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no responses in {folder}: make them with `specref train "
            "responses`"
        )
    for file in tqdm(files, unit="shard", disable=None):
        if not tap_file(file).exists():
            _tap(lm, file, list(layers), size)


@torch.inference_mode()
def _tap(lm: Llama, file: Path, layers: list[int], size: int) -> None:
    from safetensors.torch import load_file, save_file

    t = load_file(file)
    m, n = t["prompt_len"].tolist(), t["length"].tolist()
    parts = zip(t["prompt"].split(m), t["tokens"].split(n), strict=True)
    rows = [torch.cat(pair).long()[:-1] for pair in parts]
    start = torch.tensor([0, *map(len, rows)]).cumsum(0)
    width = lm.config.hidden_size
    out = torch.empty(
        int(start[-1]), len(layers), width, dtype=torch.float16
    )
    for group in _groups(rows, size):
        most = max(len(rows[i]) for i in group)
        tokens = torch.zeros(len(group), most, dtype=torch.long)
        for b, i in enumerate(group):
            tokens[b, : len(rows[i])] = rows[i]
        taps = lm.forward(tokens, taps=layers, logits=False).taps
        for b, i in enumerate(group):
            at = out[start[i] : start[i + 1]]
            for j, tap in enumerate(taps):
                at[:, j] = tap[b, : len(rows[i])].half()
    part = tap_file(file).with_suffix(".part")
    save_file({"taps": out, "layers": torch.tensor(layers)}, part)
    part.rename(tap_file(file))


def _groups(rows: Sequence[Tensor], size: int) -> list[list[int]]:
    """Rows of similar length, about ``size`` positions together."""
    out: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if not out or (len(out[-1]) + 1) * len(rows[i]) > size:
            out.append([])
        out[-1].append(i)
    return out
