"""Which keys the references' queries see, in which layout: each against the plainest way to say it."""

import pytest
import torch
from numerics import Inputs, assert_exact, draw, outputs_and_gradients

import fla.ops.attn.softpick as package
from fla.ops.attn.softpick import NORMALIZERS, naive_normalized_attn, softpick

each_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)


def run(inputs, **kwargs):
    return outputs_and_gradients(naive_normalized_attn, inputs, **kwargs)


def concatenated(parts, dim):
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([0, 4, 11], id="two"),
        pytest.param([0, 0, 4, 4, 10, 11, 11], id="empty-and-one-token"),
        pytest.param([0, 11], id="one"),
    ],
)
@each_normalizer
def test_packed_sequences_are_separate_calls(normalizer, bounds, dtype):
    inputs = draw(11, HQ=2, H=1, dtype=torch.float64)
    cu_seqlens = torch.tensor(bounds, dtype=dtype)
    got = run(inputs, cu_seqlens=cu_seqlens, normalizer=normalizer)
    parts = [
        run(Inputs(*(x[:, bos:eos] for x in inputs)), normalizer=normalizer)
        for bos, eos in zip(bounds, bounds[1:], strict=False)
        if eos > bos
    ]
    assert_exact(got, concatenated(parts, dim=1))


def test_packed_sequences_head_first_with_a_window():
    inputs = draw(11, dtype=torch.float64, head_first=True)
    kwargs = {"head_first": True, "window_size": 3}
    got = run(inputs, cu_seqlens=torch.tensor([0, 5, 11]), **kwargs)
    parts = [
        run(Inputs(*(x[:, :, bos:eos] for x in inputs)), **kwargs) for bos, eos in ((0, 5), (5, 11))
    ]
    assert_exact(got, concatenated(parts, dim=2))


@pytest.mark.parametrize("window_size", [0, 1, 2, 5, 9, 100])
@pytest.mark.parametrize("S", [4, 9, 12])
@each_normalizer
def test_window_is_a_call_on_the_keys_inside(normalizer, S, window_size):
    T = 9
    inputs = draw(T, S=S, dtype=torch.float64)
    o = naive_normalized_attn(*inputs[:3], normalizer=normalizer, window_size=window_size)
    for t in range(T):
        last = t + S - T
        keys = slice(max(0, last + 1 - window_size), max(0, last + 1))
        row = naive_normalized_attn(
            inputs.q[:, t : t + 1], inputs.k[:, keys], inputs.v[:, keys], normalizer=normalizer
        )
        assert_exact(o[:, t : t + 1], row)


@pytest.mark.parametrize("T", [1, 4, 9])
@each_normalizer
def test_short_queries_are_the_last_rows(normalizer, T):
    q, k, v, do = draw(9, HQ=2, dtype=torch.float64)
    do[:, :-T] = 0
    full = run(Inputs(q, k, v, do), normalizer=normalizer)
    full["o"], full["dq"] = full["o"][:, -T:], full["dq"][:, -T:]
    assert_exact(run(Inputs(q[:, -T:], k, v, do[:, -T:]), normalizer=normalizer), full)


@each_normalizer
def test_head_first_is_the_transpose(normalizer):
    inputs = draw(7, K=3, V=5, B=2, HQ=4, H=2, S=9, dtype=torch.float64)
    transposed = Inputs(*(x.transpose(1, 2) for x in inputs))
    got = run(transposed, head_first=True, normalizer=normalizer)
    got = {name: x.transpose(1, 2) for name, x in got.items()}
    assert_exact(got, run(inputs, normalizer=normalizer))


@each_normalizer
def test_query_head_reads_key_head_of_its_group(normalizer):
    inputs = draw(7, B=2, HQ=6, H=2, dtype=torch.float64)
    grouped = run(inputs, normalizer=normalizer)
    k, v = (x[:, :, [0, 0, 0, 1, 1, 1]] for x in (inputs.k, inputs.v))
    repeated = run(inputs._replace(k=k, v=v), normalizer=normalizer)
    for name in ("dk", "dv"):
        repeated[name] = repeated[name].unflatten(2, (2, 3)).sum(3)
    assert_exact(grouped, repeated)


@pytest.mark.parametrize("head_first", [False, True])
@each_normalizer
def test_returned_weights(normalizer, head_first):
    B, T, S, HQ, H = 2, 7, 9, 4, 2
    q, k, v, _ = draw(T, K=3, V=5, B=B, HQ=HQ, H=H, S=S, dtype=torch.float64, head_first=head_first)
    o, weights = naive_normalized_attn(
        q, k, v, normalizer=normalizer, head_first=head_first, return_weights=True
    )
    assert weights.shape == (B, HQ, T, S)
    assert (weights >= 0).all()
    assert (weights.sum(-1) <= 1 + 1e-12).all()
    assert not weights.triu(S - T + 1).count_nonzero()
    if not head_first:
        o, v = o.transpose(1, 2), v.transpose(1, 2)
    assert_exact(o, weights @ v.repeat_interleave(HQ // H, 1))


def test_weights_are_those_of_softpick():
    q, k, v, _ = draw(1, S=9, K=4, dtype=torch.float64)
    _, weights = naive_normalized_attn(q, k, v, return_weights=True)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 2
    assert_exact(weights, softpick(scores))


@each_normalizer
def test_named_function_is_the_normalizer(normalizer):
    named = getattr(package, f"naive_{normalizer}_attn")
    assert named.__name__ == f"naive_{normalizer}_attn"
    q, k, v, _ = draw(9, HQ=2, H=1, head_first=True)
    kwargs = {"scale": 0.3, "head_first": True, "window_size": 4, "return_weights": True}
    kwargs["cu_seqlens"] = torch.tensor([0, 6, 9])
    for safe in (True, False):
        got = named(q, k, v, safe=safe, **kwargs)
        expected = naive_normalized_attn(q, k, v, normalizer=normalizer, safe=safe, **kwargs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_casts_inputs_and_nothing_else():
    inputs = draw(9, HQ=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = naive_normalized_attn(*inputs[:3])
    assert torch.equal(o, naive_normalized_attn(*inputs.to(torch.bfloat16)[:3]))
