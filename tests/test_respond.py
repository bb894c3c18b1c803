"""Training responses: the target's own, whatever the batch they ran in."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import specref
from specref.train import respond as module
from specref.train.data import load_corpus
from specref.train.respond import TEMPERATURES, Responder, respond, save_shard

NEW = 9
SIZES = (5, 1, 3, 8, 2, 5, 4, 1, 7, 3, 6, 2)
PROMPTS = [
    [(7 * i + 3 * j * j) % 23 for j in range(n)] for i, n in enumerate(SIZES)
]


@pytest.fixture(scope="module")
def lm():
    """Ends on two of 23 tokens, so that rows leave at different times."""
    model = tiny.llama().float()
    model.eos = (4, 11)
    return model


def answers(lm, width: int, prompts=PROMPTS, first: int = 0, **options):
    options = {"max_new": NEW, "max_prompt": 16, **options}
    got = list(Responder(lm, width, **options).answer(prompts, first))
    assert len({r.number for r in got}) == len(got)
    return {r.number: r for r in got}


@pytest.fixture(scope="module")
def alone(lm):
    return answers(lm, 1)


@pytest.mark.parametrize("width", [2, 3, 5, 64])
def test_responses_do_not_depend_on_the_batch(lm, alone, width):
    got = answers(lm, width)
    assert got.keys() == alone.keys() == set(range(len(PROMPTS)))
    ends = set()
    for i, r in got.items():
        assert r.prompt == PROMPTS[i]
        assert r.tokens == alone[i].tokens
        assert r.temperature == TEMPERATURES[i % 3]
        close = {"atol": 2e-3, "rtol": 2e-3}  # stored as float16
        torch.testing.assert_close(hidden(r), hidden(alone[i]), **close)
        ends.add(len(r.tokens))
    assert len(ends) > 2  # rows did leave at different times


def hidden(r) -> torch.Tensor:
    return torch.cat(r.hidden)


def test_greedy_rows_are_autoregressive_decoding(lm):
    got = answers(lm, 4)
    for i in range(0, len(PROMPTS), 3):
        want = specref.generate(
            lm, PROMPTS[i], "autoregressive", max_new_tokens=NEW
        )
        assert got[i].tokens == want.tokens


def test_sampled_rows_follow_the_law(lm):
    """First tokens of one prompt, 3,000 draws: within 5 sigma of p."""
    n, prompt = 1000, PROMPTS[0]
    got = answers(lm, 250, [prompt] * 3 * n, max_new=1)
    with torch.inference_mode():
        logits = lm(torch.tensor([prompt])).logits[0, -1].double()
    for spot, heat in enumerate(TEMPERATURES):
        first = torch.tensor([got[i].tokens[0] for i in got if i % 3 == spot])
        count = torch.bincount(first, minlength=23)
        if heat == 0:
            assert count[logits.argmax()] == n
            continue
        p = (logits / heat).softmax(-1)
        sigma = (p * (1 - p) / n).sqrt()
        assert bool(((count / n - p).abs() <= 5 * sigma + 1 / n).all())


def test_features_give_back_the_law_of_every_position(lm, alone):
    for r in alone.values():
        text = [*r.prompt, *r.tokens]
        with torch.inference_mode():
            want = lm(torch.tensor([text[:-1]]))
            mine = lm.logits(hidden(r).float())
        assert hidden(r).shape == want.hidden[0].shape
        assert hidden(r).dtype == torch.float16
        gap = (mine.softmax(-1) - want.logits[0].softmax(-1)).abs().amax()
        assert float(gap) < 5e-3


def test_ends_are_kept_and_limits_are_exact(lm, alone):
    for r in alone.values():
        assert 1 <= len(r.tokens) <= NEW
        assert not set(r.tokens[:-1]) & set(lm.eos)
        if len(r.tokens) < NEW:
            assert r.tokens[-1] in lm.eos
    assert any(r.tokens[-1] in lm.eos for r in alone.values())
    assert any(len(r.tokens) == NEW for r in alone.values())


def test_prompts_that_are_too_long_are_left_out(lm):
    got = answers(lm, 3, max_prompt=5)
    want = {i for i, p in enumerate(PROMPTS) if len(p) <= 5}
    assert got.keys() == want


def test_a_seed_is_a_different_sample(lm, alone):
    other = answers(lm, 4, seed=1)
    differ = {i for i in other if other[i].tokens != alone[i].tokens}
    assert differ
    assert not any(TEMPERATURES[i % 3] == 0 for i in differ)


# Shards


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {f.name: load_file(f) for f in sorted(folder.iterdir())}


def run(lm, folder: Path, tokens: int = 10_000) -> int:
    return respond(
        lm,
        PROMPTS,
        folder,
        max_tokens=tokens,
        per_shard=4,
        width=3,
        max_new=NEW,
        max_prompt=16,
    )


def test_a_shard_comes_back_as_it_was(lm, alone, tmp_path):
    rows = [alone[i] for i in sorted(alone)]
    save_shard(tmp_path / "responses-00000.safetensors", rows)
    corpus = load_corpus(tmp_path)
    assert len(corpus) == len(rows)
    assert corpus.response_tokens == sum(len(r.tokens) for r in rows)
    for mine, r in zip(corpus.rows, rows, strict=True):
        assert mine.tokens.tolist() == [*r.prompt, *r.tokens]
        assert mine.answer == len(r.prompt)
        assert torch.equal(mine.hidden, hidden(r))


def test_an_interrupted_run_resumes_to_the_same_shards(
    lm, tmp_path, monkeypatch
):
    total = run(lm, tmp_path / "whole")
    whole = shards(tmp_path / "whole")
    assert list(whole) == [
        f"responses-{i:05d}.safetensors" for i in (0, 4, 8)
    ]
    assert total == sum(int(s["length"].sum()) for s in whole.values())

    saved, save = [], module.save_shard

    def failing(file, responses):
        if len(saved) == 1:
            file.with_suffix(".part").write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(file)
        save(file, responses)

    with monkeypatch.context() as m:
        m.setattr(module, "save_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            run(lm, tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 1
    assert run(lm, tmp_path / "cut") == total
    cut = shards(tmp_path / "cut")
    assert cut.keys() == whole.keys()
    for name, tensors in whole.items():
        for key, value in tensors.items():
            assert torch.equal(cut[name][key], value), (name, key)


def test_a_run_stops_at_its_number_of_tokens(lm, tmp_path):
    few = run(lm, tmp_path, tokens=1)
    assert list(shards(tmp_path)) == ["responses-00000.safetensors"]
    assert run(lm, tmp_path, tokens=1) == few  # nothing more to do
    more = run(lm, tmp_path, tokens=few + 1)
    assert more > few
    assert len(shards(tmp_path)) == 2
