"""specref: the reference for speculative decoding.

Every method is a drafter and an acceptance rule around one decode loop.
Names load on first use, so that ``specref.theory`` needs numpy only.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = ("theory", "lm", "rules", "draft", "train", "plots")
_NAMES = {
    "generate": "specref.api",
    "stream": "specref.api",
    "Report": "specref.api",
    "Round": "specref.decode",
    "load": "specref.lm.zoo",
    "law": "specref.laws",
    "total_variation": "specref.laws",
    "methods": "specref.registry",
    "Seeded": "specref.draws",
    "Enumerate": "specref.draws",
    "Recorded": "specref.draws",
    "Tree": "specref.tree",
    "Warp": "specref.warp",
    "custom_generate": "specref.hf_generate",
}
__all__ = ["__version__", *_SUBMODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"specref.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'specref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
