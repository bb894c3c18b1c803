"""The proof engine itself: exact, complete, and refusing to guess."""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, GENERIC, model, output_law

from specref.draft import shapes
from specref.laws import Law, law, total_variation
from specref.rules import LOSSLESS
from specref.tree import IID

HALF = torch.tensor(0.5)
THREE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_by_hand():
    def run(draws):
        if draws.bernoulli(torch.tensor(0.25, dtype=torch.float64)):
            return [9]
        return [int(draws.categorical(THREE)), 1]

    got = law(run)
    want = {(9,): 0.25, (0, 1): 0.375, (1, 1): 0.225, (2, 1): 0.15}
    assert set(got) == set(want) and got.branches == 4
    assert total_variation(got, want) < 1e-15


def test_outcomes_of_probability_zero_are_no_branches():
    got = law(lambda d: [int(d.categorical(torch.tensor([0.0, 2.0, 2.0])))])
    assert got == {(1,): 0.5, (2,): 0.5} and got.branches == 2
    sure = law(lambda d: [int(d.bernoulli(torch.tensor([1.0])))])
    assert sure == {(1,): 1.0} and sure.branches == 1


def test_draws_in_one_call_are_independent():
    got = law(lambda d: d.categorical(THREE.expand(2, -1)))
    want = {
        (i, j): float(THREE[i] * THREE[j]) for i in range(3) for j in range(3)
    }
    assert total_variation(got, want) < 1e-15 and got.branches == 9


def test_no_draws_at_all():
    assert law(lambda d: (4, 2)) == {(4, 2): 1.0}


def test_what_a_run_may_return():
    class Report:
        tokens = [3]

    for value in ([3], (3,), torch.tensor([3]), Report()):
        assert law(lambda d, v=value: v) == {(3,): 1.0}
    with pytest.raises(TypeError, match="run must be a function"):
        law([3])


def test_branches_of_a_chain():
    """V = 3, gamma = 2, four tokens: the counts are those of a tree walk
    and change only when the loop draws differently."""
    rule = LOSSLESS["tokenwise"]

    make = model(shapes.chain(2), IID)
    whole = output_law(GENERIC, make, rule, merge=False)
    merged = output_law(GENERIC, make, rule, merge=True)
    assert (whole.branches, merged.branches) == (981, 273)
    assert total_variation(whole, merged) < 1e-12


def test_merging_joins_states():
    """A walk of five steps on a line: 32 branches, 31 merged."""

    def run(draws):
        place = 0
        for _ in range(5):
            draws.checkpoint((place,))
            place += int(draws.bernoulli(HALF))
        return [place]

    whole, merged = law(run), law(run, merge=True)
    assert whole == merged
    assert whole[(2,)] == 10 / 32
    assert whole.branches == 32
    # One to the first checkpoint, then two per state of each step.
    assert merged.branches == 1 + 2 * (1 + 2 + 3 + 4 + 5)


def test_merging_by_a_key_that_forgets_is_wrong():
    """Why the key must hold all that the future depends on."""

    def run(draws):
        first = int(draws.bernoulli(HALF))
        draws.checkpoint(())
        return [first]

    assert law(run) == {(0,): 0.5, (1,): 0.5}
    assert law(run, merge=True) != law(run)


def test_a_run_without_end():
    def forever(draws):
        while not draws.bernoulli(HALF):
            pass
        return []

    with pytest.raises(RuntimeError, match="more than 50 draws.*bound"):
        law(forever, max_draws=50)


def test_too_many_branches():
    def wide(draws):
        return draws.categorical(THREE.expand(4, -1))

    assert law(wide, max_branches=81).branches == 81
    with pytest.raises(RuntimeError, match="more than 80 branches.*merge"):
        law(wide, max_branches=80)


def test_a_run_that_remembers_is_refused():
    calls = []

    def run(draws):
        calls.append(0)
        return [int(draws.categorical(THREE.roll(len(calls))))]

    with pytest.raises(RuntimeError, match="deterministic given its draws"):
        law(run)


def test_a_replay_that_turns_impossible_is_refused():
    calls = []

    def run(draws):
        calls.append(0)
        wide = [0.5, 0.5] if len(calls) == 1 else [1.0, 0.0]
        return [int(draws.categorical(torch.tensor(wide)))]

    with pytest.raises(RuntimeError, match="cannot be 1 in this replay"):
        law(run)


def test_total_variation():
    assert total_variation({(0,): 1.0}, {(1,): 1.0}) == 1.0
    assert total_variation({}, {}) == 0.0
    one = Law({(0,): 0.75, (1,): 0.25})
    assert total_variation(one, {(0,): 0.5, (2,): 0.5}) == 0.5
    assert total_variation(one, one) == 0.0


def test_enumeration_and_sampling_agree_on_impossible_outputs():
    rule, draft = LOSSLESS["recursive"], BY_NAME["3-distinct"]
    got = output_law(GENERIC.short(2), draft.make, rule)
    assert min(got.values()) > 0.0
