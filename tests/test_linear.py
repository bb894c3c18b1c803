"""The four ways to hold a weight, and what each may cost in precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specref.lm.drafts import quantized_copy
from specref.lm.linear import GROUP, NARROW, Linear


def layer(outputs: int = 48, inputs: int = 64, bias: bool = False) -> Linear:
    source = torch.Generator().manual_seed(0)
    out = Linear(inputs, outputs, bias)
    with torch.no_grad():
        for w in out.parameters():
            noise = torch.randn(w.shape, generator=source, dtype=torch.float64)
            w.copy_(noise)
    return out.requires_grad_(False)


def rows(n: int, inputs: int = 64) -> torch.Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randn(n, inputs, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_is_the_same_matrix(bias):
    one = layer(bias=bias)
    x = rows(5).float()
    want = F.linear(x, one.weight, one.bias)
    one.pack()
    torch.testing.assert_close(one(x), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.15)])
def test_rounding_is_as_small_as_its_bits_say(bits, most):
    one = layer().bfloat16()
    x = rows(3).bfloat16()
    want = F.linear(x.float(), one.weight.float())
    one.quantize(bits)
    gap = (one(x).float() - want).norm() / want.norm()
    assert 0 < float(gap) < most


def test_int4_gives_a_4_bit_file_its_own_weights_back():
    one = layer(32, GROUP * 2)
    codes = torch.arange(32 * GROUP * 2).remainder(16).view(32, -1)
    with torch.no_grad():
        one.weight.copy_(codes * 0.5 - 2.0)  # exact in bfloat16
    one = one.bfloat16()
    x = torch.eye(GROUP * 2).bfloat16()
    want = one.weight.clone().t()
    one.quantize(4)
    got = torch.cat([one(part) for part in x.split(8)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_go_through_the_exact_layer(bits):
    exact, one = layer(), layer().bfloat16()
    one.quantize(bits, exact)
    few, many = rows(NARROW[bits]), rows(NARROW[bits] + 1)
    x = many.bfloat16()
    assert torch.equal(one(x), exact(x.float()).bfloat16())
    x = few.bfloat16()
    assert not torch.equal(one(x), exact(x.float()).bfloat16())
    assert not list(one.children())  # no part of the module


def test_a_copy_reads_long_prompts_with_the_targets_own_layers():
    import tiny

    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 32}
    target = tiny.llama("llama", **sizes).float()
    copy = quantized_copy(target, 4)
    ids = torch.arange(24)[None] % 32

    def logits(lm, step):
        cache, out = lm.new_cache(1, 32), []
        for part in ids.split(step, 1):
            out.append(lm.forward(part, cache).logits.float())
            cache.keep()
        return torch.cat(out, 1)

    with torch.inference_mode():
        want = logits(target, 24)
        whole, bits = logits(copy, 24) - want, logits(copy, 4) - want
    # What is left is the rounding of bfloat16 activations.
    assert float(whole.norm()) < 0.5 * float(bits.norm())


@pytest.mark.parametrize(
    ("outputs", "inputs", "bits", "message"),
    [
        (48, 64, 3, "bits must be 8 or 4"),
        (48, 40, 4, "groups of 32"),
        (24, 64, 4, "groups of 16"),
    ],
)
def test_what_can_not_be_rounded(outputs, inputs, bits, message):
    with pytest.raises(ValueError, match=message):
        layer(outputs, inputs).bfloat16().quantize(bits)
