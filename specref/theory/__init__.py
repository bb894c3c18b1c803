"""Closed forms of speculative decoding: numpy and float64, no torch.

Each is exact, names its source, and is checked against enumeration of the
production code by ``tests/test_theory*.py``.  Laws are arrays ``[V]``; what
a count includes is said in each docstring.

Does not handle: context-dependent laws, which `specref.law` enumerates.
"""

from specref.theory.acceptance import (
    alpha,
    lenient_alpha,
    lenient_law,
    rejection_sampling_alpha,
    residual,
    tv,
)
from specref.theory.block import (
    block_bound,
    block_expected_accepted,
    token_expected_accepted,
)
from specref.theory.costs import ridge, roofline, roofline_ratio
from specref.theory.multidraft import (
    deterministic_topk,
    kseq,
    kseq_residual,
    naive,
    optimal_transport,
    recursive_rejection,
    single,
)
from specref.theory.trees import best_tree, sequoia, sequoia_values
from specref.theory.walltime import (
    expected_tokens,
    expected_tokens_by_depth,
    expected_tokens_mixture,
    guaranteed_speedup,
    mixture_by_depth,
    operations,
    optimal_gamma,
    oracle,
    pass_cost,
    speedup,
)

__all__ = [
    "alpha",
    "best_tree",
    "block_bound",
    "block_expected_accepted",
    "deterministic_topk",
    "expected_tokens",
    "expected_tokens_by_depth",
    "expected_tokens_mixture",
    "guaranteed_speedup",
    "kseq",
    "kseq_residual",
    "lenient_alpha",
    "lenient_law",
    "mixture_by_depth",
    "naive",
    "operations",
    "optimal_gamma",
    "optimal_transport",
    "oracle",
    "pass_cost",
    "recursive_rejection",
    "rejection_sampling_alpha",
    "residual",
    "ridge",
    "roofline",
    "roofline_ratio",
    "sequoia",
    "sequoia_values",
    "single",
    "speedup",
    "token_expected_accepted",
    "tv",
]
