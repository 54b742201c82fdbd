"""The Triton operators against the references: outputs and gradients, over shapes, dtypes and scores.

Without a GPU the kernels run in Triton's interpreter. Tiles are powers of two up to 128, so lengths around
64 and 128 stand at every tile's edge.
"""

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    Inputs,
    check_attention,
    draw,
    each_case,
    each_normalizer,
    each_normalizer_others_slow,
    outputs_and_gradients,
)

from fla.ops.attn.softpick import NORMALIZERS, naive_normalized_attn, parallel_normalized_attn
from fla.ops.attn.softpick.naive import EPS
from fla.ops.attn.softpick.tiles import row_descriptor


def check(inputs, device, **kwargs):
    return check_attention(parallel_normalized_attn, inputs.to(device), **kwargs)


SHAPES = {
    "one-token": {"T": 1, "HQ": 4},
    "two-tokens": {"T": 2, "HQ": 4, "B": 2},
    "tile-less-1": {"T": 63},
    "tile": {"T": 64},
    "tile-and-1": {"T": 65},
    "large-tile-and-1": {"T": 129, "K": 32},
    "ragged-tail": {"T": 150},
    "odd-dims": {"T": 65, "K": 60, "V": 20},
    "smallest-dims": {"T": 33, "K": 1, "V": 1, "HQ": 2},
    "narrow-key": {"T": 33, "K": 7, "V": 72},
    "gqa-batch": {"T": 33, "HQ": 4, "H": 2, "B": 2},
    "mqa-8": {"T": 33, "HQ": 8, "H": 1},
    "last-token": {"T": 1, "S": 65, "HQ": 4},
    "chunk": {"T": 5, "S": 70, "HQ": 2},
    "chunk-one-key-into-the-next-tile": {"T": 64, "S": 65},
    "chunk-gqa-ragged-tail": {"T": 65, "S": 101, "HQ": 2, "H": 1},
    "fewer-keys-than-queries": {"T": 150, "S": 70, "HQ": 2, "H": 1},
    "one-key": {"T": 70, "S": 1},
}


@each_case("shape", SHAPES, brief=("gqa-batch", "ragged-tail"))
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_large_head_dimension(normalizer, dtype, shape, device):
    check(draw(**shape, dtype=dtype), device, normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
@each_normalizer_others_slow
def test_half_precision(normalizer, safe, dtype, device):
    inputs = draw(101, K=32, HQ=2, H=1, dtype=dtype)
    check(inputs, device, normalizer=normalizer, safe=safe)


@each_normalizer
def test_unsafe(normalizer, device):
    # scores of either sign up to about 60
    inputs = draw(90)
    inputs = inputs._replace(q=inputs.q * 16)
    check(inputs, device, normalizer=normalizer, safe=False)


@pytest.mark.parametrize("shape", [{"T": 65}, {"T": 5, "S": 70}], ids=["square", "chunk"])
@each_normalizer_others_slow
def test_head_first(normalizer, shape, device):
    inputs = draw(**shape, B=2, HQ=2, H=1, K=8, V=24, head_first=True)
    check(inputs, device, normalizer=normalizer, head_first=True)


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


WINDOWS = {
    "nothing": ({"T": 70}, 0),
    "nothing-of-a-chunk": ({"T": 5, "S": 170}, 0),
    "fewer-keys-than-queries": ({"T": 170, "S": 90}, 30),
    "itself": ({"T": 70}, 1),
    "less-than-a-tile": ({"T": 150, "HQ": 2, "H": 1}, 5),
    "tile": ({"T": 150}, 64),
    "across-tiles": ({"T": 200, "HQ": 2}, 97),
    "longer-than-all": ({"T": 70}, 1000),
    "chunk": ({"T": 5, "S": 170, "HQ": 2}, 30),
    "chunk-of-tiles": ({"T": 90, "S": 200}, 100),
}


@each_case("case", WINDOWS, brief=("tile", "chunk"))
def test_window(normalizer, case, device):
    shape, window_size = WINDOWS[case]
    check(draw(**shape), device, normalizer=normalizer, window_size=window_size)


PACKED = {
    "one": [0, 70],
    "two": [0, 33, 100],
    "empty-and-one-token": [0, 0, 1, 70, 70, 71, 150, 150],
    "tiles": [0, 64, 128, 192],
}


@each_case("case", PACKED, brief=("two",))
def test_packed_sequences(normalizer, case, device):
    dtype = torch.int32 if case == "tiles" else torch.int64
    cu_seqlens = torch.tensor(PACKED[case], dtype=dtype, device=device)
    inputs = draw(PACKED[case][-1], HQ=2, H=1, V=24)
    check(inputs, device, normalizer=normalizer, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_packed_sequences_with_a_window(normalizer, head_first, device):
    cu_seqlens = torch.tensor([0, 20, 20, 150], device=device)
    inputs = draw(150, HQ=2, head_first=head_first)
    kwargs = {"cu_seqlens": cu_seqlens, "window_size": 40, "head_first": head_first}
    check(inputs, device, normalizer=normalizer, **kwargs)


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
@pytest.mark.parametrize(
    "sink_bias",
    [
        pytest.param([0.0, 1.0, -2.0, 0.5], id="ordinary"),
        pytest.param([5.0, 40.0, -40.0, 0.0], id="wide"),
    ],
)
@each_normalizer_others_slow
def test_sink(normalizer, sink_bias, safe, device):
    inputs = draw(70, HQ=4, H=2)
    check(
        inputs,
        device,
        normalizer=normalizer,
        safe=safe,
        sink_bias=torch.tensor(sink_bias, device=device),
    )


@each_normalizer
def test_sink_beyond_float32(normalizer, device):
    # e^sink_bias overflows, so that only the shifted sums hold it
    inputs = draw(70, HQ=2)
    inputs = inputs._replace(q=inputs.q * 60)
    sink_bias = torch.tensor([95.0, 200.0], device=device)
    check(inputs, device, normalizer=normalizer, sink_bias=sink_bias)


def test_sink_of_minus_infinity_is_none(device):
    inputs = draw(70, HQ=2).to(device)
    sink_bias = torch.full((2,), -torch.inf, device=device)
    for normalizer in NORMALIZERS:
        got = check(inputs, device, normalizer=normalizer)
        with_sink = outputs_and_gradients(
            parallel_normalized_attn, inputs, normalizer=normalizer, sink_bias=sink_bias
        )
        assert not with_sink.pop("dsink_bias").count_nonzero()
        assert all(torch.equal(got[name], x) for name, x in with_sink.items())


@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_everything_at_once(normalizer, device):
    inputs = draw(150, K=40, V=24, HQ=4, H=2, dtype=torch.bfloat16)
    kwargs = {
        "cu_seqlens": torch.tensor([0, 7, 7, 150], device=device),
        "window_size": 50,
        "sink_bias": torch.tensor([0.0, 1.0, -1.0, 2.0], device=device),
        "scale": 0.5,
    }
    check(inputs, device, normalizer=normalizer, **kwargs)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
@each_normalizer
def test_scale(normalizer, scale, device):
    check(draw(65), device, normalizer=normalizer, scale=scale)


def fused_qkv(T, device):
    qkv = draw(T, K=60, HQ=2, device=device).q
    return qkv[..., :20], qkv[..., 20:40], qkv[..., 40:]


def transposed(T, device):
    return (x.transpose(1, 2) for x in draw(T, HQ=2, head_first=True, device=device)[:3])


def last_dimension_strided(T, device):
    return (x[..., ::2] for x in draw(T, K=40, HQ=2, device=device)[:3])


def time_outermost(T, device):
    return (x.transpose(0, 1) for x in draw(2, B=T, HQ=2, device=device)[:3])


def one_head_expanded(T, device):
    return (x.expand(-1, -1, 2, -1) for x in draw(T, HQ=1, device=device)[:3])


def one_row_expanded(T, device):
    return (x.expand(2, -1, -1, -1) for x in draw(T, HQ=2, device=device)[:3])


@pytest.mark.parametrize(
    "view",
    [
        fused_qkv,
        transposed,
        last_dimension_strided,
        time_outermost,
        one_head_expanded,
        one_row_expanded,
    ],
)
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_strided_inputs(normalizer, view, device):
    q, k, v = view(65, device)
    do = torch.randn(q.shape[:-1] + v.shape[-1:], generator=torch.Generator().manual_seed(0))
    check(Inputs(q, k, v, do), device, normalizer=normalizer)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda do: do[:, :1, :1, :1].expand_as(do), id="one-number"),
        pytest.param(lambda do: do[:, :, :1].expand_as(do), id="one-head"),
        pytest.param(lambda do: do.transpose(1, 3).contiguous().transpose(1, 3), id="transposed"),
        pytest.param(lambda do: torch.cat([do, do], -1)[..., ::2], id="every-second"),
    ],
)
@pytest.mark.parametrize("head_first", [False, True])
def test_strided_output_gradient(head_first, view, device):
    inputs = draw(65, HQ=2, V=12, head_first=head_first)
    inputs = inputs._replace(do=view(inputs.do))
    check(inputs, device, normalizer="softpick", head_first=head_first)


def all_negative(inputs):
    return inputs._replace(q=inputs.q.abs(), k=-inputs.k.abs())


def all_positive(inputs):
    return inputs._replace(q=inputs.q.abs(), k=inputs.k.abs())


def all_zero(inputs):
    return inputs._replace(k=torch.zeros_like(inputs.k))


# heads start at multiples of 16 bytes, as descriptors ask, or not
@pytest.mark.parametrize("width", [128, 132], ids=["descriptors", "pointers"])
@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="dense"),
        pytest.param({"head_first": True}, id="head-first"),
        pytest.param({"cu_seqlens": torch.tensor([0, 70, 70, 170])}, id="packed"),
        pytest.param({"window_size": 90}, id="window"),
    ],
)
def test_streamed_tiles(kwargs, width, device):
    inputs = draw(
        170, 128, HQ=4, H=2, dtype=torch.bfloat16, head_first=kwargs.get("head_first", False)
    )
    # to the device first, since moving a view would make it contiguous
    inputs = Inputs(*(F.pad(x.to(device), (0, width - 128))[..., :128] for x in inputs))
    kwargs = {name: x.to(device) if name == "cu_seqlens" else x for name, x in kwargs.items()}
    descriptor = row_descriptor(inputs.q, kwargs.get("head_first", False), 64, 128)
    assert (descriptor is None) == (width == 132)
    check(inputs, device, normalizer="softpick", **kwargs)


def every_second_zero(inputs):
    return inputs._replace(k=inputs.k * (torch.arange(inputs.k.shape[1]) % 2)[:, None, None])


def first_tile_negative(inputs):
    # rows of the later tiles first meet keys of weight 0, then positive ones
    k = inputs.k.abs()
    k[:, :70] *= -8
    return inputs._replace(q=inputs.q.abs(), k=k)


def first_tile_very_negative(inputs):
    k = inputs.k.abs()
    k[:, :70] *= -200
    return inputs._replace(q=inputs.q.abs(), k=k)


def one_dominant_key(inputs):
    k = inputs.k.clone()
    k[:, 17] = 8
    return inputs._replace(q=inputs.q.abs(), k=k)


def large(inputs):
    # scores of either sign in the hundreds
    return inputs._replace(q=inputs.q * 30, k=inputs.k * 10)


def huge(inputs):
    # in the ten thousands
    return inputs._replace(q=inputs.q * 100, k=inputs.k * 50)


def small(inputs):
    return inputs._replace(q=inputs.q * 0.03, k=inputs.k * 0.03)


def large_values(inputs):
    return inputs._replace(v=inputs.v * 100, do=inputs.do * 10)


REGIMES = (
    all_negative,
    all_positive,
    all_zero,
    every_second_zero,
    first_tile_negative,
    first_tile_very_negative,
    one_dominant_key,
    large,
    huge,
    small,
    large_values,
)


@pytest.mark.parametrize("regime", REGIMES)
@each_normalizer
def test_scores(normalizer, regime, device):
    got = check(regime(draw(90)), device, normalizer=normalizer)
    if regime is all_negative and normalizer in ("softpick", "relu_softpick", "rectified"):
        assert not any(x.count_nonzero() for x in got.values())
    if regime is all_zero:
        assert not got["dq"].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
def test_scores_in_half_precision(regime, dtype, device):
    check(regime(draw(90, dtype=dtype)), device, normalizer="softpick")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalizer", ["softpick", "relu_softpick", "abs_softpick"])
def test_scores_below_eps(normalizer, dtype, device):
    # the denominator is little more than eps, which magnifies gradients a million times
    inputs = draw(90, dtype=dtype)
    inputs = inputs._replace(q=inputs.q * 1e-3, k=inputs.k * 1e-3)
    check(inputs, device, normalizer=normalizer)


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
