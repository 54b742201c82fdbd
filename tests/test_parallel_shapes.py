"""The Triton operators against the references over lengths, heads, head dimensions and dtypes: outputs and gradients.

Without a GPU the kernels run in Triton's interpreter. In float32 a forward tile has 64 rows and a backward tile 32 at
head dimensions that are multiples of 16, and both have 16 at others. Every shape that no other covers runs by default.
"""

import pytest
import torch
from numerics import check_attention, draw, each_case, each_normalizer, quick_normalizers, with_slow

from fla.ops.attn.softpick import naive_normalized_attn, parallel_normalized_attn
from fla.ops.attn.softpick.naive import EPS


def check(inputs, device, **kwargs):
    return check_attention(parallel_normalized_attn, inputs.to(device), **kwargs)


SHAPES = {
    "one-token": {"T": 1, "HQ": 2},
    "two-tokens": {"T": 2, "HQ": 2, "B": 2},
    "tile-less-1": {"T": 63},
    "tile": {"T": 64},
    "tile-and-1": {"T": 65},
    "large-tile-and-1": {"T": 129, "K": 32},
    "ragged-tail": {"T": 150},
    "odd-dims": {"T": 65, "K": 60, "V": 20},
    "smallest-dims": {"T": 33, "K": 1, "V": 1, "HQ": 2},
    "narrow-key": {"T": 33, "K": 7, "V": 72},
    "gqa-batch": {"T": 20, "HQ": 4, "H": 2, "B": 2},
    "mqa-8": {"T": 20, "HQ": 8, "H": 1},
    "last-token": {"T": 1, "S": 65, "HQ": 2},
    "chunk": {"T": 5, "S": 70, "HQ": 2},
    "chunk-one-key-into-the-next-tile": {"T": 64, "S": 65},
    "chunk-gqa-ragged-tail": {"T": 65, "S": 101, "HQ": 2, "H": 1},
    "fewer-keys-than-queries": {"T": 150, "S": 70, "HQ": 2, "H": 1},
    "one-key": {"T": 70, "S": 1},
}


@each_case(
    "shape",
    SHAPES,
    softpick=(
        "one-token",
        "tile-and-1",
        "odd-dims",
        "gqa-batch",
        "last-token",
        "chunk-one-key-into-the-next-tile",
        "chunk-gqa-ragged-tail",
        "fewer-keys-than-queries",
        "one-key",
    ),
    softmax=("ragged-tail", "chunk-gqa-ragged-tail", "fewer-keys-than-queries"),
    others=("ragged-tail",),
)
def test_shape(normalizer, shape, device):
    check(draw(**SHAPES[shape]), device, normalizer=normalizer)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"T": 129, "K": 128}, id="128"),
        pytest.param({"T": 40, "K": 256, "HQ": 2, "H": 1}, id="256-gqa"),
        pytest.param({"T": 40, "K": 96, "V": 160}, id="96-160"),
    ],
)
@pytest.mark.parametrize("dtype", with_slow([torch.float32, torch.bfloat16], [torch.bfloat16]))
@pytest.mark.parametrize("normalizer", with_slow(["softpick", "softmax"], ["softpick"]))
def test_large_head_dimension(normalizer, dtype, shape, device):
    check(draw(**shape, dtype=dtype), device, normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("safe", with_slow([True, False], [True]), ids=["safe", "unsafe"])
@quick_normalizers("softpick", "softmax")
def test_half_precision(normalizer, safe, dtype, device):
    inputs = draw(101, K=32, HQ=2, H=1, dtype=dtype)
    check(inputs, device, normalizer=normalizer, safe=safe)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 5, 5), (2, 0, 7), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("has_sink", [False, True])
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
@pytest.mark.parametrize("attn", [naive_normalized_attn, parallel_normalized_attn])
def test_nothing_to_attend_to_gives_0(attn, normalizer, has_sink, B, T, S, device):
    q, k = (torch.randn(B, n, 4, 16, device=device, requires_grad=True) for n in (T, S))
    v = torch.randn(B, S, 4, 24, device=device, requires_grad=True)
    leaves, options = [q, k, v], {"normalizer": normalizer}
    constant = EPS if normalizer == "softpick" else 0.0
    if has_sink:
        sink_bias = torch.linspace(-1, 1, 4, device=device, requires_grad=True)
        leaves.append(sink_bias)
        options["sink_bias"] = sink_bias
    o, lse = attn(q, k, v, **options, return_lse=True)
    assert torch.equal(o, torch.zeros(B, T, 4, 24, device=device))
    z = constant + (sink_bias.exp() if has_sink else torch.zeros(4, device=device))
    expected = z.log()[None, :, None].expand(B, 4, T)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-6)
    weight = torch.rand_like(lse)
    grads = torch.autograd.grad((o, lse), leaves, (torch.ones_like(o), weight))
    for x, grad in zip(leaves[:3], grads, strict=False):
        assert torch.equal(grad, torch.zeros_like(x))
    if has_sink:
        d_sink = weight.sum((0, 2)) * sink_bias.exp() / z
        torch.testing.assert_close(grads[3], d_sink, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"T": 1000, "K": 64, "B": 2, "HQ": 8}, id="mha-64"),
        pytest.param({"T": 1000, "K": 128, "B": 2, "HQ": 8, "H": 2}, id="gqa-128"),
        pytest.param({"T": 500, "S": 2000, "K": 64, "HQ": 4}, id="chunk-64"),
        pytest.param({"T": 700, "K": 256, "HQ": 4}, id="256"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_normalizer
def test_real_size(normalizer, dtype, shape, device):
    check(draw(**shape, dtype=dtype), device, normalizer=normalizer)
