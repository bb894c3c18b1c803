"""``specref export``: a head by name or file, written for an engine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from specref.heads.base import Head
from specref.heads.files import resolve_head
from specref.interchange.export import export_head
from specref.lm.wrap import unwrap

# The layout that most engines read, by kind of head.
USUAL = {"Eagle": "eagle", "Eagle3": "speculators", "Medusa": "medusa-vllm"}


def usual_layout(head: Head) -> str:
    """The layout to write when none is asked for.

    Raises:
        ValueError: a head that no layout holds.
    """
    kind = type(head).__name__
    if kind not in USUAL:
        raise ValueError(
            f"heads that can be exported are {', '.join(USUAL)}, got {kind}"
        )
    return USUAL[kind]


def main(args: argparse.Namespace, target: Any) -> None:
    """Resolve the head, write the folder, say what was written."""
    lm, _ = unwrap(target)
    head = resolve_head(args.head, lm)
    layout = args.layout or usual_layout(head)
    folder = export_head(
        head,
        lm,
        args.to,
        layout,
        dtype=lm.dtype,
        verifier=args.verifier,
        draft_tokens=args.draft_tokens,
    )
    files = sorted(f.name for f in folder.iterdir())
    if args.json:
        row = {"layout": layout, "folder": str(folder), "files": files}
        print(json.dumps(row))
        return
    print(f"{layout}: {', '.join(files)} in {folder}")
