"""Heads trained here, written for engines and read back.

The key sets are what the engines' loaders ask for, written down from their
code; the ``speculators`` package itself is run where it is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from specref.heads.base import Head, Text
from specref.heads.eagle import Eagle
from specref.heads.eagle3 import Eagle3
from specref.heads.medusa import Medusa
from specref.heads.mtp import MTP
from specref.interchange import export_head, files, load_head
from specref.interchange.export import layer_fields
from specref.lm.llama import Llama

LAYERS = 6
WORDS = torch.tensor([9, 1, 22, 4, 5, 17])  # by frequency
EVERY = torch.tensor([*range(12, 23), *range(12)])


@pytest.fixture(scope="module")
def target() -> Llama:
    return tiny.llama("llama", 1, num_hidden_layers=LAYERS)


def trained(head: Head, seed: int = 3) -> Head:
    """Random weights, norms and biases too, but the target's own parts."""
    source = torch.Generator().manual_seed(seed)
    head = head.double().requires_grad_(False).eval()
    own = [*head.trained().values()]
    for weight in own:
        noise = torch.randn(
            weight.shape, generator=source, dtype=torch.float64
        )
        weight.add_(0.2 * noise)
    return head


def text(lm: Llama, head: Head) -> Text:
    source = torch.Generator().manual_seed(5)
    tokens = torch.randint(lm.vocab_size, (2, 12), generator=source)
    with torch.no_grad():
        out = lm.forward(tokens, taps=head.taps)
    return Text(tokens, out.hidden[:, :-1], tuple(t[:, :-1] for t in out.taps))


def ordered(head: Head) -> Head:
    """The head with its words, and the rows for them, by token id, as
    files have them: a matrix product may round a moved row otherwise."""
    order = head.words.argsort()
    head.words = head.words[order]
    many = getattr(head, "outputs", None) or [head.head]
    for output in many:
        output.weight.data = output.weight.data[order]
    return head


def logits(lm: Llama, head: Head, depth: int = 3) -> list[Tensor]:
    with torch.no_grad():
        out = head.rollout(text(lm, head), depth)
        return [head.logits(x, s) for s, x in enumerate(out)]


FLAGS = [
    {},
    {"taps": (0, 3, 6)},
    {"norm_before_fc": True},
    {"fc_norm": True, "norm_before_residual": True},
    {"layers": 3},
]
ROUND_TRIPS = [
    ("eagle", lambda lm: Eagle(lm, torch.arange(23))),
    ("eagle", lambda lm: Eagle(lm, torch.arange(23), layers=2, bias=False)),
    ("eagle", lambda lm: Eagle(lm, torch.arange(23), norms=True)),
    ("eagle", lambda lm: Eagle(lm, WORDS)),
    *[("eagle3", lambda lm, f=f: Eagle3(lm, WORDS, **f)) for f in FLAGS],
    ("eagle3", lambda lm: Eagle3(lm, WORDS, bias=True)),
    ("eagle3", lambda lm: Eagle3(lm, EVERY)),
    *[("speculators", lambda lm, f=f: Eagle3(lm, WORDS, **f)) for f in FLAGS],
    ("speculators", lambda lm: Eagle3(lm, WORDS, norm_output=True)),
    ("speculators", lambda lm: Eagle3(lm, EVERY, taps=(1, 2, 6))),
    ("medusa", lambda lm: Medusa(lm, EVERY, own_head=True)),
    ("medusa", lambda lm: Medusa(lm, torch.arange(23), blocks=2)),
    ("medusa-vllm", lambda lm: Medusa(lm, WORDS, own_head=True)),
    ("medusa-vllm", lambda lm: Medusa(lm, WORDS, blocks=2)),
    ("medusa-vllm", lambda lm: Medusa(lm, EVERY)),
]


@pytest.mark.parametrize("number", range(len(ROUND_TRIPS)))
def test_what_is_written_reads_back_bit_for_bit(number, target, tmp_path):
    layout, make = ROUND_TRIPS[number]
    head = trained(make(target))
    export_head(head, target, tmp_path, layout)
    back = load_head(tmp_path, target)
    assert back.taps == head.taps
    assert sorted(back.words.tolist()) == sorted(head.words.tolist())
    near, theirs = logits(target, head), logits(target, back)
    for a, b in zip(near, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0.0, atol=1e-12)
    if "token_map" not in files.read(tmp_path)[1]:
        head = ordered(head)
    mine = logits(target, head)
    for s, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(a, b), (s, float((a - b).nan_to_num().abs().max()))
    # And once more: writing what was read changes no byte.
    export_head(back, target, tmp_path / "again", layout)
    for file in tmp_path.iterdir():
        if file.suffix in (".safetensors", ".json"):
            twin = tmp_path / "again" / file.name
            assert twin.read_bytes() == file.read_bytes(), file.name


def test_a_rounded_copy_stays_close(target, tmp_path):
    head = trained(Eagle3(target, WORDS))
    export_head(head, target, tmp_path, "eagle3", dtype=torch.bfloat16)
    state = load_file(tmp_path / "model.safetensors")
    assert state["fc.weight"].dtype == torch.bfloat16
    assert state["d2t"].dtype == torch.int64
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16"
    got = load_head(tmp_path, target).fc.weight
    assert torch.equal(got, head.fc.weight.bfloat16().double())


def test_scales_are_folded_first(target, tmp_path):
    head = Eagle(target, torch.arange(23), scales=(7.5, 0.5))
    head = trained(head)
    want = logits(target, head)
    export_head(head, target, tmp_path, "eagle")
    got = logits(target, load_head(tmp_path, target))
    for a, b in zip(want, got, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_a_head_as_it_is_trained_is_merged_first(target, tmp_path):
    mixed = Eagle3(target, WORDS, mix=True, scales=(0.5, 2.0, 3.0))
    head = trained(mixed)
    want = logits(target, head)
    export_head(head, target, tmp_path, "speculators")
    got = logits(target, load_head(tmp_path, target))
    for a, b in zip(want, got, strict=True):
        gap = (a - b).nan_to_num(0.0, 0.0, 0.0).abs().max()
        assert gap < 1e-10


def test_mixed_medusa_outputs_become_one_matrix(target, tmp_path):
    head = trained(Medusa(target, WORDS, mix=True))
    want = logits(target, head)
    export_head(head, target, tmp_path, "medusa-vllm")
    got = logits(target, load_head(tmp_path, target))
    for a, b in zip(want, got, strict=True):
        gap = (a - b).nan_to_num(0.0, 0.0, 0.0).abs().max()
        assert gap < 1e-10


def test_layouts_refuse_what_they_cannot_hold(target, tmp_path):
    for head, layout, said in (
        (Eagle3(target, WORDS), "eagle9", "layout must be one of eagle"),
        (Eagle3(target, WORDS), "eagle", "type Eagle, got Eagle3"),
        (MTP(target, WORDS), "eagle3", "type Eagle3, got MTP"),
        (Medusa(target, WORDS), "medusa", "all 23 words, the head has 6"),
        (
            Medusa(target, EVERY, own_head=True, head_bias=True),
            "medusa",
            "no bias in the outputs",
        ),
        (Eagle3(target, WORDS, norm_output=True), "eagle3", "norm_output"),
        (Eagle3(target, WORDS, taps=(1, 2, 3)), "eagle3", "begin with 1"),
        (Eagle3(target, WORDS, bias=True), "speculators", "no bias in fc"),
    ):
        with pytest.raises(ValueError, match=said):
            export_head(head.double(), target, tmp_path, layout)
    assert not list(tmp_path.iterdir())


def test_qwen_layers_are_described(tmp_path):
    two = tiny.llama("qwen2", 1, num_hidden_layers=LAYERS)
    with pytest.raises(ValueError, match="query, key and value only"):
        export_head(Eagle3(two, WORDS).double(), two, tmp_path, "eagle3")
    three = tiny.llama("qwen3", 1, num_hidden_layers=LAYERS)
    head = trained(Eagle3(three, WORDS))
    export_head(head, three, tmp_path, "eagle3")
    assert layer_fields(head.config)["model_type"] == "qwen3"
    head, back = ordered(head), load_head(tmp_path, three)
    for a, b in zip(logits(three, head), logits(three, back), strict=True):
        assert torch.equal(a, b)


# -- what engines ask for -------------------------------------------------

ATTENTION = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
MLP = [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
NORMS = ["input_layernorm.weight", "hidden_norm.weight"]
LAYER = [*ATTENTION, *MLP, "post_attention_layernorm.weight"]
ENDS = ("weight", "bias")
TOP = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}


KEYS = {
    "eagle3": {*TOP, *(f"midlayer.{n}" for n in [*LAYER, *NORMS])},
    "speculators": {
        *TOP,
        "embed_tokens.weight",
        *(f"layers.0.{n}" for n in [*LAYER, *NORMS]),
    },
    "eagle": {
        "fc.weight",
        "fc.bias",
        "embed_tokens.weight",
        *(f"layers.0.{n}" for n in LAYER),
    },
    "medusa-vllm": {
        "token_map",
        *(f"lm_heads.{i}.weight" for i in range(2)),
        *(f"blocks.{i}.layers.0.{e}" for i in range(2) for e in ENDS),
    },
    "medusa": {
        *(f"{i}.0.linear.{e}" for i in range(2) for e in ENDS),
        *(f"{i}.1.weight" for i in range(2)),
    },
}


@pytest.mark.parametrize("layout", KEYS)
def test_key_sets_are_the_engines(layout, target, tmp_path):
    every = torch.arange(23)
    head = {
        "eagle3": lambda: Eagle3(target, WORDS),
        "speculators": lambda: Eagle3(target, WORDS),
        "eagle": lambda: Eagle(target, every),
        "medusa-vllm": lambda: Medusa(target, WORDS, heads=2),
        "medusa": lambda: Medusa(target, every, heads=2, own_head=True),
    }[layout]()
    export_head(head.double(), target, tmp_path, layout)
    _, state = files.read(tmp_path)
    assert set(state) == KEYS[layout]


def test_vocabularies_are_sorted_and_given_as_offsets(target, tmp_path):
    head = trained(Eagle3(target, WORDS))
    export_head(head, target, tmp_path, "speculators")
    state = load_file(tmp_path / "model.safetensors")
    ids = sorted(WORDS.tolist())
    assert (state["d2t"] + torch.arange(6)).tolist() == ids
    assert state["d2t"].dtype == torch.int64
    assert state["t2d"].dtype == torch.bool
    assert state["t2d"].nonzero().squeeze(-1).tolist() == ids
    for row, token in enumerate(ids):
        mine = head.head.weight[WORDS.tolist().index(token)]
        assert torch.equal(state["lm_head.weight"][row], mine)


def test_configs_say_what_engines_read(target, tmp_path):
    head = trained(Eagle3(target, WORDS, norm_before_residual=True))
    export_head(
        head, target, tmp_path, "speculators", verifier="a/b", draft_tokens=5
    )
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["eagle_aux_hidden_state_layer_ids"] == [2, 3, 3]
    assert raw["norm_before_residual"] is True
    assert raw["draft_vocab_size"] == 6
    assert raw["transformer_layer_config"]["num_hidden_layers"] == 1
    method = raw["speculators_config"]
    assert method["verifier"]["name_or_path"] == "a/b"
    assert method["proposal_methods"][0]["speculative_tokens"] == 5
    export_head(head, target, tmp_path / "e", "eagle3")
    raw = json.loads((tmp_path / "e" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"]
    assert "eagle_aux_hidden_state_layer_ids" not in raw  # every default
    plain = trained(Eagle(target, torch.arange(23), bias=False))
    export_head(plain, target, tmp_path / "1", "eagle")
    raw = json.loads((tmp_path / "1" / "config.json").read_text())
    assert raw["bias"] is False and "truncated_vocab_size" not in raw


# -- the package that defines the layout ----------------------------------


def theirs(
    package: ModuleType, folder: Path, given: Text, depth: int
) -> list[Tensor]:
    """Logits over draft words of speculators' own model, per depth."""
    config = package.SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = package.SpeculatorModel.from_pretrained(folder, config=config)
    model = model.double().eval()
    said: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda m, i, out: said.append(out))
    out = []
    with torch.no_grad():
        for b in range(len(given.tokens)):
            said.clear()
            tokens = given.tokens[b : b + 1, 1:]
            joined = torch.cat([t[b : b + 1] for t in given.taps], -1)
            model(
                hidden_states=joined,
                input_ids=tokens,
                document_ids=torch.zeros_like(tokens),
                ttt_steps=depth,
            )
            out.append(list(said))
    return [torch.cat(rows) for rows in zip(*out, strict=True)]


PACKAGE = [
    {},
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"fc_norm": True},
    {"norm_output": True},
    {"layers": 2},
    {
        "layers": 2,
        "fc_norm": True,
        "norm_output": True,
        "norm_before_residual": True,
        "taps": (1, 3, 5),
    },
]


@pytest.mark.parametrize("flags", PACKAGE, ids=lambda f: "-".join(f) or "none")
def test_speculators_own_model_gives_our_logits(flags, target, tmp_path):
    package = pytest.importorskip(
        "speculators",
        reason="the speculators package is not installed: its own model "
        "was not run on our export",
    )
    flags = {"taps": (2, 3, 5), **flags}  # it wants them different
    hf = tiny.hf_model("llama", 1, num_hidden_layers=LAYERS)
    hf.save_pretrained(tmp_path / "target")
    head = trained(Eagle3(target, WORDS, **flags))
    where = str(tmp_path / "target")
    export_head(head, target, tmp_path / "head", verifier=where)
    given = text(target, head)
    want = theirs(package, tmp_path / "head", given, 3)
    order = head.words.argsort()
    with torch.no_grad():
        for s, out in enumerate(head.rollout(given, 3)):
            mine = head.project(out, s)[..., order]
            # Beyond the text both see stand-in tokens; leave those out.
            n = mine.shape[1] - s
            gap = (mine - want[s])[:, :n].abs().max()
            assert gap < 1e-4, (s, float(gap))


# -- the command, and planted folders -------------------------------------


def test_the_command_writes_a_head(target, tmp_path, monkeypatch, capsys):
    from specref import cli
    from specref.heads.files import save_head

    monkeypatch.setattr(cli, "_load", lambda args: target)
    head = trained(Eagle3(target, WORDS))
    file = tmp_path / "head-mine.safetensors"
    save_head(head, file, "eagle3", {})
    to = tmp_path / "out"
    ask = ["export", "--head", str(file), "--to", str(to)]
    assert cli.main([*ask, "--verifier", "a/b"]) == 0
    assert "speculators: config.json, model.safetensors" in (
        capsys.readouterr().out
    )
    back = load_head(to, target)
    assert torch.equal(back.fc.weight, head.fc.weight.bfloat16().double())
    assert cli.main([*ask, "--layout", "eagle3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "eagle3"
    assert cli.main([*ask, "--layout", "medusa"]) == 2
    assert "type Medusa, got Eagle3" in capsys.readouterr().err
    other = tmp_path / "head-mtp.safetensors"
    save_head(trained(MTP(target, WORDS)), other, "mtp", {})
    ask[2] = str(other)
    assert cli.main(ask) == 2
    assert "Eagle, Eagle3, Medusa, got MTP" in capsys.readouterr().err


def test_generate_takes_the_folder_of_a_checkpoint(tmp_path):
    from specref import generate
    from specref.heads.files import resolve_head
    from specref.interchange.plant_files import write_planted
    from specref.registry import methods

    world = write_planted(tmp_path, "speculators")
    head = resolve_head(str(tmp_path / "head"), world.target)
    assert isinstance(head, Eagle3)
    prompt = [1, 2, 3, 4, 6, 7]
    if "eagle3" not in {m.name for m in methods()}:
        pytest.skip("the method eagle3 is not registered yet")
    report = generate(
        world.target,
        prompt,
        "eagle3",
        head=str(tmp_path / "head"),
        max_new_tokens=20,
    )
    plain = generate(world.target, prompt, "autoregressive", max_new_tokens=20)
    assert report.tokens == plain.tokens
    assert report.tau > 1.8


@pytest.mark.parametrize("layout", ["eagle", "eagle3", "medusa-vllm"])
def test_planted_folders_are_what_transformers_loads(layout, tmp_path):
    import transformers

    from specref.interchange.plant_files import write_planted

    world = write_planted(tmp_path, layout)
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", dtype=torch.float64
    )
    row = torch.tensor([[1, 2, 3, 4, 6, 7, 2, 2, 1]])
    with torch.no_grad():
        mine, theirs = world.target.forward(row).logits, hf(row).logits
    assert torch.allclose(mine, theirs, atol=1e-3)
    load_head(tmp_path / "head", world.target)
    with pytest.raises(ValueError, match="layout must be one of eagle"):
        write_planted(tmp_path, "hydra")
