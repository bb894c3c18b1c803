"""Losslessness: every rule on every proposal it admits, every method.

The law of the production loop, by enumeration, equals the target's own.
Tolerance 1e-12 in total variation.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    DRAFTS,
    EOS,
    GENERIC,
    GREEDY,
    MIXED,
    PROCESSED,
    TOLERANCE,
    TRAITS,
    Case,
    Draft,
    Memo,
    admitted,
    distance,
    model,
    output_law,
    truth,
    uniform_trait,
)
from tiny import llama
from toy_vocab import pair3

import specref
from specref.decode import Request, rounds
from specref.draft.lengths import schedule
from specref.draws import Draws
from specref.laws import Law, law, total_variation
from specref.lm import Table
from specref.registry import method, methods
from specref.rules import LOSSLESS
from specref.tree import IID
from specref.warp import Sampling, Warp

SAMPLING = [r for r in LOSSLESS.values() if r.name != "greedy"]


def sized(case: Case, draft: Draft) -> Case:
    """Four tokens, or three where i.i.d. trees have too many branches."""
    bushy = draft.kind == IID and not draft.is_chain
    return case.short(3) if bushy and case is not MIXED else case


PAIRS = [(r, d) for r in SAMPLING for d in DRAFTS if admitted(r, d)]


@pytest.mark.parametrize(
    "rule, draft", PAIRS, ids=lambda x: getattr(x, "name", "")
)
def test_rule_on_every_draft_that_it_admits(rule, draft):
    off = {
        str(case): distance(sized(case, draft), draft.make, rule)
        for case in CASES
    }
    assert max(off.values()) <= TOLERANCE, off


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize(
    "rule, draft",
    [
        ("tokenwise", "chain-iid"),
        ("block", "chain-iid"),
        ("recursive", "bushy-without_replacement"),
        ("traversal", "bushy-without_replacement"),
        ("kseq", "3-candidates"),
        ("naive", "bushy-deterministic"),
    ],
)
def test_one_relation_of_p_and_q_throughout(rule, draft, trait):
    case = Case(trait, *uniform_trait(trait, 3), new=3)
    if rule == "kseq":
        case = case.short(2)
    assert distance(case, BY_NAME[draft].make, LOSSLESS[rule]) <= TOLERANCE


@pytest.mark.parametrize("draft", DRAFTS, ids=str)
def test_greedy_follows_the_first_largest(draft):
    for rule in LOSSLESS.values():
        if admitted(rule, draft):
            assert distance(GREEDY, draft.make, rule) <= TOLERANCE


def test_cases_reach_every_relation():
    """The cases are as adversarial as they say: supports differ, laws
    coincide and tie, token 0 is drafted, EOS comes inside drafts."""
    seen = set()
    for tokens in truth(MIXED.short(3)):
        for n in range(len(tokens)):
            context = (*MIXED.prompt, *tokens[:n])
            p, q = (torch.tensor(f(context)) for f in (MIXED.p, MIXED.q))
            seen.add("equal") if torch.equal(p, q) else None
            seen.add("q only") if ((p == 0) & (q > 0)).any() else None
            seen.add("p only") if ((p > 0) & (q == 0)).any() else None
            seen.add("ties") if len(p.unique()) == 1 else None
    assert seen == {"equal", "q only", "p only", "ties"}
    ends = [t for t in truth(EOS) if len(t) < EOS.new]
    assert ends and all(t[-1] in EOS.eos for t in ends)
    assert any(0 in t for t in truth(MIXED))


TREES = {"widths": (2, 1)}
OPTIONS = {
    "autoregressive": {},
    "speculative": {"gamma": 3},
    "block": {"gamma": 3},
    "assisted": {"gamma": 2, "max_gamma": 3, "stop_below": 0.4},
    "prompt_lookup": {"gamma": 3},
    "spectr": {"k": 2, "gamma": 2},
    "specinfer": TREES,
    "naive": TREES,
    "rsd": TREES,
    "topk_tree": TREES,
    "traversal": TREES,
    "sequoia": {"accept": (0.6, 0.3, 0.1), "nodes": 4, "depth": 3},
    "dynamic": {"nodes": 4, "depth": 3, "width": 2},
    "universal": {"gamma": 3, **pair3()},
    "tli": {"gamma": 3, **pair3()},
}
# These draft with a copy or a part of a real module.
SELF_DRAFTED = ("int4", "int8", "early_exit")


def test_every_lossless_method_is_here():
    lossless = {m.name for m in methods() if m.lossless}
    headed = {m.name for m in methods() if "head" in m.options}
    # Heads are proved with their real modules, in test_heads*.py.
    assert lossless == {*OPTIONS, *SELF_DRAFTED} | headed & lossless
    for m in methods():
        if m.lossless and m.name in OPTIONS:
            target, draft = Table(MIXED.p, 3), Table(MIXED.q, 3)
            own = {"draft": draft} if "draft" in m.options else {}
            _, rule = m.parts(target, **own, **OPTIONS[m.name])
            assert rule.lossless


def method_law(name: str, case: Case, **options) -> Law:
    """Law of `specref.generate` on tables."""
    target, draft = Table(case.p, case.vocab), Table(case.q, case.vocab)
    if "draft" in method(name).options:
        options = {"draft": draft, **options}
    warp = case.sampling.warp

    def run(draws: Draws) -> specref.Report:
        return specref.generate(
            target,
            case.prompt,
            name,
            temperature=warp.temperature,
            top_k=warp.top_k,
            top_p=warp.top_p,
            processors=case.sampling.processors,
            max_new_tokens=case.new,
            eos=tuple(case.eos),
            draws=draws,
            **options,
        )

    return law(run, merge=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_method_by_name(name):
    big = name in ("spectr", "specinfer", "naive")
    for case in (*CASES, GREEDY):
        case = case.short(3 if big else 4)
        got = method_law(name, case, **OPTIONS[name])
        assert total_variation(got, truth(case)) <= TOLERANCE, str(case)


@pytest.mark.parametrize("name", ["constant", "heuristic"])
def test_other_schedules_by_name(name):
    options = {**OPTIONS["assisted"], "schedule": name}
    for case in (MIXED, EOS):
        got = method_law("assisted", case, **options)
        assert total_variation(got, truth(case)) <= TOLERANCE


# --- merging, batches -----------------------------------------------------


@pytest.mark.parametrize(
    "draft",
    [
        BY_NAME["schedule"],
        BY_NAME["bushy-without_replacement"],
        BY_NAME["lookup"],
    ],
    ids=str,
)
def test_merged_branches_have_the_same_law(draft):
    rule = LOSSLESS["naive" if draft.name == "lookup" else "recursive"]
    whole = output_law(EOS, draft.make, rule, merge=False)
    merged = output_law(EOS, draft.make, rule, merge=True)
    assert total_variation(whole, merged) <= TOLERANCE
    assert merged.branches != whole.branches  # they were merged


def test_a_key_without_the_schedule_would_be_wrong_to_merge():
    """The drafter's state is in the checkpoint's key: rows of the same
    tokens with different draft lengths are different states."""
    make = model((-1, 0, 1), IID, None, lambda: schedule("heuristic", 1, 3))
    drafter = make(Table(MIXED.q, 3))
    drafter.length.start(1)
    before = drafter.key()
    drafter.length.now[0] += 2
    assert drafter.key() != before != ()


def batch_law(
    case: Case, make, rule, prompts: list[tuple[int, ...]]
) -> Law:
    """Joint law of the rows of one batch."""
    target, draft = Table(case.p, case.vocab), Table(case.q, case.vocab)

    def run(draws: Draws) -> list[tuple[int, ...]]:
        own = [draws.row(b) for b in range(len(prompts))]
        ask = Request(prompts, own, case.new, case.sampling, case.eos)
        with torch.inference_mode():
            out = [() for _ in prompts]
            for r in rounds(target, make(draft), rule, ask):
                out = [o + tuple(t) for o, t in zip(out, r.tokens)]
        return out

    return law(run, merge=True)


def joint_truth(case: Case, prompts: list[tuple[int, ...]]) -> Law:
    """Rows are independent: the product of their solo laws."""
    one, two = (truth(case, prompt) for prompt in prompts)
    return Law(
        {(a, b): x * y for a, x in one.items() for b, y in two.items()}
    )


def batch_distance(case: Case, make, rule) -> float:
    prompts = [(1, 2), (0,)]
    got = batch_law(case, make, rule, prompts)
    return total_variation(got, joint_truth(case, prompts))


@pytest.mark.parametrize(
    "case, rule, draft",
    [
        (EOS, "tokenwise", "chain-iid"),
        (EOS, "tokenwise", "stop-chain"),
        (EOS, "block", "schedule"),
        (EOS, "recursive", "dynamic"),
        (EOS, "naive", "lookup"),
        (PROCESSED, "traversal", "bushy-deterministic"),
        (MIXED, "recursive", "3-distinct"),
        (MIXED, "tokenwise", "gaps"),
    ],
)
def test_rows_are_independent_and_each_has_its_solo_law(case, rule, draft):
    long = draft in ("lookup", "dynamic", "bushy-deterministic")
    case = case.short(3 if long else 2)
    got = batch_distance(case, BY_NAME[draft].make, LOSSLESS[rule])
    assert got <= TOLERANCE


def test_batch_by_name_equals_solo_by_name():
    """Seeded: row b of a batch says what it says alone on stream b."""
    target, draft = Table(GENERIC.p, 3), Table(GENERIC.q, 3)
    same = {"draft": draft, "gamma": 2, "temperature": 1.0}
    same |= {"max_new_tokens": 12}
    prompts = [[1, 2], [0], [2, 2, 1]]
    batch = specref.generate(target, prompts, "speculative", seed=5, **same)
    for b, prompt in enumerate(prompts):
        draws = specref.Seeded(5, b)
        solo = specref.generate(
            target, prompt, "speculative", draws=draws, **same
        )
        assert batch[b].tokens == solo.tokens


# --- real modules ---------------------------------------------------------

TINY = {"vocab_size": 3, "num_hidden_layers": 2, "hidden_size": 16}


@pytest.fixture(scope="module")
def modules():
    return llama(seed=1, **TINY), llama(seed=2, **TINY)


def module_law(
    target, drafter_of, rule, new: int, sampling: Sampling = Sampling()
) -> Law:
    def run(draws: Draws) -> list[int]:
        ask = Request([(1, 0)], [draws], new, sampling)
        with torch.inference_mode():
            loop = rounds(target, drafter_of(), rule, ask)
            return [t for r in loop for t in r.tokens[0]]

    return law(run, merge=True)


@pytest.mark.parametrize(
    "name", ["speculative", "block", "rsd", "dynamic", "assisted"]
)
def test_real_modules_as_target_and_draft(modules, name):
    target, draft = map(Memo, modules)
    case = Case("modules", target.probs, draft.probs)
    options = {**OPTIONS[name], "draft": draft}

    def drafter():
        return method(name).parts(target, **options)[0]

    rule = method(name).parts(target, **options)[1]
    got = module_law(target, drafter, rule, case.new)
    assert total_variation(got, truth(case)) <= TOLERANCE


@pytest.mark.parametrize("name", ["speculative", "rsd"])
def test_real_modules_with_their_own_caches(modules, name):
    """No memo: tree masks and cache commits are those of production."""
    target, draft = modules
    case = Case("caches", Memo(target).probs, Memo(draft).probs, new=2)
    options = {"gamma": 2} if name == "speculative" else {"widths": (2, 1)}
    rule = method(name).parts(target, draft=draft, **options)[1]

    def drafter():
        return method(name).parts(target, draft=draft, **options)[0]

    got = module_law(target, drafter, rule, case.new)
    assert total_variation(got, truth(case)) <= TOLERANCE


@pytest.mark.parametrize("name", SELF_DRAFTED)
def test_methods_that_draft_with_the_target_itself(name):
    """The copy's or exit's logits are memoised and widened to float64."""
    # int4 wants groups of 32 inputs and of 16 outputs; top-k keeps the
    # law narrow all the same.
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64}
    tiny = llama(seed=3, num_hidden_layers=2, **sizes)
    target, options = Memo(tiny), {"gamma": 2}
    if name == "early_exit":
        options["layers"] = 1
    drafter, rule = method(name).parts(tiny, **options)
    with torch.inference_mode():
        drafter.lm = Memo(drafter.lm)
    narrow = Sampling(Warp(1.0, top_k=2))
    case = Case(name, target.probs, drafter.lm.probs, 16, sampling=narrow)
    got = module_law(target, lambda: drafter, rule, case.new, narrow)
    assert rule.lossless
    assert total_variation(got, truth(case)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_models_bounds_the_bias(dtype):
    """Laws are formed in float32 at least: a draft of bfloat16 logits is
    sampled and judged by one law, so only float32's rounding is left."""

    class Narrow(Table):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            if out.logits is None:
                return out
            return replace(out, logits=out.logits.to(dtype))

    target, draft = Narrow(GENERIC.p, 3), Narrow(GENERIC.q, 3)

    def rounded(context):
        return target.law(context).log().to(dtype).double().softmax(-1)

    case = replace(GENERIC, p=lambda c: rounded(c).tolist(), new=3)
    drafter = BY_NAME["chain-iid"].make(draft)
    got = module_law(target, lambda: drafter, LOSSLESS["block"], 3)
    assert total_variation(got, truth(case)) <= 1e-6
