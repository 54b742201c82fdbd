"""Integers of the kernels: every sum, difference and product is checked for overflow, in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from numerics import HAS_GPU, check_attention, draw

from fla.ops.attn.softpick import (
    naive_normalized_attn_decode,
    parallel_normalized_attn,
    softpick_attn_decode,
)

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the interpreter is off where there is a GPU")


@pytest.fixture(autouse=True)
def _checked():
    # other tests are faster without it
    triton_interpreter.check_overflow(True)
    yield
    triton_interpreter.check_overflow(False)


def test_no_integer_of_forward_and_backward_overflows():
    kwargs = {
        "cu_seqlens": torch.tensor([0, 7, 7, 70]),
        "window_size": 40,
        "sink_bias": torch.tensor([0.0, 1.0]),
    }
    check_attention(parallel_normalized_attn, draw(70, HQ=2, H=1), normalizer="softpick", **kwargs)


def test_no_integer_of_decoding_overflows():
    q, k, v, _ = draw(2, B=2, HQ=4, H=2, S=40)
    lengths = torch.tensor([40, 9], dtype=torch.int32)
    kwargs = {"window_size": 20, "sink_bias": torch.zeros(4)}
    o = softpick_attn_decode(q, k, v, lengths, **kwargs)
    expected = naive_normalized_attn_decode(q, k, v, lengths, normalizer="softpick", **kwargs)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)


@triton.jit
def square(x):
    i = tl.load(x)
    tl.store(x, i * i)


def test_an_overflow_is_found():
    with pytest.raises(triton.TritonError, match="int32 overflow"):
        square[(1,)](torch.tensor([2**20], dtype=torch.int32))
