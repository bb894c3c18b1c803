"""Language models behind one protocol: `Table`, `Llama`, `HF`."""

from specref.lm.base import LM, Output
from specref.lm.hf import HF
from specref.lm.llama import Llama, LlamaConfig
from specref.lm.table import Table

__all__ = ["HF", "LM", "Llama", "LlamaConfig", "Output", "Table"]
