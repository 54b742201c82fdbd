"""relu_softpick, relu(e^s - 1) / sum relu(e^s - 1): the arm in which negative keys do not count at all."""

import pytest
import torch
from numerics import assert_exact, draw, outputs_and_gradients

from fla.ops.attn.softpick import (
    naive_normalized_attn,
    naive_relu_softpick_attn,
    naive_softpick_attn,
)

EPS = 1e-6


def plain(q, k, v, scale):
    """The definition with loops: [B, T, H, D], one key head per query head."""
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        n = ((scale * k[b, : t + 1, h] @ q[b, t, h]).exp() - 1).relu()
        o[b, t, h] = n @ v[b, : t + 1, h] / (n.sum() + EPS)
    return o


@pytest.mark.parametrize("scale", [0.25, 1.0, -0.5])
def test_outputs_are_those_of_the_definition(scale):
    q, k, v, _ = draw(9, K=4, V=3, B=2, HQ=2, dtype=torch.float64)
    assert_exact(naive_relu_softpick_attn(q, k, v, scale), plain(q, k, v, scale))


def test_gradients_are_those_of_the_definition():
    inputs = draw(9, K=4, V=3, HQ=2, dtype=torch.float64)
    got = outputs_and_gradients(naive_relu_softpick_attn, inputs, scale=0.5)
    expected = outputs_and_gradients(plain, inputs, scale=0.5)
    assert_exact(got, expected)


def test_gradcheck():
    inputs = draw(5, K=3, V=2, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    assert torch.autograd.gradcheck(naive_relu_softpick_attn, (q, k, v))


def test_is_softpick_where_all_scores_are_positive():
    inputs = draw(9, HQ=2, dtype=torch.float64)
    inputs = inputs._replace(q=inputs.q.abs(), k=inputs.k.abs())
    got = outputs_and_gradients(naive_relu_softpick_attn, inputs)
    expected = outputs_and_gradients(naive_softpick_attn, inputs)
    assert_exact(got, expected)


def test_weighs_no_less_than_softpick_and_picks_the_same_keys():
    q, k, v, _ = draw(33, HQ=2, dtype=torch.float64)
    _, relu = naive_relu_softpick_attn(q, k, v, return_weights=True)
    _, softpick = naive_softpick_attn(q, k, v, return_weights=True)
    assert torch.equal(relu > 0, softpick > 0)
    assert (relu >= softpick).all()
    # a row with a clearly positive score sums to one but for eps, and every other row to zero
    total = relu.sum(-1)
    assert ((total == 0) | (total > 0.99)).all()
    assert (total == 0).any()


def test_negative_and_zero_keys_are_exactly_absent():
    q, k, v, do = draw(4, S=8, dtype=torch.float64)
    q, k = q.abs(), k.abs()
    k[:, 1] *= -1
    k[:, 2] = 0
    kept = torch.tensor([0, 3, 4, 5, 6, 7])
    inputs = draw(4, S=8, dtype=torch.float64)._replace(q=q, k=k, v=v, do=do)
    got = outputs_and_gradients(naive_relu_softpick_attn, inputs)
    expected = outputs_and_gradients(
        naive_relu_softpick_attn, inputs._replace(k=k[:, kept], v=v[:, kept])
    )
    assert_exact(got["o"], expected["o"])
    assert_exact(got["dq"], expected["dq"])
    for name in ("dk", "dv"):
        assert_exact(got[name][:, kept], expected[name])
        assert not got[name][:, 1:3].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [True, False])
def test_no_positive_score_gives_exact_zeros(dtype, safe):
    inputs = draw(9, dtype=dtype)
    inputs = inputs._replace(q=inputs.q.abs(), k=-inputs.k.abs())
    got = outputs_and_gradients(naive_relu_softpick_attn, inputs, safe=safe)
    assert not any(x.count_nonzero() for x in got.values())


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_safe_is_finite_for_large_scores(size):
    inputs = draw(9)
    inputs = inputs._replace(q=inputs.q * size)
    got = outputs_and_gradients(naive_relu_softpick_attn, inputs)
    assert all(x.isfinite().all() for x in got.values())


def test_name_is_the_normalizer():
    inputs = draw(9, HQ=4, H=2, head_first=True)
    kwargs = {"scale": 0.7, "head_first": True, "window_size": 5}
    got = outputs_and_gradients(naive_relu_softpick_attn, inputs, **kwargs)
    expected = outputs_and_gradients(
        naive_normalized_attn, inputs, normalizer="relu_softpick", **kwargs
    )
    assert all(torch.equal(x, expected[name]) for name, x in got.items())
