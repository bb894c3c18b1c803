"""Training of heads: the right goals, seeds, resuming, first losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from specref.heads.base import Head, Text
from specref.heads.files import load_head, read
from specref.train import heads
from specref.train.data import load_corpus, ranked
from specref.train.features import add_taps, tap_file
from specref.train.head_recipes import HEAD_RECIPES, HeadRecipe
from specref.train.head_score import by_depth, calibration
from specref.train.lessons import follow, lesson
from specref.train.respond import respond

V = 23
TAPS = (0, 1, 2)
GOLDEN = Path(__file__).parent / "first_losses.json"
SMALL = {"vocab": V, "batch": 160, "visits": 160 * 50, "rate": 3e-3}
# One recipe per kind of head; the sizes suit a target of three layers.
RECIPES = {
    "medusa": HeadRecipe("medusa", "medusa", (("heads", 2),), depth=2,
                         **SMALL),
    "hydra": HeadRecipe("hydra", "hydra", (("heads", 2),), depth=2, **SMALL),
    "eagle": HeadRecipe("eagle", "eagle", feature=1.0, noise=0.1, **SMALL),
    "hass": HeadRecipe("hass", "eagle", depth=3, feature=1.0, topk=4,
                       topk_weight=1.0, **SMALL),
    "eagle3": HeadRecipe("eagle3", "eagle3", (("taps", TAPS),), depth=3,
                         **SMALL),
    "mtp": HeadRecipe("mtp", "mtp", depth=2, **SMALL),
    "glide": HeadRecipe("glide", "glide", depth=2, **SMALL),
}


@pytest.fixture(scope="module")
def target():
    return tiny.llama("llama-tied").float().requires_grad_(False)


@pytest.fixture(scope="module")
def corpus(target, tmp_path_factory):
    """Forty answers of the tiny target, with the features of all layers."""
    folder = tmp_path_factory.mktemp("responses")
    prompts = [[1 + i % 7, 3, i % 23, 5] for i in range(40)]
    respond(
        target, prompts, folder, max_tokens=10_000, per_shard=20, width=8,
        max_new=20, max_prompt=8,
    )
    add_taps(target, folder, TAPS)
    return load_corpus(folder)


def trained(recipe, target, corpus, folder, until=None):
    done = heads.HeadTrainer(recipe, target, corpus, folder)
    done.run(until)
    return done


def log(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_taps_are_what_enters_the_layers(target, corpus):
    row = corpus.rows[33]  # of the second shard
    given = lesson(corpus, [33], (2, 0))
    with torch.inference_mode():
        taps = target.forward(row.tokens[None, :-1], taps=(2, 0)).taps
    for mine, theirs in zip(given.text.taps, taps, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-3)
    assert tap_file(row.taps[0].with_name("responses-00020.safetensors")
                    ).exists()


def test_taps_that_were_not_made_are_named(target, corpus):
    with pytest.raises(ValueError, match=r"layers \[3\] are missing"):
        lesson(corpus, [0], (3,))
    row = replace(corpus.rows[0], taps=None)
    with pytest.raises(FileNotFoundError, match="specref train features"):
        lesson(type(corpus)([row]), [0], (1,))


def test_goals_are_the_laws_after_the_drafted_token(target, corpus):
    """Drafts at depth s from pair t against the law after x_{t+s+1}."""
    given = lesson(corpus, [3, 7])
    for s in range(3):
        reach, b, t = given.spots(s)
        spot = list(zip(b.tolist(), t.tolist(), strict=True))
        for (row, at), hidden in zip(spot, given.hidden[reach], strict=True):
            assert torch.equal(given.text.hidden[row, at + s + 1], hidden)
            answer = corpus.rows[[3, 7][row]].answer
            assert at + s + 2 >= answer  # it predicts a response token
    row = corpus.rows[3]
    count = int((given.rows == 0).sum())
    assert count == len(row.tokens) - row.answer


class Oracle(Head):
    """Says what the target says, from the features further on."""

    def rollout(self, text: Text, depth: int):
        """Feature ``t + s + 1`` in the place of a draft at depth ``s``."""
        out = []
        for s in range(depth):
            ahead = torch.zeros_like(text.hidden)
            ahead[:, : -s - 1] = text.hidden[:, s + 1 :]
            out.append(ahead)
        return out


def test_a_head_that_knows_the_features_agrees_at_every_depth(
    target, corpus
):
    words = ranked(corpus, V)
    head = Oracle(target, words)
    given = lesson(corpus, range(8))
    rows = target.head.weight[words]
    for depth in follow(head, given, rows, 3, match=1.0):
        assert float(depth.loss.abs().max()) < 1e-5
        assert depth.agree.all() and float(depth.alpha.min()) > 0.999
    late = Oracle(target, words)
    late.rollout = lambda text, n: Oracle.rollout(head, text, n + 1)[1:]
    assert follow(late, given, rows, 1)[0].agree.mean() < 0.9
    found = by_depth(target, {"oracle": head}, corpus, 3)["oracle"]
    assert min(found["agree"]) > 0.995 and min(found["alpha"]) > 0.995


def test_calibration_counts_every_position(target, corpus):
    head = Oracle(target, ranked(corpus, V))
    bins = calibration(target, head, corpus)
    assert sum(row[-1] for row in bins) == corpus.response_tokens
    for low, high, sure, right, n in bins:
        assert low - 1e-6 <= sure <= high + 1e-6
        assert n < 20 or right > 0.9


@pytest.mark.parametrize("name", RECIPES)
def test_training_raises_acceptance(target, corpus, tmp_path, name):
    recipe = replace(RECIPES[name], visits=160 * 120)
    trained(recipe, target, corpus, tmp_path)
    rows = log(tmp_path)
    first, last = rows[:10], rows[-10:]
    for depth in range(recipe.depth):
        gain = sum(r["alpha"][depth] for r in last) - sum(
            r["alpha"][depth] for r in first
        )
        assert gain / 10 > 0.03, (depth, gain)


@pytest.mark.parametrize("name", RECIPES)
def test_first_losses_are_those_on_record(target, corpus, tmp_path, name):
    """Fifty steps, the losses of another day and machine, to 1e-4."""
    trained(RECIPES[name], target, corpus, tmp_path, 50)
    mine = [row["loss"] for row in log(tmp_path)]
    want = json.loads(GOLDEN.read_text())[name]
    assert len(mine) == 50
    for a, b in zip(mine, want, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["medusa", "eagle", "eagle3"])
def test_resumed_equals_uninterrupted(target, corpus, tmp_path, name):
    recipe = RECIPES[name]
    whole = trained(recipe, target, corpus, tmp_path / "a", 9)
    half = heads.HeadTrainer(recipe, target, corpus, tmp_path / "b")
    half.run(4, save_every=4)
    rest = heads.HeadTrainer(recipe, target, corpus, tmp_path / "b")
    assert rest.step == 4
    rest.run(9)
    for a, b in zip(whole.weights, rest.weights, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another recipe"):
        heads.HeadTrainer(
            replace(recipe, seed=1), target, corpus, tmp_path / "b"
        )


def test_a_run_that_is_not_done_writes_no_head(
    target, corpus, tmp_path, capsys
):
    recipe = replace(RECIPES["mtp"], visits=160 * 4)
    heads.train_head(recipe, target, corpus, tmp_path, 2)
    assert "step 2 of 4" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.safetensors"))
    heads.train_head(recipe, target, corpus, tmp_path)
    file = tmp_path / "head-mtp.safetensors"
    about, state = read(file)
    assert about["kind"] == "mtp" and about["about"]["steps"] == 4
    assert not any(name.startswith("embed") for name in state)
    head = load_head(file, target)
    assert torch.equal(head.words, ranked(corpus, V))


def test_a_head_goes_on_from_another(target, corpus, tmp_path):
    recipe = replace(RECIPES["eagle"], visits=160 * 3)
    heads.train_head(recipe, target, corpus, tmp_path)
    file = str(tmp_path / "head-eagle.safetensors")
    next_one = replace(RECIPES["hass"], start_from=file)
    words = ranked(corpus, V)
    got = heads.begin(next_one, target, words).trained()
    _, state = read(Path(file))
    for name, tensor in got.items():
        assert torch.equal(tensor.bfloat16(), state[name])


def test_seeds_differ_and_bad_recipes_are_named(target):
    words = torch.arange(V)
    a, b = (
        heads.begin(replace(RECIPES["mtp"], seed=s), target, words).fc.weight
        for s in (0, 1)
    )
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        replace(RECIPES["mtp"], depth=0)
    with pytest.raises(ValueError, match="kind of head must be one of"):
        heads.begin(replace(RECIPES["mtp"], kind="x"), target, words)
    assert {r.kind for r in HEAD_RECIPES.values()} >= {
        r.kind for r in RECIPES.values()
    }
