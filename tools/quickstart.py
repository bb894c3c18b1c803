"""A first run on the real model: text, tau and speedup.

    python tools/quickstart.py

The same prompt is decoded plainly and speculatively, three times in turn,
after a short run of each that warms the caches; the speedup is the median
of the three ratios.  At temperature 0 the two must write the same tokens,
or this fails.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import specref  # noqa: E402

QUESTION = "Explain how rainbows form, step by step."
TOKENS = 64
PAIRS = 3
METHODS = ("autoregressive", "auto")


def main() -> int:
    model = specref.load("smollm2-135m")

    def run(method: str, tokens: int = TOKENS) -> specref.Report:
        return specref.generate(
            model, QUESTION, method, max_new_tokens=tokens
        )

    for method in METHODS:
        run(method, 4)
    pairs = [[run(method) for method in METHODS] for _ in range(PAIRS)]
    ratios = [fast.tokens_per_s / plain.tokens_per_s for plain, fast in pairs]
    print(f"\n{QUESTION}\n\n{pairs[0][1].text.strip()}\n")
    for name, r in zip(("plain", "speculative"), pairs[0], strict=True):
        print(
            f"{name:12} {len(r.tokens)} tokens in {len(r.rounds)} target "
            f"calls: tau {r.tau:.2f}, {r.tokens_per_s:.1f} tokens/s"
        )
    same = all(plain.tokens == fast.tokens for plain, fast in pairs)
    print(
        f"speedup {statistics.median(ratios):.2f} (median of {PAIRS} pairs, "
        f"this machine), same tokens: {same}\n"
    )
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
