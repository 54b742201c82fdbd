"""Attacks on `safe=True`: forward adds up unshifted terms first and does again the rows whose sums left the range
of float32. And what a NaN may reach."""

import math

import pytest
import torch
from numerics import (
    Inputs,
    check_attention,
    draw,
    outputs_and_gradients,
    poisoned_memory,
    quick_normalizers,
    with_slow,
)

from fla.ops.attn.softpick import (
    naive_normalized_attn,
    parallel_normalized_attn,
    parallel_softpick_attn,
)

# e^s is finite in float32 up to 88.72
LIMIT = math.log(torch.finfo(torch.float32).max)


def check(inputs, device, **kwargs):
    return check_attention(parallel_normalized_attn, inputs.to(device), **kwargs)


def scores(values, dtype=torch.float32):
    """One query for each score of the list, which it gives to the key next to it; 0.5 to all others."""
    T = len(values)
    q, k = torch.zeros(1, T, 1, 16), torch.zeros(1, T, 1, 16)
    v, do = (x[:, :T] for x in draw(T, dtype=torch.float32)[2:])
    q[..., 0], k[..., 0] = 1.0, 0.5
    q[..., 1] = torch.tensor(values)[None, :, None] - 0.5
    # every query finds its score at the first key
    k[:, 0, :, 1] = 1.0
    return Inputs(*(x.to(dtype) for x in (q, k, v, do)))


@pytest.mark.parametrize(
    "top", with_slow([-2.0, -0.5, -0.01, 0.01, 0.5, 10.0, 1e4], [-0.01, 0.01, 10.0])
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@quick_normalizers("softpick", "softmax")
def test_scores_around_the_limit(normalizer, dtype, top, device):
    # rows below the limit and one at it share a tile
    inputs = scores([1.0] * 40 + [LIMIT + top] + [3.0] * 29, dtype)
    check(inputs, device, normalizer=normalizer, scale=1.0)


@pytest.mark.parametrize("top", [-40.0, -44.0, -45.0, -60.0, -87.0, -90.0, -104.0, -1e4])
@pytest.mark.parametrize(
    "dtype", with_slow([torch.float32, torch.bfloat16, torch.float16], [torch.float32])
)
def test_rows_of_softmax_that_would_vanish(dtype, top, device):
    inputs = draw(70, dtype=dtype)
    q, k = inputs.q.clone(), inputs.k.clone()
    q[..., 0], k[..., 0] = 1.0, top
    check(inputs._replace(q=q, k=k), device, normalizer="softmax", scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@quick_normalizers("softpick")
def test_one_huge_head(normalizer, dtype, device):
    inputs = draw(40, HQ=4, H=2, dtype=dtype)
    q = inputs.q.clone()
    q[:, :, 1] *= 200
    check(inputs._replace(q=q), device, normalizer=normalizer)


@pytest.mark.parametrize("position", with_slow([0, 63, 64, 89], [0, 64]))
@quick_normalizers("softpick", "softmax")
def test_one_huge_key(normalizer, position, device):
    inputs = draw(90)
    k = inputs.k.clone()
    k[:, position] *= 300
    check(inputs._replace(k=k), device, normalizer=normalizer)


@quick_normalizers("softpick", "softmax")
def test_sums_of_values_that_overflow(normalizer, device):
    # the denominators stay finite, the unshifted outputs do not; the signs make inf - inf of them
    inputs = draw(70)
    v = inputs.v * 1e30
    q = inputs.q.abs() * 4
    inputs = inputs._replace(q=q, k=inputs.k.abs() * 4, v=v, do=inputs.do * 1e-30)
    assert (naive_normalized_attn(*inputs[:3], normalizer=normalizer)).isfinite().all()
    check(inputs, device, normalizer=normalizer)


@pytest.mark.parametrize("dtype", with_slow([torch.float32, torch.bfloat16], [torch.float32]))
@quick_normalizers("softpick", "softmax")
def test_safe_is_unsafe_where_that_holds(normalizer, dtype, device):
    inputs = draw(70, dtype=dtype, device=device)
    unsafe, safe = (
        outputs_and_gradients(parallel_normalized_attn, inputs, normalizer=normalizer, safe=safe)
        for safe in (False, True)
    )
    assert all(torch.equal(unsafe[name], x) for name, x in safe.items())


@quick_normalizers("softpick", "softmax")
def test_rows_out_of_range_leave_their_neighbours_alone(normalizer, device):
    inputs = draw(70, device=device)
    q = inputs.q.clone()
    q[:, 50] = 500 * inputs.k[:, 3].sign()
    calm, wild = (
        parallel_normalized_attn(x, *inputs[1:3], normalizer=normalizer) for x in (inputs.q, q)
    )
    others = torch.arange(70, device=device) != 50
    assert torch.equal(calm[:, others], wild[:, others])
    assert wild.isfinite().all()


@pytest.mark.parametrize("kind", "qkv")
@quick_normalizers("softpick")
def test_nan_is_seen_where_it_is_visible_and_nowhere_else(normalizer, kind, device):
    T, bounds, at, head = 100, [0, 30, 100], 40, 1
    q, k, v, _ = draw(T, HQ=4, H=2, device=device)
    # every score is positive, so that every visible key has weight
    inputs = {"q": q.abs(), "k": k.abs(), "v": v}
    group = slice(2 * head, 2 * head + 2)
    if kind == "q":
        group = slice(head, head + 1)
    inputs[kind][:, at, head, 5] = torch.nan
    with poisoned_memory():
        o, lse = parallel_normalized_attn(
            **inputs,
            normalizer=normalizer,
            cu_seqlens=torch.tensor(bounds, device=device),
            window_size=20,
            return_lse=True,
        )
    rows = o.isnan().any(-1)[0]
    touched = slice(at, at + 1) if kind == "q" else slice(at, at + 20)
    assert rows[touched, group].all()
    if kind != "v":
        assert lse.isnan()[0, group, touched].all()
    rows[bounds[1] :, group] = False
    assert not rows.any()
    if kind != "v":
        # a weight of 0 times NaN is NaN, so that a value's may spread inside its sequence and head
        o = o.clone()
        o[:, touched, group] = 0
        assert not o.isnan().any()


@pytest.mark.parametrize("kind", ["q", "k", "v", "do"])
def test_nan_reaches_the_gradients_of_its_own_sequence_and_head_only(kind, device):
    T, bounds, at, head = 70, [0, 30, 70], 40, 1
    inputs = draw(T, HQ=2, device=device)
    inputs = Inputs(inputs.q.abs(), inputs.k.abs(), inputs.v, inputs.do)
    getattr(inputs, kind)[:, at, head, 5] = torch.nan
    cu_seqlens = torch.tensor(bounds, device=device)
    got = outputs_and_gradients(parallel_softpick_attn, inputs, cu_seqlens=cu_seqlens)
    for name in ("dq", "dk", "dv"):
        rows = got[name].isnan().any(-1)[0]
        if (kind, name) not in (("v", "dv"), ("do", "o")):
            assert rows[:, head].any(), name
        rows[bounds[1] :, head] = False
        assert not rows.any(), name
