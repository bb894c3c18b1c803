"""Published checkpoints in: every layout against plain torch, every error.

The checkpoints come from `published`, which shares no code with the
library: names, shapes and logits must agree.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specref.heads.base import Head, Text
from specref.interchange import LAYOUTS, load_head
from specref.interchange.parts import from_offsets, taps, to_offsets
from specref.lm.llama import Llama

WORDS = [1, 2, 4, 5, 9, 10, 11, 15, 22]
LAYERS = 6


@pytest.fixture(scope="module")
def target() -> Llama:
    return tiny.llama("llama", 1, num_hidden_layers=LAYERS)


@dataclass(frozen=True)
class Kind:
    """One layout: the published module, its config, its weight file."""

    layout: str
    make: Callable[[Llama], nn.Module]
    config: Callable[[Llama, nn.Module], dict[str, Any]]
    file: str
    depth: int = 1


def eagle_config(lm: Llama, m: nn.Module) -> dict[str, Any]:
    return published.plain_config(m.config)


def eagle3_config(lm: Llama, m: nn.Module) -> dict[str, Any]:
    raw = published.plain_config(m.config)
    raw["draft_vocab_size"] = len(m.words)
    if m.config.hidden_size != lm.config.hidden_size:
        raw["target_hidden_size"] = lm.config.hidden_size
    return raw


def wide_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """speculators and vLLM say layers.0."""
    return {k.replace("midlayer.", "layers.0."): v for k, v in state.items()}


def speculators_config(lm: Llama, m: nn.Module) -> dict[str, Any]:
    return {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": len(m.words),
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, LAYERS // 2, LAYERS - 3],
        "transformer_layer_config": published.plain_config(m.config),
    }


def mlp_config(lm: Llama, m: nn.Module) -> dict[str, Any]:
    return {
        "model_type": "mlp_speculator",
        "vocab_size": lm.vocab_size,
        "emb_dim": lm.config.hidden_size,
        "inner_dim": m.inner,
        "n_predict": len(m.emb),
        "tie_weights": m.emb[0] is m.emb[1],
        "scale_input": m.scale,
    }


def redrafter_config(lm: Llama, m: nn.Module) -> dict[str, Any]:
    return {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": lm.vocab_size,
        "hidden_size": lm.config.hidden_size,
        "exit_dim": m.lm_head[-1].in_features,
        "num_draft_layers": len(m.lm_head) - 1,
        "rnn": True,
    }


ST, BIN = "model.safetensors", "pytorch_model.bin"
MEDUSA = {"medusa_num_heads": 5, "medusa_num_layers": 1}  # both wrong
HYDRA = {"hydra_num_heads": 3, "hydra_num_layers": 3, "grounded_heads": True}
KINDS = {
    "eagle": Kind("eagle", published.Eagle1, eagle_config, BIN),
    "eagle-no-bias": Kind(
        "eagle",
        lambda lm: published.Eagle1(lm, False),
        lambda lm, m: {**eagle_config(lm, m), "bias": False},
        ST,
    ),
    "eagle3": Kind(
        "eagle3", lambda lm: published.Eagle3(lm, WORDS), eagle3_config, BIN
    ),
    "eagle3-all": Kind(
        "eagle3",
        lambda lm: published.Eagle3(lm, list(range(lm.vocab_size))),
        eagle3_config,
        ST,
    ),
    "eagle3-narrow": Kind(
        "eagle3",
        lambda lm: published.Eagle3(lm, WORDS, width=24),
        eagle3_config,
        ST,
    ),
    "speculators": Kind(
        "speculators",
        lambda lm: published.Eagle3(lm, WORDS),
        speculators_config,
        ST,
    ),
    "medusa": Kind(
        "medusa",
        published.medusa,
        lambda lm, m: MEDUSA,
        "medusa_lm_head.pt",
        3,
    ),
    "hydra": Kind(
        "hydra",
        published.Hydra,
        lambda lm, m: {**HYDRA, "hydra_head_arch": "mlp"},
        "hydra_lm_head.pt",
        3,
    ),
    "hydra++": Kind(
        "hydra",
        lambda lm: published.Hydra(lm, pre=True),
        lambda lm, m: {**HYDRA, "hydra_head_arch": "prefix-mlp"},
        "hydra_lm_head.pt",
        3,
    ),
    "redrafter": Kind(
        "redrafter",
        lambda lm: published.ReDrafter(lm, 40),
        redrafter_config,
        ST,
        4,
    ),
    "redrafter-no-proj": Kind(
        "redrafter",
        lambda lm: published.ReDrafter(lm, 64),
        redrafter_config,
        ST,
        4,
    ),
    "mlp": Kind(
        "mlp_speculator",
        lambda lm: published.Speculator(lm, 20),
        mlp_config,
        ST,
        3,
    ),
    "mlp-tied": Kind(
        "mlp_speculator",
        lambda lm: published.Speculator(lm, 20, tie=True, scale=True),
        mlp_config,
        ST,
        3,
    ),
}
EVERY = pytest.mark.parametrize("name", KINDS)


def checkpoint(
    name: str, lm: Llama, folder: Path
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Write a random checkpoint; returns the module and its tensors."""
    kind = KINDS[name]
    module = tiny.randomise(kind.make(lm), 7)
    raw = kind.config(lm, module)
    state = module.state_dict()
    if name == "speculators":
        state = wide_names(state)
    if name.startswith("eagle3") and len(module.words) == lm.vocab_size:
        del state["d2t"], state["t2d"]
    if kind.layout == "mlp_speculator":
        state = {f"speculator.{k}": v for k, v in state.items()}
    write(folder, raw, state, kind.file)
    return module, state


def write(
    folder: Path, raw: dict[str, Any], state: dict[str, Tensor], file: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    state = {k: v.clone().contiguous() for k, v in state.items()}
    save = save_file if file.endswith("safetensors") else torch.save
    save(state, folder / file)


def edit(folder: Path, **fields: Any) -> None:
    """Change config fields; None removes one."""
    file = folder / "config.json"
    raw = {**json.loads(file.read_text()), **fields}
    raw = {k: v for k, v in raw.items() if v is not None}
    file.write_text(json.dumps(raw))


def text(lm: Llama, head: Head) -> Text:
    source = torch.Generator().manual_seed(5)
    tokens = torch.randint(lm.vocab_size, (2, 9), generator=source)
    with torch.no_grad():
        out = lm.forward(tokens, taps=head.taps)
    return Text(tokens, out.hidden[:, :-1], tuple(t[:, :-1] for t in out.taps))


@EVERY
def test_logits_are_the_published_modules(name, target, tmp_path):
    module, _ = checkpoint(name, target, tmp_path)
    head = load_head(tmp_path, target)
    given = text(target, head)
    if name == "medusa":
        want = published.medusa_logits(module, given.hidden)
    else:
        want = module(target, given.tokens, given.hidden, given.taps)
    depth = KINDS[name].depth
    got = head.rollout(given, depth)
    assert len(want) == depth
    with torch.no_grad():
        for s, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            mine = head.logits(mine[:, : theirs.shape[1]], s)
            dead = torch.isinf(theirs)
            assert torch.equal(torch.isinf(mine), dead)
            gap = (mine - theirs).masked_fill(dead, 0.0).abs().max()
            # transformers turns queries and keys by float32 angles.
            turned = name.startswith(("eagle", "spec", "hydra++"))
            assert gap < (2e-5 if turned else 1e-10), (s, float(gap))


@EVERY
def test_a_head_is_ready_to_draft(name, target, tmp_path):
    checkpoint(name, target, tmp_path)
    head = load_head(tmp_path, target)
    assert head.dtype == target.dtype and not head.training
    assert not any(w.requires_grad for w in head.parameters())
    own = {n: w for n, w in head.named_parameters() if "embed." not in n}
    assert all(torch.isfinite(w).all() for w in own.values())


# Tensors that a checkpoint may leave out, or tie.
FREE = ("d2t", "t2d", "embed_tokens.weight", "lm_head.weight")
SKIPPED = "prefix_embeding_layer.embed_tokens.weight"


@EVERY
def test_a_missing_tensor_is_named(name, target, tmp_path):
    _, state = checkpoint(name, target, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    layout = KINDS[name].layout
    for gone in state:
        if gone in (*FREE[1:], SKIPPED):
            continue
        left = {k: v for k, v in state.items() if k != gone}
        write(tmp_path / "less", raw, left, KINDS[name].file)
        with pytest.raises(ValueError, match="tensor|numbered|places") as e:
            load_head(tmp_path / "less", target, layout=layout)
        assert (
            gone in str(e.value)
            or "numbered" in str(e.value)
            or (name in ("medusa", "hydra", "hydra++"))
        ), (gone, str(e.value))


@EVERY
def test_an_unknown_tensor_is_named(name, target, tmp_path):
    _, state = checkpoint(name, target, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    more = {**state, "extra.weight": torch.zeros(2, 3)}
    write(tmp_path, raw, more, KINDS[name].file)
    with pytest.raises(
        ValueError,
        match=r"unknown tensor '.*extra.weight'.*"
        r"\[2, 3\]",
    ):
        load_head(tmp_path, target)


@EVERY
def test_a_wrong_shape_is_named_with_both(name, target, tmp_path):
    _, state = checkpoint(name, target, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for key, tensor in state.items():
        if key == SKIPPED or key == "token_map":
            continue
        shape = [n + 1 for n in tensor.shape]
        bad = {**state, key: torch.zeros(shape, dtype=tensor.dtype)}
        write(tmp_path / "bad", raw, bad, KINDS[name].file)
        with pytest.raises(ValueError) as error:
            load_head(tmp_path / "bad", target)
        said = str(error.value)
        assert str(list(tensor.shape)) in said, said
        assert str(shape) in said and key.split(".", 1)[-1] in said, said


# -- telling layouts ------------------------------------------------------


@EVERY
def test_layouts_are_told_apart(name, target, tmp_path):
    from specref.interchange.load import detect

    _, state = checkpoint(name, target, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert detect(raw, state) == KINDS[name].layout
    fits = [k for k, x in LAYOUTS.items() if x.fits(raw, list(state))]
    assert fits == [KINDS[name].layout]


def test_unclear_layouts_are_refused(target, tmp_path):
    write(tmp_path, {}, {"a.weight": torch.zeros(1)}, ST)
    with pytest.raises(ValueError, match="fits none of .*eagle3.*a.weight"):
        load_head(tmp_path, target)
    _, state = checkpoint("medusa", target, tmp_path / "m")
    state["hydra_mlp.0.0.linear.weight"] = torch.zeros(1)
    write(tmp_path / "m", MEDUSA, state, "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="fits medusa and hydra"):
        load_head(tmp_path / "m", target)
    with pytest.raises(ValueError, match="layout must be one of"):
        load_head(tmp_path / "m", target, layout="eagle9")
    with pytest.raises(ValueError, match="reads no taps"):
        load_head(tmp_path / "m", target, layout="medusa", taps=(1, 2))
    with pytest.raises(TypeError, match="specref Llama"):
        load_head(tmp_path / "m", object())


# -- files ----------------------------------------------------------------


def test_files_that_are_no_checkpoint_are_refused(target, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_head(tmp_path, target)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_head(tmp_path, target)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="weights in .* must be one of"):
        load_head(tmp_path, target)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="truncated or altered"):
        load_head(tmp_path, target)


class Boom:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("touched-by-a-pickle"),))


def test_pickles_with_code_are_not_run(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"x": Boom()}, tmp_path / BIN)
    with pytest.raises(ValueError, match="must hold tensors only"):
        load_head(tmp_path, target)
    assert not (tmp_path / "touched-by-a-pickle").exists()
    torch.save([torch.zeros(1)], tmp_path / BIN)
    with pytest.raises(ValueError, match="tensors by name, got list"):
        load_head(tmp_path, target)
    torch.save({"x": torch.zeros(9)}, tmp_path / BIN)
    whole = (tmp_path / BIN).read_bytes()
    (tmp_path / BIN).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="whole"):
        load_head(tmp_path, target)


def test_a_file_or_several_parts_do_as_well(target, tmp_path):
    _, state = checkpoint("eagle", target, tmp_path)
    want = load_head(tmp_path, target).fc.weight
    assert torch.equal(load_head(tmp_path / BIN, target).fc.weight, want)
    (tmp_path / BIN).unlink()
    names = sorted(state)
    where = {}
    for i, some in enumerate((names[:4], names[4:])):
        torch.save({n: state[n] for n in some}, tmp_path / f"part-{i}.bin")
        where |= dict.fromkeys(some, f"part-{i}.bin")
    index = tmp_path / f"{BIN}.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(load_head(tmp_path, target).fc.weight, want)


# -- configs --------------------------------------------------------------


def test_heads_for_other_targets_are_refused(target, tmp_path):
    checkpoint("eagle", target, tmp_path)
    edit(tmp_path, vocab_size=24)
    with pytest.raises(ValueError, match="vocab_size 24, the target 23"):
        load_head(tmp_path, target)
    edit(tmp_path, vocab_size=23, sliding_window=4, model_type="mistral")
    with pytest.raises(ValueError, match="sliding window"):
        load_head(tmp_path, target)
    checkpoint("mlp", target, tmp_path / "m")
    edit(tmp_path / "m", emb_dim=31)
    with pytest.raises(ValueError, match="emb_dim 31, the target 32"):
        load_head(tmp_path / "m", target)
    checkpoint("redrafter", target, tmp_path / "r")
    edit(tmp_path / "r", exit_dim=None)
    with pytest.raises(ValueError, match="lacks 'exit_dim'"):
        load_head(tmp_path / "r", target)


def test_a_silent_config_means_a_bias(target, tmp_path):
    checkpoint("eagle-no-bias", target, tmp_path)
    edit(tmp_path, bias=None)
    with pytest.raises(ValueError, match=r"'fc\.bias'.*\"bias\": false"):
        load_head(tmp_path, target)
    checkpoint("eagle", target, tmp_path / "b")
    edit(tmp_path / "b", bias=False)
    with pytest.raises(ValueError, match=r"unknown tensor 'fc\.bias'"):
        load_head(tmp_path / "b", target)


def test_flags_that_are_not_handled_are_refused(target, tmp_path):
    checkpoint("eagle3", target, tmp_path)
    for fields, said in (
        ({"norm_output": False}, "norm_output must be True"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "last feature"),
        ({"norm_before_fc": True}, r"lacks tensor 'input_norm\.weight'"),
        ({"fc_norm": True}, r"lacks tensor 'fc_norm\.0\.weight'"),
        ({"target_hidden_size": 31}, "target_hidden_size 31"),
    ):
        shutil.copytree(tmp_path, tmp_path / "x", dirs_exist_ok=True)
        edit(tmp_path / "x", **fields)
        with pytest.raises(ValueError, match=said):
            load_head(tmp_path / "x", target)
        shutil.rmtree(tmp_path / "x")
    for name in ("hydra", "hydra++"):
        checkpoint(name, target, tmp_path / name)
        for fields, said in (
            ({"grounded_heads": False}, "grounded_heads must be True"),
            ({"hidden_state_offset": 1}, "hidden_state_offset must be 0"),
            ({"hydra_head_arch": "eagle-attn"}, "must be one of mlp"),
        ):
            edit(tmp_path / name, **fields)
            with pytest.raises(ValueError, match=said):
                load_head(tmp_path / name, target)
            edit(tmp_path / name, grounded_heads=True, hidden_state_offset=0)
    edit(tmp_path / "hydra", hydra_head_arch="prefix-mlp")
    with pytest.raises(ValueError, match="has no prefix_embeding_layer"):
        load_head(tmp_path / "hydra", target)


def test_speculators_kinds_and_flags(target, tmp_path):
    checkpoint("speculators", target, tmp_path)
    edit(tmp_path, norm_before_residual=None)
    with pytest.raises(ValueError, match="speculators .*false and vLLM"):
        load_head(tmp_path, target)
    for kind in ("peagle", "dflash", "mtp"):
        edit(tmp_path, norm_before_residual=False, speculators_model_type=kind)
        with pytest.raises(ValueError, match=f"handled, got '{kind}'"):
            load_head(tmp_path, target)
    edit(tmp_path, speculators_model_type="eagle3", norm_before_residual=True)
    assert load_head(tmp_path, target).layer.normed
    edit(tmp_path, transformer_layer_config=None)
    with pytest.raises(ValueError, match="transformer_layer_config"):
        load_head(tmp_path, target)


def test_speculators_eagle_is_eagle_1_renamed(target, tmp_path):
    module, state = checkpoint("eagle", target, tmp_path / "a")
    want = load_head(tmp_path / "a", target)
    renamed = {
        k.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer."): v
        for k, v in state.items()
    }
    raw = {
        "speculators_model_type": "eagle",
        "fusion_bias": True,
        "layernorms": False,
        "transformer_layer_config": published.plain_config(module.config),
    }
    write(tmp_path / "b", raw, renamed, ST)
    got = load_head(tmp_path / "b", target)
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    edit(tmp_path / "b", layernorms=True)
    with pytest.raises(ValueError, match="layernorms must be False"):
        load_head(tmp_path / "b", target)


def test_hass_norms_its_inputs(target, tmp_path):
    module, state = checkpoint("eagle", target, tmp_path)
    d = target.config.hidden_size
    raw = {**published.plain_config(module.config), "add_para_norm": True}
    more = {
        f"{n}_layernorm.weight": torch.rand(
            d, generator=torch.Generator().manual_seed(i)
        ).double()
        for i, n in enumerate(("embedding", "hidden_states"))
    }
    write(tmp_path, raw, {**state, **more}, BIN)
    head = load_head(tmp_path, target)
    assert torch.equal(
        head.norms[1].weight, more["hidden_states_layernorm.weight"]
    )
    given = text(target, head)
    e = head.embed(given.tokens[:, 1:])
    scaled = (
        head.norms[0].weight
        * e
        * torch.rsqrt(
            e.pow(2).mean(-1, keepdim=True) + target.config.rms_norm_eps
        )
    )
    assert torch.allclose(head.norms[0](e), scaled, atol=1e-12)
    before = head.rollout(given, 1)[0]
    head.norms[1].weight.mul_(2.0)
    assert not torch.allclose(head.rollout(given, 1)[0], before)


def test_embeddings_are_shared_where_they_are_the_targets(target, tmp_path):
    _, state = checkpoint("eagle", target, tmp_path)
    own = load_head(tmp_path, target)
    assert own.embed is not target.embed
    assert torch.equal(own.embed.weight, state["embed_tokens.weight"])
    raw = json.loads((tmp_path / "config.json").read_text())
    state["embed_tokens.weight"] = target.embed.weight.detach()
    write(tmp_path, raw, state, BIN)
    assert load_head(tmp_path, target).embed is target.embed
    del state["embed_tokens.weight"]
    write(tmp_path, raw, state, BIN)
    assert load_head(tmp_path, target).embed is target.embed


def test_an_eagle_1_head_with_another_output_is_refused(target, tmp_path):
    _, state = checkpoint("eagle", target, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    state["lm_head.weight"] = target.head.weight.detach().clone()
    write(tmp_path, raw, state, BIN)
    load_head(tmp_path, target)
    state["lm_head.weight"][0, 0] += 1.0
    write(tmp_path, raw, state, BIN)
    with pytest.raises(ValueError, match="differs from the target's output"):
        load_head(tmp_path, target)


# -- vocabulary and taps --------------------------------------------------


def test_d2t_holds_offsets():
    words = torch.tensor([1, 4, 5, 9])
    d2t, t2d = to_offsets(words, 12)
    assert d2t.tolist() == [1, 3, 3, 6]
    assert t2d.nonzero().squeeze(-1).tolist() == [1, 4, 5, 9]
    assert torch.equal(from_offsets(d2t), words)


def test_vocabulary_maps_must_agree(target, tmp_path):
    _, state = checkpoint("eagle3", target, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    head = load_head(tmp_path, target)
    assert head.words.tolist() == WORDS
    ids = torch.tensor(WORDS)
    off, once = state["t2d"].clone(), state["d2t"].clone()
    off[0], once[0] = True, 1 - 2
    for change, said in (
        ({"d2t": ids}, "offsets .*got the token ids themselves"),
        ({"t2d": off}, "name different draft vocabularies"),
        ({"d2t": once}, "different draft vocabularies"),
        ({"d2t": once, "t2d": None}, "different token ids below 23"),
    ):
        bad = {k: v for k, v in {**state, **change}.items() if v is not None}
        write(tmp_path / "x", raw, bad, BIN)
        with pytest.raises(ValueError, match=said):
            load_head(tmp_path / "x", target)
    del state["t2d"]
    write(tmp_path / "y", raw, state, BIN)
    assert load_head(tmp_path / "y", target).words.tolist() == WORDS
    del state["d2t"]
    write(tmp_path / "y", raw, state, BIN)
    with pytest.raises(ValueError, match="lacks tensor 'd2t'"):
        load_head(tmp_path / "y", target)


def test_taps_are_converted_to_what_enters():
    ids = "eagle_aux_hidden_state_layer_ids"
    assert taps({}, 32) == (2, 16, 29)
    assert taps({ids: [2, 16, 29]}, 32) == (2, 16, 29)
    assert taps({"eagle_config": {ids: [1, 15, 28]}}, 32) == (2, 16, 29)
    assert taps({ids: [1, 15, 28]}, 32) == (2, 16, 29)
    assert taps({"eagle_config": {ids: [24, 30, 36]}}, 36) == (24, 30, 36)
    assert taps({ids: [1, 15, 28]}, 32, entering=True) == (1, 15, 28)


def test_taps_of_a_call_win(target, tmp_path):
    checkpoint("eagle3", target, tmp_path)
    assert load_head(tmp_path, target).taps == (2, 3, 3)
    assert load_head(tmp_path, target, taps=(0, 3, 6)).taps == (0, 3, 6)
    with pytest.raises(ValueError, match=r"taps must be layers in \[0, 6\]"):
        load_head(tmp_path, target, taps=(0, 3, 7))


# -- Medusa ---------------------------------------------------------------


def test_medusa_heads_are_counted(target, tmp_path):
    checkpoint("medusa", target, tmp_path)  # its config says five
    assert load_head(tmp_path, target).levels == 3


def test_medusa_without_outputs_reads_the_targets(target, tmp_path):
    module, state = checkpoint("medusa", target, tmp_path)
    outputs = [f"{i}.2.weight" for i in range(3)]
    less = {k: v for k, v in state.items() if k not in outputs}
    write(tmp_path / "less", MEDUSA, less, ST)
    head = load_head(tmp_path / "less", target)
    given = text(target, head)
    for i, out in enumerate(head.rollout(given, 3)):
        x = module[i][1](module[i][0](given.hidden))
        want = x @ target.head.weight.T
        assert torch.allclose(head.logits(out, i), want, atol=1e-10)


def test_medusa_2_needs_its_own_backbone(target, tmp_path):
    _, state = checkpoint("medusa", target, tmp_path)
    want = load_head(tmp_path, target)
    whole = {f"medusa_head.{k}": v for k, v in state.items()}
    hf = tiny.hf_model("llama", 1, num_hidden_layers=LAYERS).state_dict()
    write(tmp_path / "two", MEDUSA, {**whole, **hf}, ST)
    got = load_head(tmp_path / "two", target)
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    other = tiny.llama("llama", 2, num_hidden_layers=LAYERS)
    with pytest.raises(ValueError, match="a backbone of its own"):
        load_head(tmp_path / "two", other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_medusa_as_vllm_converts_it(bias, shared, full, target, tmp_path):
    module, state = checkpoint("medusa", target, tmp_path)
    words = torch.tensor([4, 1, 22, 0])
    new = {"token_map": words}
    for i in range(3):
        for j in range(2):
            for end in ("weight", "bias") if bias else ("weight",):
                there = f"blocks.{i}.layers.{j}.{end}"
                new[there] = state[f"{i}.{j}.linear.{end}"]
        if i == 0 or not shared:
            out = state[f"{i}.2.weight"]
            new[f"lm_heads.{i}.weight"] = out if full else out[words]
    raw = {"medusa_fc_bias": bias, "original_lm_head": shared}
    write(tmp_path / "v", raw, new, ST)
    head = load_head(tmp_path / "v", target)
    given = text(target, head)
    for i, out in enumerate(head.rollout(given, 3)):
        x = given.hidden
        for block in module[i][:2]:
            more = block.linear(x)
            more = more if bias else more - block.linear.bias
            x = x + torch.nn.functional.silu(more)
        want = x @ state[f"{0 if shared else i}.2.weight"][words].T
        some = head.logits(out, i)[..., words]
        assert torch.allclose(some, want, atol=1e-10)


def test_tied_tables_must_be_equal(target, tmp_path):
    _, state = checkpoint("mlp-tied", target, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    state["speculator.ln.1.bias"] = state["speculator.ln.1.bias"] + 1.0
    write(tmp_path, raw, state, ST)
    with pytest.raises(ValueError, match=r"ln\.0\.bias' and .*ln\.1\.bias'"):
        load_head(tmp_path, target)


def test_loading_leaves_the_target_alone(target, tmp_path):
    before = {k: v.clone() for k, v in target.state_dict().items()}
    for name in KINDS:
        checkpoint(name, target, tmp_path / name)
        load_head(tmp_path / name, target)
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_heads_take_the_targets_dtype(tmp_path):
    lm = tiny.llama("llama", 1, num_hidden_layers=LAYERS)
    checkpoint("eagle3", lm, tmp_path)
    low = lm.to(torch.bfloat16)
    head = load_head(tmp_path, low)
    assert head.dtype == torch.bfloat16 and head.words.dtype == torch.long
