"""The trainer: the right start, seeded, resumable, and it does learn."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from specref.lm.drafts import load_draft, save_draft, skeleton
from specref.train import distill, report, score
from specref.train.data import Corpus, Row, batches, frequent, load_corpus
from specref.train.prune import prune
from specref.train.recipes import LOSSES, Recipe
from specref.train.respond import respond

V = 23
RECIPE = Recipe(
    "tiny", (0, 2), vocab=V, visits=4_000, batch=100, rate=3e-3
)


@pytest.fixture(scope="module")
def target():
    return tiny.llama("llama-tied").float()


@pytest.fixture(scope="module")
def corpus(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    prompts = [[i % V, (3 * i) % V, 7] for i in range(48)]
    respond(
        target, prompts, folder, max_tokens=10_000, per_shard=16, max_new=20,
        max_prompt=8, width=8,
    )
    return load_corpus(folder)


def test_corpus_holds_the_targets_own_features(target, corpus):
    assert len(corpus) == 48 and corpus.response_tokens == 48 * 20
    row = corpus.rows[5]
    with torch.inference_mode():
        hidden = target.forward(row.tokens[None, :-1]).hidden[0]
    assert row.hidden.shape == hidden.shape
    torch.testing.assert_close(row.hidden.float(), hidden, atol=5e-3, rtol=0)


def test_head_of_a_corpus_counts_response_tokens(corpus):
    part = corpus.head(50)
    assert len(part) == 3 and part.response_tokens == 60


def test_a_draft_of_all_layers_agrees_with_the_target(target, corpus):
    recipe = replace(RECIPE, layers=(0, 1, 2))
    draft = distill.start(recipe, target, frequent(corpus, V))
    score = distill.evaluate(draft, target, corpus, recipe)
    assert score["agree"] > 0.995 and score["alpha"] > 0.995
    assert score["tokens"] == corpus.response_tokens


def test_start_copies_the_named_layers_and_freezes_the_first(target, corpus):
    recipe = replace(RECIPE, layers=(1, 2), frozen=1)
    draft = distill.start(recipe, target, frequent(corpus, V))
    assert torch.equal(draft.layers[0].o.weight, target.layers[1].o.weight)
    assert torch.equal(draft.layers[1].o.weight, target.layers[2].o.weight)
    assert not draft.layers[0].o.weight.requires_grad
    assert draft.layers[1].o.weight.requires_grad
    assert not draft.embed.weight.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_training_raises_acceptance(target, corpus, tmp_path, loss):
    recipe = replace(RECIPE, loss=loss)
    trainer = distill.Trainer(recipe, target, corpus, tmp_path)
    before = distill.evaluate(trainer.draft, target, corpus, recipe)
    trainer.run()
    after = distill.evaluate(trainer.draft, target, corpus, recipe)
    assert after["alpha"] > before["alpha"] + 0.05
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == recipe.steps
    assert {"step", "loss", "agree", "alpha"} <= set(json.loads(lines[0]))


def weights(trainer):
    return [w.detach().clone() for w in trainer.weights]


def test_resumed_equals_uninterrupted_and_seeds_differ(
    target, corpus, tmp_path
):
    whole = distill.Trainer(RECIPE, target, corpus, tmp_path / "a")
    whole.run(12)
    half = distill.Trainer(RECIPE, target, corpus, tmp_path / "b")
    half.run(5, save_every=5)
    rest = distill.Trainer(RECIPE, target, corpus, tmp_path / "b")
    assert rest.step == 5
    rest.run(12)
    for a, b in zip(weights(whole), weights(rest), strict=True):
        assert torch.equal(a, b)
    other = replace(RECIPE, seed=1)
    fresh = distill.Trainer(other, target, corpus, tmp_path / "c")
    fresh.run(12)
    assert not torch.equal(weights(fresh)[0], weights(whole)[0])


def test_a_state_of_another_recipe_is_refused(target, corpus, tmp_path):
    distill.Trainer(RECIPE, target, corpus, tmp_path).run(1)
    with pytest.raises(ValueError, match="another recipe"):
        distill.Trainer(
            replace(RECIPE, rate=1.0), target, corpus, tmp_path
        )


def test_batches_resume_anywhere_and_cover_an_epoch(corpus):
    stream = list(batches(corpus, 100, 0, 0, 30))
    late = list(batches(corpus, 100, 0, 20, 30))
    for a, b in zip(stream[20:], late, strict=True):
        assert torch.equal(a.tokens, b.tokens)
    rows = sum(len(b.tokens) for b in stream[:12])  # 12 batches an epoch
    assert rows == len(corpus)


def test_batch_positions_point_at_the_right_features():
    row = Row(torch.tensor([4, 5, 6, 7]), torch.arange(6.0).view(3, 2), 2)
    long = Row(torch.arange(6), torch.arange(10.0).view(5, 2), 3)
    batch = Corpus([row, long]).batch([0, 1])
    assert batch.tokens.tolist() == [[4, 5, 6, 0, 0], [0, 1, 2, 3, 4]]
    where = list(zip(batch.rows.tolist(), batch.columns.tolist()))
    assert where[:4] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert batch.hidden[2].tolist() == [4.0, 5.0]
    # The position of the last prompt token predicts the first response one.
    assert batch.answer.tolist() == [False, True, True] + [False] * 2 + [
        True
    ] * 3


def test_frequent_counts_responses_and_fills_up_from_the_lowest():
    row = Row(torch.tensor([9, 9, 5, 5, 3]), torch.zeros(4, 2), 2)
    assert frequent(Corpus([row]), 4).tolist() == [0, 1, 3, 5]


def test_file_holds_only_what_was_trained(target, corpus, tmp_path):
    recipe = replace(RECIPE, layers=(0, 1, 2), frozen=2)
    trainer = distill.Trainer(recipe, target, corpus, tmp_path)
    trainer.run(3)
    file = tmp_path / "draft.safetensors"
    save_draft(trainer.draft, file, shared=(0, 1))
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        names = set(f.keys())
    assert "layers.2.o.weight" in names and "head_vocab" in names
    assert not any(n.startswith(("layers.0", "layers.1.", "embed", "head.w"))
                   for n in names)
    back = load_draft(file, target)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        mine = back.forward(ids, back.new_cache(1, 9)).logits
        want = trainer.draft.forward(ids).logits
    torch.testing.assert_close(mine, want, atol=0.05, rtol=0.05)  # bf16


def test_a_trained_head_travels_with_the_draft(target, corpus, tmp_path):
    recipe = replace(RECIPE, layers=(0, 1, 2), head=True, rate=1e-2)
    trainer = distill.Trainer(recipe, target, corpus, tmp_path)
    trainer.run(3)
    distill.finish(trainer, tmp_path)
    back = load_draft(tmp_path / "draft-tiny.safetensors", target)
    gap = (back.head.weight - trainer.draft.head.weight).abs().max()
    moved = (back.head.weight - target.head.weight).abs().max()
    assert gap < 0.01 < moved


def test_reduced_vocabulary_gets_no_mass_elsewhere(target):
    words = torch.tensor([0, 3, 22])
    draft = skeleton(target.config, words, target)
    draft.layers.load_state_dict(target.layers.state_dict())
    draft.norm.load_state_dict(target.norm.state_dict())
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        mine = draft.forward(ids).logits[0]
        full = target.forward(ids).logits[0]
    torch.testing.assert_close(mine[:, words], full[:, words])
    rest = torch.ones(V, dtype=torch.bool)
    rest[words] = False
    assert bool((mine[:, rest] == -torch.inf).all())


def test_prune_takes_out_the_idle_layer_first(target):
    idle = tiny.llama("llama-tied")
    with torch.no_grad():
        for weight in (idle.layers[1].o.weight, idle.layers[1].down.weight):
            weight.zero_()
    steps = prune(idle, torch.arange(20).view(2, 10), 1, vocab=V)
    assert steps[0][0] == [0, 2] and steps[0][1] < 1e-9
    assert len(steps) == 2 and steps[1][1] > steps[0][1]
    with pytest.raises(ValueError, match="keep must be"):
        prune(idle, torch.arange(4)[None], 9)


def test_curve_trains_on_more_and_more_and_is_scored(
    target, corpus, tmp_path, monkeypatch
):
    monkeypatch.setitem(report.RECIPES, "small", replace(RECIPE, name="small"))
    report.train_curve(target, corpus, tmp_path, (100, 400), visits=300)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.glob("draft-*")}
    report.train_curve(target, corpus, tmp_path, (100, 400), visits=300)
    assert before == {f: f.stat().st_mtime_ns for f in before}  # kept
    loaded = SimpleNamespace(lm=target)
    table = report.curve(loaded, tmp_path, corpus)
    assert [row["tokens"] for row in table] == [100, 400]
    for row in table:
        assert row["visits"] == 300 and 0 < row["alpha"] <= 1


def test_score_asks_at_every_response_position(target, corpus):
    found = score.agreement(target, target, corpus)
    assert found["tokens"] == corpus.response_tokens
    assert found["agree"] > 0.99 and found["alpha"] > 0.99
    other = tiny.llama("llama-tied", seed=3).float()
    assert score.agreement(other, target, corpus)["alpha"] < 0.9


@pytest.mark.parametrize(
    "change, message",
    [({"loss": "js"}, "loss must be"), ({"frozen": 2}, "frozen must be")],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **change)


def test_a_layer_that_the_target_lacks(target, corpus):
    with pytest.raises(ValueError, match="layers must be"):
        distill.start(
            replace(RECIPE, layers=(0, 9)), target, frequent(corpus, V)
        )


def test_no_data_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="specref train responses"):
        load_corpus(tmp_path)
