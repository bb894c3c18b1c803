"""LoRA and Medusa-2: what is changed, and with respect to what it is exact."""

from __future__ import annotations

import json

import pytest
import torch
from every import greedy_reference
from tiny import llama

from specref.decode import Request, rounds
from specref.draft import shapes
from specref.draft.grow import Static
from specref.draft.head import HeadDrafter
from specref.draws import Seeded
from specref.heads.files import load_head, save_head
from specref.heads.medusa import Medusa
from specref.lm import lora
from specref.lm.drafts import WEIGHTS
from specref.rules import LOSSLESS
from specref.train.data import Corpus, Row
from specref.train.medusa2 import (
    Medusa2Recipe,
    Medusa2Trainer,
    drift,
    finish,
    mark,
)
from specref.tree import DETERMINISTIC
from specref.warp import Sampling, Warp

TOKENS = torch.tensor([[1, 5, 3, 2, 9, 11, 4]])
RECIPE = Medusa2Recipe(rank=2, visits=1600, batch=40, rate=0.003)


def changed(seed: int = 1, rank: int = 2):
    """A model with LoRAs that do something."""
    lm = llama()
    loras = lora.attach(lm, rank)
    lora.fill(loras, Seeded(seed))
    source = Seeded(seed, 1)
    with torch.no_grad():
        for one in loras.values():
            one.b.copy_(0.1 * source.uniform(one.b.shape))
    return lm, loras


def logits(lm) -> torch.Tensor:
    with torch.inference_mode():
        return lm.forward(TOKENS).logits


def near(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> bool:
    return torch.allclose(a, b, atol=atol, rtol=0)


def test_a_new_lora_changes_nothing_and_can_be_switched_off():
    before = logits(llama())
    lm = llama()
    lora.fill(lora.attach(lm, 3), Seeded(0))
    assert near(logits(lm), before)
    lm, loras = changed()
    assert not near(logits(lm), before, 1e-3)
    with lora.off(loras):
        assert near(logits(lm), before)
    with pytest.raises(RuntimeError), lora.off(loras):
        raise RuntimeError
    assert not near(logits(lm), before, 1e-3)


def test_every_matrix_is_covered():
    lm, loras = changed()
    assert len(loras) == 4 * len(lm.layers)
    for name, one in loras.items():
        with lora.off({n: x for n, x in loras.items() if n != name}):
            assert not near(logits(lm), logits(llama()), 1e-6), name
        assert not one.base.weight.requires_grad


def test_merging_is_the_same_model():
    lm, loras = changed()
    want = logits(lm)
    merged = lora.detach(lm, loras)
    assert near(logits(merged), want)
    assert not any(isinstance(m, lora.LoRA) for m in merged.modules())
    lm, loras = changed()
    assert near(logits(lora.detach(lm, loras, merge=False)), logits(llama()))


def test_the_file_gives_the_rounded_change_back(tmp_path):
    lm, loras = changed()
    lora.save(loras, tmp_path / "change.safetensors", {"note": "x"})
    with torch.no_grad():
        for one in loras.values():
            one.a.copy_(one.a.bfloat16())
            one.b.copy_(one.b.bfloat16())
    got = lora.merge_file(llama(), tmp_path / "change.safetensors")
    assert near(logits(got), logits(lm))


def test_files_that_do_not_fit(tmp_path):
    _, loras = changed()
    file = tmp_path / "change.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        lora.merge_file(llama(), file)
    lora.save(loras, file)
    other = llama(num_hidden_layers=2)
    before = logits(other)
    with pytest.raises(ValueError, match="has unknown tensors, such as"):
        lora.merge_file(other, file)
    with pytest.raises(ValueError, match="lacks tensors, such as"):
        lora.merge_file(llama(num_hidden_layers=4), file)
    with pytest.raises(ValueError, match="for another model"):
        lora.merge_file(llama(intermediate_size=52), file)
    assert near(logits(other), before, 0.0)  # refused before any change
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated or altered"):
        lora.merge_file(llama(), file)


def test_bad_use():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lora.attach(llama(), 0)
    lm = llama()
    lora.attach(lm)
    with pytest.raises(ValueError, match="attach once"):
        lora.attach(lm)


# --- training -------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    """Greedy responses of the tiny model, with its features."""
    lm, rows = llama(), []
    for n in range(24):
        draw = Seeded(n).uniform((4,)).mul(23).long().tolist()
        ids = draw + greedy_reference(lm, draw, 10)
        with torch.inference_mode():
            hidden = lm.forward(torch.tensor([ids[:-1]]), logits=False)
        rows.append(Row(torch.tensor(ids), hidden.hidden[0].float(), 4))
    return Corpus(rows)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Medusa-1 heads as a file."""
    file = tmp_path_factory.mktemp("heads") / "head-medusa.safetensors"
    options = {"heads": 3, "mix": True}
    head = Medusa(llama(), torch.arange(20), **options)
    save_head(head, file, "medusa", options)
    return file


def begun(corpus, start, folder):
    return Medusa2Trainer(RECIPE, llama().float(), start, corpus, folder)


def test_training_starts_at_the_teacher_and_learns(corpus, start, tmp_path):
    run = begun(corpus, start, tmp_path)
    given = next(run._lessons(0, 1))
    with torch.no_grad():
        first = mark(run.tuned, given, RECIPE)
    assert first.kl == pytest.approx(0.0, abs=1e-4) and first.same > 0.99
    frozen = {
        n: w.clone()
        for n, w in run.tuned.named_parameters()
        if not w.requires_grad
    }
    run.run()
    with torch.no_grad():
        last = mark(run.tuned, given, RECIPE)
    assert float(last.loss) < float(first.loss) - 0.05
    assert last.kl > 1e-4  # it is another model now
    for name, weight in run.tuned.named_parameters():
        if name in frozen:
            assert torch.equal(weight, frozen[name]), name
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == RECIPE.steps
    assert {"kl", "same", "agree", "loss"} <= set(json.loads(lines[0]))


def test_an_interrupted_run_ends_as_a_whole_one(corpus, start, tmp_path):
    whole = begun(corpus, start, tmp_path / "whole")
    whole.run()
    begun(corpus, start, tmp_path / "part").run(5)
    part = begun(corpus, start, tmp_path / "part")
    assert part.step == 5
    part.run()
    for a, b in zip(whole.weights, part.weights, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def done(corpus, start, tmp_path_factory):
    """Files of a finished run."""
    out = tmp_path_factory.mktemp("out")
    run = begun(corpus, start, out / "run")
    run.run()
    return finish(run, out)


def test_lossless_with_respect_to_its_own_model_only(done):
    """The tuned model's greedy tokens, which are not the first model's."""
    change, heads = done
    tuned = lora.merge_file(llama(), change)
    head = load_head(heads, tuned)
    drafter = HeadDrafter(
        head, Static(shapes.branching((2, 2, 1)), DETERMINISTIC)
    )
    differ = 0
    for prompt in ([1, 2, 3], [7, 8], [4, 4, 9, 2], [15], [0, 21]):
        ask = Request([prompt], [Seeded(0)], 12, Sampling(Warp(0.0)))
        with torch.inference_mode():
            loop = rounds(tuned, drafter, LOSSLESS["recursive"], ask)
            got = [t for r in loop for t in r.tokens[0]]
        assert got == greedy_reference(tuned, prompt, 12)
        differ += got != greedy_reference(llama(), prompt, 12)
    assert differ


def test_drift(done, corpus):
    same = drift(llama(), llama(), corpus)
    assert same["kl"] == pytest.approx(0.0, abs=1e-12)
    assert same["tv"] == 0.0 and same["same"] == 1.0
    assert same["tokens"] == corpus.response_tokens
    far = drift(llama(), lora.merge_file(llama(), done[0]), corpus)
    assert 0.0 < far["tv"] < 1.0 and far["kl"] >= 2 * far["tv"] ** 2 - 1e-6


# --- the shipped pair -----------------------------------------------------


@pytest.mark.skipif(
    not (WEIGHTS / "lora-medusa2.safetensors").exists(),
    reason="no tuned model is shipped: train it with `specref train medusa2`",
)
def test_the_shipped_model_and_its_heads(real):
    """Its own greedy tokens, by another law than the first model's; the
    first model is left as it was."""
    import specref

    tuned = specref.load("smollm2-135m-medusa2")
    ask = "Name three rivers in Europe."
    row = torch.tensor([real.encode(ask)])
    with torch.inference_mode():
        p, q = (
            lm.forward(row).logits[0, -1].softmax(-1)
            for lm in (real.lm, tuned.lm)
        )
    off = float(0.5 * (p - q).abs().sum())
    assert 1e-3 < off < 0.5
    plain = specref.generate(tuned, ask, "autoregressive", max_new_tokens=24)
    got = specref.generate(
        tuned,
        ask,
        "medusa",
        head="medusa2",
        shape=shapes.branching((3, 2, 1)),
        max_new_tokens=24,
    )
    assert got.tokens == plain.tokens and got.tau > 1.2
    with pytest.raises(ValueError, match="does not exist"):
        lora.merge_file(tuned.lm, tuned.folder / "no.safetensors")
