"""Weights: families from disk, files that do not fit, drafts, precision.

`tests/test_lm.py` compares `Llama` with transformers; here are the ways in
which a file can be wrong, each answered by one sentence that says how.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_files
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import specref
from specref.lm import Llama, Table
from specref.lm.drafts import (
    load_draft,
    quantized_copy,
    resolve,
    save_draft,
    skeleton,
)
from specref.lm.linear import Linear
from specref.lm.weights import config_from_hf, from_folder

IDS = torch.arange(40).reshape(2, 20) * 7 % tiny.SIZES["vocab_size"]
QKV = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family as transformers writes it."""
    made = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny.hf_model(family).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a model folder, to damage."""
    return Path(shutil.copytree(folders("llama"), tmp_path / "model"))


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_state(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def fails(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_folder(folder)
    assert "\n" not in str(caught.value)


# Families and layouts on disk


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_loads_from_disk(folders, family):
    live = tiny.llama(family)
    disk = from_folder(folders(family), torch.float64)
    assert disk.config == live.config
    with torch.inference_mode():
        assert torch.equal(disk(IDS).logits, live(IDS).logits)


def test_shards_are_read_by_their_index(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(state), {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: state[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    # Some repositories keep the same weights once more under other names.
    other = {"layers.0.attention.wk.weight": torch.zeros(2, 2)}
    save_file(other, folder / "consolidated.safetensors")
    live = tiny.llama()
    disk = from_folder(folder, torch.float64)
    with torch.inference_mode():
        assert torch.equal(disk(IDS).logits, live(IDS).logits)
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, r"model-00002-of-00002.safetensors of model.safe.* is not")


# Files that do not fit


def test_missing_and_broken_files_are_named(folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    good = weights.read_bytes()
    for bad in (good[:-8], good[:100], b"", good[:8] + b"x" + good[9:]):
        weights.write_bytes(bad)
        fails(folder, "file model.safetensors is truncated or altered")
    weights.unlink()
    fails(folder, r"no \*.safetensors file in")
    config.write_text("{")
    fails(folder, "config.json in .* is no JSON")
    config.unlink()
    fails(folder, "no config.json in")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(QKV), f"lack tensor '{QKV}'"),
        (lambda s: s.pop("model.norm.weight"), "lack tensor 'norm.weight'"),
        (lambda s: s.pop("lm_head.weight"), "lack tensor 'head.weight'"),
        (
            lambda s: s.update({"model.layers.0.extra": torch.zeros(1)}),
            "unknown tensor 'model.layers.0.extra'",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.zeros(31)}),
            r"'norm.weight' must have shape \(32,\), got \(31,\)",
        ),
        (
            lambda s: s.update({QKV: s[QKV][:-1]}),
            r"'layers.1.qkv.weight' must have shape \(64, 32\), got \(63, 32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    change_state(folder, change)
    fails(folder, message)


def test_layers_that_config_and_weights_disagree_on_are_named(folder):
    change_config(folder, num_hidden_layers=4)
    fails(folder, "lack tensor 'model.layers.3.self_attn.q_proj.weight'")
    change_config(folder, num_hidden_layers=2)
    fails(folder, "unknown tensor 'model.layers.2")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type must be one of"),
        ("llama", {"model_type": None}, "model_type must be one of"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling must be of type .* got 'yarn'",
        ),
        (  # carries no "factor": must not be taken for unscaled
            "llama",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_scaling must be of type .* got 'longrope'",
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layers must all have the sliding window or none",
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": None,
                "max_window_layers": 2,
            },
            "layers must all have the sliding window or none",
        ),
    ],
)
def test_what_llama_lacks_is_refused(folders, family, fields, message):
    raw = json.loads((folders(family) / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        config_from_hf({**raw, **fields})


def test_a_config_without_a_size_names_it(folders):
    raw = json.loads((folders("llama") / "config.json").read_text())
    del raw["intermediate_size"]
    with pytest.raises(ValueError, match="config lacks 'intermediate_size'"):
        config_from_hf(raw)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_weights_are_an_error_not_text(folder, temperature):
    def spoil(state):
        state["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan

    change_state(folder, spoil)
    lm = from_folder(folder, torch.float64)
    with pytest.raises(ValueError, match="logits of row 0 are NaN"):
        specref.generate(
            lm,
            [1, 2, 3],
            "autoregressive",
            temperature=temperature,
            max_new_tokens=8,
        )


# Drafts


def small_draft(target: Llama) -> Llama:
    """The target's first and last layer under a head of 9 tokens."""
    config = replace(target.config, num_hidden_layers=2)
    words = torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 22])
    draft = skeleton(config, words, target)
    for mine, i in zip(draft.layers, (0, 2), strict=True):
        mine.load_state_dict(target.layers[i].state_dict())
    draft.norm.load_state_dict(target.norm.state_dict())
    return draft


@pytest.fixture
def draft_file(tmp_path):
    target = tiny.llama()
    file = tmp_path / "draft.safetensors"
    save_draft(small_draft(target), file, about={"made by": "a test"})
    return file, target


def rewrite(file: Path, change) -> None:
    with safe_open(file, "pt") as f:
        meta = f.metadata()
        state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    change(state, meta)
    save_file(state, file, meta)


@pytest.mark.parametrize("shared", [(), (0,)])
def test_a_draft_comes_back_from_its_file(tmp_path, shared):
    target, file = tiny.llama(), tmp_path / "draft.safetensors"
    draft = small_draft(target)
    save_draft(draft, file, shared)
    back = load_draft(file, target)
    assert (back.eos, back.device, back.dtype) == (
        target.eos,
        target.device,
        target.dtype,
    )
    assert back.embed.weight is target.embed.weight
    with safe_open(file, "pt") as f:
        held = set(f.keys())
    assert any(n.startswith("layers.0.") for n in held) == (not shared)
    with torch.inference_mode():
        got, want = back(IDS).logits, draft(IDS).logits
    fits = want.isfinite()
    assert torch.equal(got.isfinite(), fits)
    # Stored in bf16: three significant digits.
    scale = float(want[fits].abs().max())
    assert float((got - want)[fits].abs().max()) < 0.05 * scale
    assert resolve(str(file), target).vocab_size == target.vocab_size


def test_broken_draft_files_are_named(draft_file):
    file, target = draft_file
    good = file.read_bytes()
    for bad in (good[:-4], good[:50], b""):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="draft.safetensors is truncated"):
            load_draft(file, target)
    file.unlink()
    with pytest.raises(ValueError, match="draft.safetensors does not exist"):
        load_draft(file, target)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="holds no draft config"):
        load_draft(file, target)


def drop(name):
    return lambda state, meta: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("head_vocab"), "lacks tensor 'head_vocab'"),
        (drop("norm.weight"), "lack tensor 'norm.weight'"),
        (
            lambda s, m: s.update({"layers.9.o.weight": torch.zeros(2)}),
            "unknown tensor 'layers.9.o.weight'",
        ),
        (
            lambda s, m: s.update({"norm.weight": torch.zeros(7)}),
            r"'norm.weight' must have shape \(32,\), got \(7,\)",
        ),
        (
            lambda s, m: s.update({"head_vocab": torch.tensor([3, 23])}),
            r"head_vocab of draft.safetensors must .* in \[0, 23\)",
        ),
        (
            lambda s, m: m.update({"config": "{}"}),
            "draft.safetensors holds a draft config that does not fit",
        ),
        (
            lambda s, m: m.update({"shared": "[7]"}),
            "shares layer 7 .* has 3 layers",
        ),
    ],
)
def test_drafts_that_do_not_fit_say_how(draft_file, change, message):
    file, target = draft_file
    rewrite(file, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_draft(file, target)
    assert "\n" not in str(caught.value)


def test_a_draft_of_another_target_is_refused(draft_file):
    file, _ = draft_file
    for changes in ({"vocab_size": 24}, {"hidden_size": 64}):
        name = next(iter(changes))
        with pytest.raises(ValueError, match=f"has {name} .* another target"):
            load_draft(file, tiny.llama(**changes))


def test_an_interrupted_save_leaves_no_draft(tmp_path, monkeypatch):
    def interrupted(state, part, meta):
        Path(part).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    file = tmp_path / "draft.safetensors"
    with pytest.raises(KeyboardInterrupt):
        save_draft(small_draft(tiny.llama()), file)
    assert not file.exists()


def test_what_is_no_draft_is_refused():
    target = tiny.llama()
    with pytest.raises(ValueError, match="unknown draft 'int2': give one of"):
        resolve("int2", target)
    with pytest.raises(ValueError, match="vocabulary 24 differs from target"):
        resolve(tiny.llama(vocab_size=24), target)
    with pytest.raises(TypeError, match="target must be what specref.load"):
        resolve(3, target)
    table = Table(lambda context: [0.5, 0.5], 2)
    with pytest.raises(TypeError, match="needs a specref Llama as target"):
        quantized_copy(table)
    with torch.device("meta"):
        far = Llama(target.config)
    with pytest.raises(ValueError, match="use CPU kernels; .* is on meta"):
        quantized_copy(far, 8)


# Precision


def test_bfloat16_weights_decode(tmp_path):
    folder = tiny_files.write_folder(tmp_path / "model")
    loaded = specref.load(str(folder), dtype=torch.bfloat16)
    assert loaded.lm.dtype == torch.bfloat16
    for method, temperature in (
        ("autoregressive", 0.0),
        ("int8", 1.0),
        ("early_exit", 0.7),
    ):
        extra = {"layers": 2} if method == "early_exit" else {}
        report = specref.generate(
            loaded,
            "the bee",
            method,
            temperature=temperature,
            max_new_tokens=12,
            eos=[],
            **extra,
        )
        assert len(report.tokens) == 12


def test_the_real_model_packed_and_unpacked(real, monkeypatch):
    """Packing changes the order of sums, nothing else."""
    ids = torch.tensor([real.encode("Why do cats purr?")])
    with torch.inference_mode():
        packed = real.lm(ids).logits
        monkeypatch.setattr(
            Linear, "forward", lambda m, x: F.linear(x, m.weight, m.bias)
        )
        unpacked = real.lm(ids).logits
    assert float((packed - unpacked).abs().max()) < 1e-3
    assert torch.equal(packed.argmax(-1), unpacked.argmax(-1))


def test_the_real_model_in_bfloat16_says_much_the_same(real):
    """Loaded in bfloat16: laws within a few percent of those in float32."""
    ids = torch.tensor([real.encode("Why do cats purr?")])
    half = specref.load(dtype=torch.bfloat16).lm
    with torch.inference_mode():
        want = real.lm(ids).logits[0].softmax(-1)
        got = half(ids).logits[0].float().softmax(-1)
    apart = 0.5 * (want - got).abs().sum(-1)
    assert float(apart.mean()) < 0.05
