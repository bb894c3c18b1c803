"""Published head checkpoints in, and heads trained here out."""

from specref.interchange.export import export_head
from specref.interchange.load import LAYOUTS, load_head

__all__ = ["LAYOUTS", "export_head", "load_head"]
