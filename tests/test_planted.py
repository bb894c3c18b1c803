"""Planted heads: through writer, loader and loop, accepted always.

And each way of reading a file wrongly must cost acceptance, or these tests
would prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specref.heads.base import Head
from specref.heads.eagle import Eagle
from specref.interchange import eagle as eagle_layout
from specref.interchange import (
    export_head,
    files,
    load_head,
    parts,
    plant_heads,
    plant_more,
)
from specref.interchange.hydra import SKIP, hydra_table
from specref.interchange.layouts import dump
from specref.interchange.mlp_speculator import mlp_table
from specref.interchange.plant import SILENT, World
from specref.interchange.redrafter import redrafter_table
from specref.lm.llama import RMSNorm

WORLDS = {order: World(order=order) for order in (1, 2, 3, 4)}


def hydra_files(head: Head, folder: Path) -> None:
    """Hydra's layout, its skip a whole matrix."""
    tensors = dump(head, hydra_table(head))
    for name in filter(SKIP.match, tensors):
        tensors[name] += torch.eye(*tensors[name].shape)
    pre = head.prefix is not None
    raw = {"hydra_head_arch": "prefix-mlp" if pre else "mlp"}
    files.write(folder, raw, tensors, "hydra_lm_head.pt")


def redrafter_files(head: Head, folder: Path) -> None:
    raw = {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": head.vocab_size,
        "hidden_size": head.width,
        "exit_dim": head.head.weight.shape[1],
        "num_draft_layers": len(head.blocks),
        "rnn": True,
    }
    files.write(folder, raw, dump(head, redrafter_table(head)))


def mlp_files(head: Head, folder: Path) -> None:
    raw = {
        "model_type": "mlp_speculator",
        "vocab_size": head.vocab_size,
        "emb_dim": head.width,
        "inner_dim": head.memory,
        "n_predict": head.levels,
        "tie_weights": head.emb[0] is head.emb[1],
        "scale_input": head.scale_input,
    }
    files.write(folder, raw, dump(head, mlp_table(head)))


def export(layout: str) -> Callable[[Head, Path], Any]:
    def write(head: Head, folder: Path) -> None:
        lm = next(
            w.target for w in WORLDS.values() if w.target.embed is head.embed
        )
        export_head(head, lm, folder, layout)

    return write


def wide(**flags: Any) -> Callable[[World], Head]:
    return lambda w: plant_heads.eagle3(w, **flags)


# name -> (order of the world, head, writer)
PLANTED: dict[str, tuple[int, Callable, Callable]] = {
    "eagle": (4, plant_heads.eagle, export("eagle")),
    "eagle3": (4, wide(), export("eagle3")),
    "eagle3-taps": (4, wide(taps=(3, 2, 7)), export("eagle3")),
    "eagle3-normed": (4, wide(norm_before_fc=True), export("eagle3")),
    "speculators": (4, wide(), export("speculators")),
    "spec-taps": (4, wide(taps=(1, 4, 8)), export("speculators")),
    "spec-before": (4, wide(norm_before_residual=True), export("speculators")),
    "spec-fc": (4, wide(norm_before_fc=True), export("speculators")),
    "spec-fc-norm": (4, wide(fc_norm=True), export("speculators")),
    "spec-output": (4, wide(norm_output=True), export("speculators")),
    "spec-layers": (4, wide(layers=2), export("speculators")),
    "spec-all": (
        4,
        wide(
            layers=2,
            fc_norm=True,
            norm_output=True,
            norm_before_residual=True,
        ),
        export("speculators"),
    ),
    "medusa": (1, plant_heads.medusa, export("medusa")),
    "medusa-vllm": (1, plant_heads.medusa, export("medusa-vllm")),
    "hydra": (3, plant_more.hydra, hydra_files),
    "hydra++": (3, lambda w: plant_more.hydra(w, prefix=True), hydra_files),
    "redrafter": (2, plant_more.redrafter, redrafter_files),
    "mlp": (2, plant_more.mlp_speculator, mlp_files),
    "mlp-tied": (
        2,
        lambda w: plant_more.mlp_speculator(w, tie=True, scale_input=True),
        mlp_files,
    ),
}
EVERY = pytest.mark.parametrize("name", PLANTED)


def written(name: str, folder: Path) -> World:
    """Write a planted checkpoint; returns its world."""
    order, make, write = PLANTED[name]
    write(make(WORLDS[order]), folder)
    return WORLDS[order]


def always(rates: list[float]) -> bool:
    return rates == [1.0] * len(rates)


# -- the worlds -----------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_target_says_what_its_table_says(order):
    world = WORLDS[order]
    law = plant_more.tables(world)
    row = [1, 8, 3, 3, 2, 6, 4, 7, 1, 2]
    with torch.no_grad():
        logits = world.target.forward(torch.tensor([row])).logits[0]
    for t in range(2, len(row)):
        want = law[row[t], row[t - 1], row[t - 2]]
        assert torch.allclose(logits[t], want, atol=1e-9)
    if order > 1:  # the law does depend on that many tokens
        index = {2: (1, slice(None), 2), 3: (1, 2, slice(None))}[order]
        assert len(law[index].argmax(-1).unique()) > 1


def test_order_4_reads_pairs_and_a_silent_token_stays_silent():
    world = WORLDS[4]
    pairs = world.pairs()
    assert len(set(pairs)) == len(pairs) > 3
    with torch.no_grad():
        out = world.target.forward(torch.tensor([[3, 6, 2, 4, 1, 7, 8, 2]]))
    block = world.weights[:, world.d : world.k]
    assert len(block.unique(dim=1).T) > 3
    silent = [t for t in range(world.vocab) if t not in world.said]
    assert torch.allclose(
        out.logits[..., silent].double(), torch.tensor(SILENT).double()
    )


def test_worlds_check_their_sizes():
    with pytest.raises(ValueError, match="vocab must be in"):
        World(vocab=17)
    with pytest.raises(ValueError, match="order must be in"):
        World(order=5)
    with pytest.raises(ValueError, match="order 1, got 4"):
        plant_heads.medusa(WORLDS[4])
    with pytest.raises(ValueError, match="three layers from 1 up"):
        plant_heads.eagle3(WORLDS[4], taps=(0, 1, 2))


# -- accepted always ------------------------------------------------------


@EVERY
def test_a_planted_head_is_accepted_at_every_depth(name, tmp_path):
    world = written(name, tmp_path)
    head = load_head(tmp_path, world.target)
    assert always(planted.acceptance(head, world))
    assert always(planted.acceptance(head, world, temperature=0.0))


# The MLP behind it is empty.
IDLE = {
    ("spec-all", "layers.0.post_attention_layernorm.weight"),
    (
        "hydra++",
        "prefix_embeding_layer.layers.0.post_attention_layernorm.weight",
    ),
}
WHOLE = (
    "eagle",
    "spec-all",
    "spec-fc",
    "medusa",
    "hydra++",
    "redrafter",
    "mlp",
)


@pytest.mark.parametrize("name", WHOLE)
def test_every_tensor_has_a_part_in_it(name, tmp_path):
    world = written(name, tmp_path)
    raw, tensors = files.read(tmp_path)
    file = next(f.name for f in tmp_path.iterdir() if "config" not in f.name)
    tried = 0
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.any():
            continue
        if (name, key) in IDLE:
            continue
        lost = {**tensors, key: torch.zeros_like(tensor)}
        files.write(tmp_path / "lost", raw, lost, file)
        head = load_head(tmp_path / "lost", world.target)
        rates = planted.acceptance(head, world, 3, new=16)
        if always(rates):  # a rare part: give it more texts to show in
            rates = planted.acceptance(head, world, 3, new=80)
        assert not always(rates), key
        tried += 1
    assert tried > 8


# -- read wrongly ---------------------------------------------------------


def rewrite(
    folder: Path, change: Callable[[dict, dict[str, Tensor]], None]
) -> Path:
    """The same checkpoint with config and tensors changed."""
    raw = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(raw, tensors)
    out = folder / "changed"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(raw))
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        out / "model.safetensors",
    )
    return out


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("name", ["eagle3", "speculators"])
def test_taps_off_by_one_cost_acceptance(name, off, tmp_path):
    world = written(name, tmp_path)
    right = load_head(tmp_path, world.target).taps
    moved = tuple(t + off for t in right)
    rates = planted.acceptance(
        load_head(tmp_path, world.target, taps=moved), world
    )
    assert rates[0] < 0.7, rates
    for i in range(3):  # each tap by itself too
        one = tuple(t + off * (i == j) for j, t in enumerate(right))
        head = load_head(tmp_path, world.target, taps=one)
        assert not always(planted.acceptance(head, world)), one


def test_leaving_ids_read_as_entering_ids_cost_acceptance(
    tmp_path, monkeypatch
):
    """SpecForge's ids at the place where vLLM looks, and the reverse."""
    world = written("eagle3", tmp_path)
    right = load_head(tmp_path, world.target).taps
    assert right == (2, 4, 5)
    leaving = [t - 1 for t in right]

    def say(raw: dict, tensors: dict) -> None:
        raw["eagle_config"] = {parts.TAPS: leaving}

    there = rewrite(tmp_path, say)
    assert load_head(there, world.target).taps == right
    assert always(planted.acceptance(load_head(there, world.target), world))
    # The mutant: a reader that knows one convention only.
    monkeypatch.setattr(
        parts, "taps", lambda raw, n: tuple(raw["eagle_config"][parts.TAPS])
    )
    wrong = load_head(there, world.target)
    assert wrong.taps == (1, 3, 4)
    assert planted.acceptance(wrong, world)[0] < 0.7


@pytest.mark.parametrize("name", ["eagle3", "speculators"])
def test_d2t_read_as_ids_costs_acceptance(name, tmp_path, monkeypatch):
    world = written(name, tmp_path)

    def drop(raw: dict, tensors: dict) -> None:
        del tensors["t2d"]  # which would give the mistake away

    there = rewrite(tmp_path, drop)
    assert always(planted.acceptance(load_head(there, world.target), world))
    head = load_head(there, world.target)
    d2t = load_file(there / "model.safetensors")["d2t"]
    # Ids may repeat, so that no Head would take them: put them in by hand.
    head.words = d2t

    def logits(out: Tensor, depth: int = 0) -> Tensor:
        some = head.project(out, depth)
        full = some.new_full((*some.shape[:-1], world.vocab), -torch.inf)
        full[..., d2t] = some
        return full

    monkeypatch.setattr(head, "logits", logits)
    assert planted.acceptance(head, world)[0] < 0.7


def test_swapped_halves_cost_acceptance(tmp_path):
    def swap(raw: dict, tensors: dict) -> None:
        e, f = tensors["fc.weight"].chunk(2, 1)
        tensors["fc.weight"] = torch.cat((f, e), 1)

    world = written("eagle", tmp_path)
    head = load_head(rewrite(tmp_path, swap), world.target)
    assert planted.acceptance(head, world)[0] < 0.7


def test_a_dropped_bias_costs_acceptance(tmp_path):
    """What a reader that ignores unknown tensors does."""

    def drop(raw: dict, tensors: dict) -> None:
        raw["bias"] = False
        del tensors["fc.bias"]

    world = written("eagle", tmp_path)
    head = load_head(rewrite(tmp_path, drop), world.target)
    assert planted.acceptance(head, world)[0] < 0.7


def test_an_input_norm_costs_acceptance(tmp_path):
    """A stock decoder layer where EAGLE-1 has no norm at the entrance."""
    world = written("eagle", tmp_path)
    head = load_head(tmp_path, world.target)
    stock = RMSNorm(head.width, head.config.rms_norm_eps).double()
    head.layers[0].input_norm = stock
    assert planted.acceptance(head, world)[0] < 0.9


def test_a_last_norm_costs_acceptance(tmp_path, monkeypatch):
    """EAGLE-1 has none; its output is a feature already."""
    world = written("eagle", tmp_path)
    head = load_head(tmp_path, world.target)
    norm, step = world.target.norm, Eagle.step
    # Weight 3 would undo itself: any norm of another length shows.
    stock = RMSNorm(head.width, head.config.rms_norm_eps).double()
    monkeypatch.setattr(Eagle, "step", lambda self, *a: stock(step(self, *a)))
    assert norm.weight[0] != 1.0
    assert not always(planted.acceptance(head, world))


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("speculators", "norm_before_residual"),
        ("spec-before", "norm_before_residual"),
        ("speculators", "norm_output"),
        ("spec-output", "norm_output"),
    ],
)
def test_a_wrong_flag_costs_acceptance(name, flag, tmp_path):
    def turn(raw: dict, tensors: dict) -> None:
        raw[flag] = not raw[flag]

    world = written(name, tmp_path)
    head = load_head(rewrite(tmp_path, turn), world.target)
    rates = planted.acceptance(head, world)
    # What is fed back matters from the second depth on only.
    deep = flag == "norm_output"
    assert (rates[0] == 1.0) == deep and rates[1] < 0.9, rates


def test_a_pair_read_one_late_costs_acceptance(tmp_path, monkeypatch):
    """The token that a feature was read at, instead of the one drawn."""
    world = written("eagle", tmp_path)
    head = load_head(tmp_path, world.target)
    step = Eagle.step

    def late(self: Eagle, tokens: Tensor, *rest: Any) -> Tensor:
        return step(self, tokens.roll(1, 1), *rest)

    monkeypatch.setattr(Eagle, "step", late)
    assert planted.acceptance(head, world)[0] < 0.7


def test_hydra_without_its_identity_costs_acceptance(tmp_path, monkeypatch):
    """The skip is a whole matrix in the file; forgetting to take the
    identity off adds the feature twice."""
    from specref.interchange import hydra as layout

    world = written("hydra", tmp_path)
    monkeypatch.setattr(layout.torch, "eye", torch.zeros)
    head = load_head(tmp_path, world.target)
    assert not always(planted.acceptance(head, world))


def test_eagle3_layers_by_either_name(tmp_path):
    def rename(raw: dict, tensors: dict) -> None:
        for key in [k for k in tensors if k.startswith("midlayer.")]:
            new = key.replace("midlayer.", "layers.0.")
            tensors[new] = tensors.pop(key)

    world = written("eagle3", tmp_path)
    head = load_head(rewrite(tmp_path, rename), world.target)
    assert always(planted.acceptance(head, world))
    assert eagle_layout.eagle3_table(head)[1].theirs.startswith("midlayer.")
    assert isinstance(head, nn.Module)
