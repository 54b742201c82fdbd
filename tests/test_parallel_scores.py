"""The Triton operators over scores of every kind, with and without the safe shift: outputs and gradients."""

import pytest
import torch
from numerics import (
    WITHOUT_NEGATIVE_KEYS,
    check_attention,
    draw,
    each_case,
    quick_normalizers,
    with_slow,
)

from fla.ops.attn.softpick import parallel_normalized_attn


def check(inputs, device, **kwargs):
    return check_attention(parallel_normalized_attn, inputs.to(device), **kwargs)


@quick_normalizers("softpick", "softmax")
def test_unsafe(normalizer, device):
    # scores of either sign up to about 60
    inputs = draw(90)
    inputs = inputs._replace(q=inputs.q * 16)
    check(inputs, device, normalizer=normalizer, safe=False)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
@quick_normalizers("softpick", "softmax")
def test_scale(normalizer, scale, device):
    check(draw(65), device, normalizer=normalizer, scale=scale)


def all_negative(inputs):
    return inputs._replace(q=inputs.q.abs(), k=-inputs.k.abs())


def all_positive(inputs):
    return inputs._replace(q=inputs.q.abs(), k=inputs.k.abs())


def all_zero(inputs):
    return inputs._replace(k=torch.zeros_like(inputs.k))


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


@each_case(
    "regime",
    REGIMES,
    softpick=REGIMES,
    softmax=(all_negative, all_zero, first_tile_very_negative, large, huge),
    others=(large,),
)
def test_scores(normalizer, regime, device):
    got = check(regime(draw(90)), device, normalizer=normalizer)
    if regime is all_negative and normalizer in WITHOUT_NEGATIVE_KEYS:
        assert not any(x.count_nonzero() for x in got.values())
    if regime is all_zero:
        assert not got["dq"].count_nonzero()


# float16 always shifts, bfloat16 where sums overflow as float32 does
@pytest.mark.parametrize("dtype", with_slow([torch.float16, torch.bfloat16], [torch.float16]))
@pytest.mark.parametrize("regime", REGIMES)
def test_scores_in_half_precision(regime, dtype, device):
    check(regime(draw(90, dtype=dtype)), device, normalizer="softpick")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "normalizer", with_slow(["softpick", "relu_softpick", "abs_softpick"], ["softpick"])
)
def test_scores_below_eps(normalizer, dtype, device):
    # the denominator is little more than eps, which magnifies gradients a million times
    inputs = draw(90, dtype=dtype)
    inputs = inputs._replace(q=inputs.q * 1e-3, k=inputs.k * 1e-3)
    check(inputs, device, normalizer=normalizer)
