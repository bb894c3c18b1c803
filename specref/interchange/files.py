"""Reading and writing checkpoint folders: config.json and weights.

Pickled files are opened with ``weights_only``: they may hold tensors and
nothing that runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specref.lm.weights import read_safetensors

# What a folder may call its weights; the first that exists is read.
STEMS = ("model", "medusa_lm_head", "hydra_lm_head")
FILES = (
    "model.safetensors.index.json",
    *(f"{stem}.safetensors" for stem in STEMS),
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    *(f"{stem}.pt" for stem in STEMS),
)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and all tensors of a checkpoint.

    Args:
        path: a folder, or its weight file.
    Raises:
        ValueError: no config.json, no weights, or a file that holds
            something else.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    if not config.exists():
        raise ValueError(
            f"no config.json in {folder}: a checkpoint is a folder with "
            "config.json and weights"
        )
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is no JSON ({error})") from error
    return raw, _weights(path if path.is_file() else _find(folder))


def _find(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    loose = sorted(
        f
        for end in ("safetensors", "bin", "pt")
        for f in folder.glob(f"*.{end}")
    )
    if len(loose) != 1:
        raise ValueError(
            f"weights in {folder} must be one of {', '.join(FILES)}, or the "
            f"only such file, got {[f.name for f in loose]}"
        )
    return loose[0]


def _weights(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise ValueError(f"weight file {file} does not exist")
    if file.name == "model.safetensors.index.json":
        return read_safetensors(file.parent)
    if file.name.endswith(".index.json"):
        parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        out: dict[str, Tensor] = {}
        for part in sorted(set(parts.values())):
            out |= _weights(file.parent / part)
        return out
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if file.suffix in (".bin", ".pt", ".pth"):
        return _pickled(file)
    raise ValueError(
        f"weight file must be .safetensors, .bin or .pt, got {file.name}"
    )


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"weight file {file.name} is truncated or altered ({error})"
        ) from error


def _pickled(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        text = str(error).strip().splitlines()
        raise ValueError(
            f"weight file {file.name} must hold tensors only and be whole: "
            f"{text[0] if text else 'it ends too early'}"
        ) from error
    good = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not good:
        raise ValueError(
            f"weight file {file.name} must hold tensors by name, got "
            f"{type(state).__name__}"
        )
    return dict(state)


def write(
    folder: str | Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str = "model.safetensors",
) -> Path:
    """Write config.json and weights; returns the folder."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    part = folder / f"{name}.part"
    whole = {k: v.cpu().contiguous() for k, v in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(whole, part, {"format": "pt"})
    else:
        torch.save(whole, part)
    part.rename(folder / name)
    return folder
