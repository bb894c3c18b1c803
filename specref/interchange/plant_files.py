"""A planted target and head on disk, to try an engine with.

What is written is what any engine loads: a Llama target and a head in a
published layout.  Whatever prompt of token ids it is given, its acceptance
must be 1 at every depth.

Does not handle: a tokenizer (there is none: prompts are token ids).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from specref.heads.base import Head
from specref.interchange import plant_heads
from specref.interchange.export import export_head
from specref.interchange.plant import World
from specref.lm.export import to_transformers

# Layout -> the order of its world, and the head.
PLANTED: dict[str, tuple[int, Callable[[World], Head]]] = {
    "eagle": (4, plant_heads.eagle),
    "eagle3": (4, plant_heads.eagle3),
    "speculators": (4, plant_heads.eagle3),
    "medusa": (1, plant_heads.medusa),
    "medusa-vllm": (1, plant_heads.medusa),
}


def write_planted(folder: str | Path, layout: str = "eagle3") -> World:
    """Write ``target`` and ``head`` under a folder; returns their world.

    Raises:
        ValueError: a layout that no planted head has.
    """
    if layout not in PLANTED:
        raise ValueError(
            f"layout must be one of {', '.join(PLANTED)}, got {layout!r}"
        )
    order, plant = PLANTED[layout]
    folder, world = Path(folder), World(order=order)
    where = folder / "target"
    to_transformers(world.target).save_pretrained(where)
    head = plant(world)
    export_head(head, world.target, folder / "head", layout, None, str(where))
    return world
