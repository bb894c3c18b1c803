"""ReDrafter, the MLP speculator and EAGLE's flags: loop, laws, files."""

from __future__ import annotations

import every
import heads
import pytest
import tiny
import torch
from cases import TOLERANCE

from specref import rules
from specref.heads.base import Head
from specref.heads.eagle import Eagle
from specref.heads.eagle3 import Eagle3
from specref.heads.files import load_head, save_head
from specref.heads.mlp_speculator import MLPSpeculator
from specref.heads.recurrent import RecurrentState
from specref.heads.redrafter import ReDrafter

KINDS = {
    "redrafter": lambda lm, words: ReDrafter(lm, words, exit_dim=20),
    "redrafter-sum": lambda lm, words: ReDrafter(lm, words, rnn=False),
    "mlp": lambda lm, words: MLPSpeculator(lm, words, heads=3, inner=12),
    "mlp-tied": lambda lm, words: MLPSpeculator(
        lm, words, heads=4, tie=True, scale_input=True
    ),
}
FLAGS = {
    "eagle-norms": lambda lm, words: Eagle(lm, words, norms=True),
    "before-residual": lambda lm, words: Eagle3(
        lm, words, taps=(0, 1, 2), norm_before_residual=True
    ),
    "norms": lambda lm, words: Eagle3(
        lm, words, taps=(0, 1), layers=2, fc_norm=True, norm_output=True
    ),
    "joined": lambda lm, words: Eagle3(
        lm, words, taps=(1,), norm_before_fc=True, bias=True
    ),
}
ALL = {**KINDS, **FLAGS}


def made(kind: str, lm, words=None) -> Head:
    words = torch.arange(lm.vocab_size) if words is None else words
    return heads.randomised(ALL[kind](lm, words))


@pytest.mark.parametrize("kind", ALL)
def test_the_loop_says_what_training_says(kind):
    lm = tiny.llama()
    head = made(kind, lm, torch.arange(20).flip(0))
    assert heads.rollout_gap(head, lm) < 1e-10
    assert heads.rollout_gap(head, lm, (4, 7)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "policy", ["chain-iid", "bushy-without_replacement", "dynamic"]
)
@pytest.mark.parametrize("sampling", ["T=0", "T=0.7"])
def test_law(kind, policy, sampling):
    lm = heads.target()
    head = made(kind, lm, torch.tensor([2, 0]))
    far = heads.off(
        lm,
        head,
        heads.POLICIES[policy],
        rules.get("recursive"),
        heads.SAMPLINGS[sampling],
    )
    assert far <= TOLERANCE


@pytest.mark.parametrize("kind", ALL)
def test_law_of_a_chain_with_an_end(kind):
    lm = heads.target()
    far = heads.off(
        lm,
        made(kind, lm),
        heads.POLICIES["chain-iid"],
        rules.get("tokenwise"),
        heads.SAMPLINGS["T=1"],
        3,
        frozenset({2}),
    )
    assert far <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_of_a_batch(kind):
    lm = tiny.llama()
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8]]
    got = heads.greedy_rows(
        lm,
        made(kind, lm),
        heads.POLICIES["dynamic"],
        rules.get("recursive"),
        prompts,
        12,
    )
    assert got == [every.greedy_reference(lm, p, 12) for p in prompts]


class FromRoot(RecurrentState):
    """Every node reads the newest pair instead of its parent."""

    def extend(self, tokens, parents):
        known, depth = self.known, self.depth
        self.known = known[:, :1].expand_as(known).clone()
        out = super().extend(tokens, parents)
        new = self.known[:, known.shape[1] :]
        self.known = torch.cat((known, new), 1)
        assert self.depth.shape[1] > depth.shape[1]
        return out


class FirstDepth(RecurrentState):
    """Every node uses the tables of level 1."""

    def extend(self, tokens, parents):
        self.depth = torch.zeros_like(self.depth)
        return super().extend(tokens, parents)


class Older(RecurrentState):
    """Reads the feature before the newest one."""

    def begin(self, fresh):
        moved = [type(f)(f.hidden.roll(1, 0), f.taps, f.tokens) for f in fresh]
        return super().begin(moved)


@pytest.mark.parametrize("state", [FromRoot, FirstDepth, Older])
def test_a_wrong_state_is_found(state, monkeypatch):
    lm = tiny.llama()
    head = made("mlp", lm)
    assert heads.rollout_gap(head, lm) < 1e-10
    monkeypatch.setattr(
        MLPSpeculator, "state", lambda self, b, capacity: state(self, b)
    )
    assert heads.rollout_gap(head, lm) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_truncate_keeps_the_front_words(kind):
    lm = tiny.llama()
    words = torch.tensor([5, 1, 9, 2, 22])
    head = made(kind, lm, words)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    text = heads.features(lm, tokens)
    before = [head.project(x, s) for s, x in enumerate(head.rollout(text, 3))]
    head.truncate(3)
    assert head.words.tolist() == [5, 1, 9]
    for s, x in enumerate(head.rollout(text, 3)):
        want = before[s][..., :3]
        assert torch.allclose(head.project(x, s), want, atol=1e-12)
    assert not torch.isfinite(head.logits(x, 2)[..., [2, 22]]).any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("redrafter", {"blocks": 1, "exit_dim": 24}),
        ("mlp_speculator", {"heads": 2, "inner": 8, "tie": True}),
    ],
)
def test_files(kind, options, tmp_path):
    from specref.heads import files

    lm = tiny.llama()
    words = torch.tensor([3, 0, 7])
    head = heads.randomised(files.build(kind, lm, words, options))
    file = tmp_path / "head-x.safetensors"
    save_head(head, file, kind, options)
    back = load_head(file, lm)
    assert back.words.tolist() == [3, 0, 7]
    for name, weight in head.trained().items():
        assert torch.equal(back.trained()[name], weight.bfloat16().double())


def test_sizes_are_checked():
    lm, words = tiny.llama(), torch.arange(23)
    with pytest.raises(ValueError, match="heads must be at least 1"):
        MLPSpeculator(lm, words, heads=0)
    with pytest.raises(ValueError, match="exit_dim at least 1"):
        ReDrafter(lm, words, exit_dim=0)
    with pytest.raises(ValueError, match="exclude each other"):
        Eagle3(lm, words, taps=(1,), fc_norm=True, norm_before_fc=True)
    head = made("mlp", lm)
    text = heads.features(lm, torch.tensor([[1, 2, 3, 4, 5, 6]]))
    with pytest.raises(ValueError, match="depth must be at most 3"):
        head.rollout(text, 4)
    state = head.state(1, 9)
    state.begin([heads.pairs(text, 0, 3)])
    one = torch.tensor([[1]])
    state.extend(one, torch.tensor([[-1]]))
    state.extend(one, torch.tensor([[0]]))
    with pytest.raises(ValueError, match="levels that the head has, got 4"):
        state.extend(one, torch.tensor([[1]]))
