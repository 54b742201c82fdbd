"""The Triton operators with windows, packed sequences and sinks, alone and together."""

import pytest
import torch
from numerics import (
    check_attention,
    draw,
    each_case,
    outputs_and_gradients,
    quick_normalizers,
    with_slow,
)

from fla.ops.attn.softpick import parallel_normalized_attn


def check(inputs, device, **kwargs):
    return check_attention(parallel_normalized_attn, inputs.to(device), **kwargs)


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


@each_case(
    "case",
    WINDOWS,
    softpick=(
        "nothing-of-a-chunk",
        "itself",
        "less-than-a-tile",
        "longer-than-all",
        "chunk-of-tiles",
    ),
    softmax=("chunk-of-tiles",),
)
def test_window(normalizer, case, device):
    shape, window_size = WINDOWS[case]
    check(draw(**shape), device, normalizer=normalizer, window_size=window_size)


PACKED = {
    "one": [0, 70],
    "two": [0, 33, 100],
    "empty-and-one-token": [0, 0, 1, 70, 70, 71, 150, 150],
    "tiles": [0, 64, 128],
}


@each_case("case", PACKED, softpick=("empty-and-one-token", "tiles"))
def test_packed_sequences(normalizer, case, device):
    dtype = torch.int32 if case == "tiles" else torch.int64
    cu_seqlens = torch.tensor(PACKED[case], dtype=dtype, device=device)
    inputs = draw(PACKED[case][-1], HQ=2, H=1, V=24)
    check(inputs, device, normalizer=normalizer, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("head_first", with_slow([False, True], [True]))
@pytest.mark.parametrize("normalizer", with_slow(["softpick", "softmax"], ["softpick"]))
def test_packed_sequences_with_a_window(normalizer, head_first, device):
    cu_seqlens = torch.tensor([0, 20, 20, 150], device=device)
    inputs = draw(150, HQ=2, head_first=head_first)
    kwargs = {"cu_seqlens": cu_seqlens, "window_size": 40, "head_first": head_first}
    check(inputs, device, normalizer=normalizer, **kwargs)


@pytest.mark.parametrize("safe", with_slow([True, False], [True]), ids=["safe", "unsafe"])
@pytest.mark.parametrize(
    "sink_bias",
    [
        pytest.param([0.0, 1.0, -2.0, 0.5], id="ordinary"),
        pytest.param([5.0, 40.0, -40.0, 0.0], id="wide"),
    ],
)
@quick_normalizers("softpick", "softmax")
def test_sink(normalizer, sink_bias, safe, device):
    inputs = draw(40, HQ=4, H=2)
    check(
        inputs,
        device,
        normalizer=normalizer,
        safe=safe,
        sink_bias=torch.tensor(sink_bias, device=device),
    )


@quick_normalizers("softpick", "softmax")
def test_sink_beyond_float32(normalizer, device):
    # e^sink_bias overflows, so that only the shifted sums hold it
    inputs = draw(40, HQ=2)
    inputs = inputs._replace(q=inputs.q * 60)
    sink_bias = torch.tensor([95.0, 200.0], device=device)
    check(inputs, device, normalizer=normalizer, sink_bias=sink_bias)


@quick_normalizers("softpick", "softmax")
def test_sink_of_minus_infinity_is_none(normalizer, device):
    inputs = draw(40, HQ=2).to(device)
    without, with_sink = (
        outputs_and_gradients(parallel_normalized_attn, inputs, normalizer=normalizer, **sink)
        for sink in ({}, {"sink_bias": torch.full((2,), -torch.inf, device=device)})
    )
    assert not with_sink.pop("dsink_bias").count_nonzero()
    assert all(torch.equal(without[name], x) for name, x in with_sink.items())


@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_everything_at_once(normalizer, device):
    inputs = draw(100, K=40, V=24, HQ=4, H=2, dtype=torch.bfloat16)
    kwargs = {
        "cu_seqlens": torch.tensor([0, 7, 7, 100], device=device),
        "window_size": 50,
        "sink_bias": torch.tensor([0.0, 1.0, -1.0, 2.0], device=device),
        "scale": 0.5,
    }
    check(inputs, device, normalizer=normalizer, **kwargs)
