"""Every call that is refused, by the reference and by the Triton operators, with the words that say why."""

import pytest
import torch

from fla.ops.attn.softpick import naive_normalized_attn, parallel, parallel_normalized_attn

BF16 = torch.bfloat16


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def call(**changes):
    """Arguments of a call that is right but for `changes`."""
    right = {name: zeros(1, 4, 2, 8) for name in "qkv"}
    return right | changes


def bounds(*x, dtype=torch.int32):
    return torch.tensor(x, dtype=dtype)


REFUSED = {
    "unknown-normalizer": (
        call(normalizer="softpik"),
        "normalizer must be one of softpick, .*got 'softpik'",
    ),
    "q-of-3-dimensions": (
        call(q=zeros(4, 2, 8)),
        r"q must have 4 dimensions \[B, T, H, D\], got shape \(4, 2, 8\)",
    ),
    "v-of-5-dimensions": (
        call(v=zeros(1, 1, 4, 2, 8), head_first=True),
        r"v must have 4 dimensions \[B, H, T, D\], got shape \(1, 1, 4, 2, 8\)",
    ),
    "integers": (
        call(q=zeros(1, 4, 2, 8, dtype=torch.int64)),
        "q must be a floating point tensor, got torch.int64",
    ),
    "k-of-another-dtype": (
        call(k=zeros(1, 4, 2, 8, dtype=BF16)),
        r"k must have the dtype and device of q \(torch.float32, .*got torch.bfloat16",
    ),
    "v-on-another-device": (
        call(v=zeros(1, 4, 2, 8).to("meta")),
        "v must have the dtype and device of q .*got torch.float32, meta",
    ),
    "batch-sizes": (
        call(k=zeros(3, 4, 2, 8), v=zeros(3, 4, 2, 8)),
        "q, k and v must have one batch size, got 1, 3 and 3",
    ),
    "key-dimension": (call(k=zeros(1, 4, 2, 9)), "k must have the last dimension of q, 8, got 9"),
    "value-length": (
        call(v=zeros(1, 5, 2, 8)),
        r"v must have the shape of k but for the last dimension, got \(1, 5, 2, 8\)",
    ),
    "value-heads": (
        call(v=zeros(1, 4, 1, 8)),
        r"v must have the shape of k but for the last dimension, got \(1, 4, 1, 8\)",
    ),
    "no-value-dimension": (
        call(v=zeros(1, 4, 2, 0)),
        r"must have at least one head and one feature, got \(1, 4, 2, 8\), .* \(1, 4, 2, 0\)",
    ),
    "no-heads": (
        call(**{name: zeros(1, 4, 0, 8) for name in "qkv"}),
        r"must have at least one head and one feature, got \(1, 4, 0, 8\)",
    ),
    "heads-no-multiple": (
        call(q=zeros(1, 4, 3, 8)),
        "heads of q must be a multiple of those of k, got 3 and 2",
    ),
    "heads-no-multiple-head-first": (
        call(q=zeros(1, 4, 5, 8), k=zeros(1, 3, 5, 8), v=zeros(1, 3, 5, 8), head_first=True),
        r"got 4 and 3 in layout \[B, H, T, D\]",
    ),
    "negative-window": (call(window_size=-1), "window_size must be at least 0.*got -1"),
    "float-bounds": (
        call(cu_seqlens=bounds(0, 4, dtype=torch.float32)),
        "cu_seqlens must be a vector of int32 or int64, got torch.float32",
    ),
    "matrix-of-bounds": (
        call(cu_seqlens=bounds(0, 4)[None]),
        r"cu_seqlens must be a vector .*of shape \(1, 2\)",
    ),
    "bounds-with-a-batch": (
        call(**{name: zeros(2, 4, 2, 8) for name in "qkv"}, cu_seqlens=bounds(0, 4)),
        "cu_seqlens requires one batch row.*got B=2, 4 queries, 4 keys",
    ),
    "bounds-with-a-chunk": (
        call(q=zeros(1, 3, 2, 8), cu_seqlens=bounds(0, 3)),
        "as many keys as queries, got B=1, 3 queries, 4 keys",
    ),
    "bounds-not-from-0": (
        call(cu_seqlens=bounds(1, 4)),
        r"cu_seqlens must rise from 0 to T = 4, got \[1, 4\]",
    ),
    "bounds-not-to-the-end": (
        call(cu_seqlens=bounds(0, 3)),
        "cu_seqlens must rise from 0 to T = 4",
    ),
    "bounds-falling": (call(cu_seqlens=bounds(0, 3, 2, 4)), r"got \[0, 3, 2, 4\]"),
    "sink-of-another-length": (
        call(sink_bias=zeros(3)),
        r"sink_bias must be .* one score for each of the 2 query heads on (cpu|cuda:\d+), got .* shape \(3,\)",
    ),
    "sink-of-integers": (
        call(sink_bias=zeros(2, dtype=torch.int64)),
        "sink_bias must be a floating point vector.*got torch.int64",
    ),
    "sink-on-another-device": (
        call(sink_bias=zeros(2).to("meta")),
        r"sink_bias must be .* on (cpu|cuda:\d+), got torch.float32 of shape \(2,\) on meta",
    ),
    "one-bound": (call(cu_seqlens=bounds(0)), "cu_seqlens must rise from 0 to T = 4"),
}


@pytest.mark.parametrize("attn", [naive_normalized_attn, parallel_normalized_attn])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, attn, device):
    kwargs, message = REFUSED[case]
    kwargs = {
        name: x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
        for name, x in kwargs.items()
    }
    with pytest.raises(ValueError, match=message):
        attn(**kwargs)


def far_apart(head_first):
    x = torch.empty(2**24 + 16)
    stride = 2**24 + 1
    if head_first:
        return x.as_strided((1, 1, 2, 8), (1, 1, stride, 1))
    return x.as_strided((1, 2, 1, 8), (1, stride, 1, 1))


KERNELS_REFUSE = {
    "float64": (
        lambda: call(**{name: zeros(1, 4, 2, 8, dtype=torch.float64) for name in "qkv"}),
        "q must be float32, float16 or bfloat16, got torch.float64",
    ),
    "device": (
        lambda: call(**{name: zeros(1, 4, 2, 8).to("meta") for name in "qkv"}),
        "q must be on a CUDA or ROCm GPU, got meta",
    ),
    "key-dimension": (
        lambda: call(q=zeros(1, 4, 2, 257), k=zeros(1, 4, 2, 257)),
        "the last dimension of q must be at most 256, got 257",
    ),
    "value-dimension": (
        lambda: call(v=zeros(1, 4, 2, 300)),
        "the last dimension of v must be at most 256, got 300",
    ),
    "time-stride": (
        lambda: call(q=zeros(1, 2, 1, 8), k=far_apart(False), v=zeros(1, 2, 1, 8)),
        "k must have at most 16777216 elements between two time steps, got 16777217",
    ),
    "time-stride-head-first": (
        lambda: {name: far_apart(True) for name in "qkv"} | {"head_first": True},
        "q must have at most 16777216 elements between two time steps",
    ),
}


@pytest.mark.parametrize("case", KERNELS_REFUSE)
def test_kernels_refuse(case, monkeypatch):
    monkeypatch.setattr(parallel, "IS_INTERPRETED", True)
    make, message = KERNELS_REFUSE[case]
    with pytest.raises(ValueError, match=message):
        parallel_normalized_attn(**make())


def test_kernels_refuse_a_cpu_tensor(monkeypatch):
    monkeypatch.setattr(parallel, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="q must be on a GPU for the Triton operator, got cpu"):
        parallel_normalized_attn(**call())


@pytest.mark.parametrize("attn", [naive_normalized_attn, parallel_normalized_attn])
def test_unknown_argument_is_a_type_error(attn, device):
    inputs = {name: x.to(device) for name, x in call().items()}
    with pytest.raises(TypeError, match="causal"):
        attn(**inputs, causal=True)
