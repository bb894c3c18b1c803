"""Every method that drafts with a head, by name: its law, its tokens."""

from __future__ import annotations

import every
import heads
import pytest
from cases import TOLERANCE, Case, Memo, truth

import specref
from specref.draws import Draws
from specref.heads.files import save_head
from specref.laws import law, total_variation
from specref.registry import method, methods
from specref.warp import Sampling, Warp

HEADED = [m.name for m in methods() if "head" in m.options]
LOSSLESS = [name for name in HEADED if method(name).lossless]
SIZES = {**heads.SMALL}


def small_options(name: str) -> dict:
    """Options for `heads.target`, whose vocabulary has three tokens."""
    takes = method(name).options
    kind = {"eagle2": "eagle", "fr_spec": "eagle", "glide_cape": "glide",
            "medusa_typical": "medusa"}.get(name, name)
    out = {"head": every.head_for(kind, seed=1, **SIZES)}
    if "shape" in takes:
        out["shape"] = (-1, -1, 0)
    if "nodes" in takes and "depth" in takes:
        out |= {"nodes": 4, "depth": 3, "width": 2}
    if "gamma" in takes:
        out["gamma"] = 2
    if name == "fr_spec":
        out["vocab"] = 1
    if "bins" in takes:
        out["bins"] = (2, 1)
    return out


def method_law(name: str, **warp):
    lm = heads.target()
    options = small_options(name)

    def run(draws: Draws) -> specref.Report:
        return specref.generate(
            lm, (1, 0), name, max_new_tokens=4, draws=draws, eos=(),
            **warp, **options,
        )

    p = Memo(lm).probs
    case = Case("method", p, p, 3, sampling=Sampling(Warp(**warp)))
    return total_variation(law(run, merge=True), truth(case))


@pytest.mark.parametrize(
    "warp",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LOSSLESS)
def test_law_by_name(name, warp):
    assert method_law(name, **warp) <= TOLERANCE


def test_typical_acceptance_is_biased_and_says_so():
    assert not method("medusa_typical").lossless
    assert method_law("medusa_typical", temperature=1.0) > 1e-3


@pytest.mark.parametrize("name", HEADED)
def test_a_head_for_another_target_is_refused(name, tmp_path):
    head = every.head_for("mtp")
    file = tmp_path / "head.safetensors"
    save_head(head, file, "mtp", {})
    with pytest.raises(ValueError, match="another target"):
        options = small_options(name) | {"head": str(file)}
        specref.generate(
            heads.target(hidden_size=24), (1, 0), name, **options,
            max_new_tokens=4,
        )


def test_an_unknown_head_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown head 'nope': give one"):
        specref.generate(
            heads.target(), (1, 0), "eagle3", head="nope", max_new_tokens=4
        )
