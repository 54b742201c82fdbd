"""The references' arithmetic: values by hand, gradients, and the scores at which formulas break."""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    FORMULAS,
    SOFTPICKS,
    WITHOUT_NEGATIVE_KEYS,
    Inputs,
    assert_exact,
    by_formula,
    draw,
    outputs_and_gradients,
)
from torch.testing import assert_close

from fla.ops.attn.softpick import NORMALIZERS, naive_normalized_attn, softpick
from fla.ops.attn.softpick.naive import EPS

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

each_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)


def weights_of(scores, normalizer, safe=True):
    """The weights that one query gives to keys of these scores; its values are the unit vectors."""
    S = scores.shape[0]
    q = torch.ones(1, 1, 1, 1, dtype=scores.dtype)
    v = torch.eye(S, dtype=scores.dtype).reshape(1, S, 1, S)
    k = scores.reshape(1, S, 1, 1)
    return naive_normalized_attn(q, k, v, scale=1.0, normalizer=normalizer, safe=safe).flatten()


# By hand, in addition to the formulas that every normaliser has in numerics.FORMULAS.
# Scores ln 2, ln 3, -ln 2, 0: e^s = 2, 3, 1/2, 1 and e^s - 1 = 1, 2, -1/2, 0.
CLOSED_FORMS = {
    "softpick": ([1, 2, 0, 0], 3.5 + 1e-6),
    "relu_softpick": ([1, 2, 0, 0], 3 + 1e-6),
    "abs_softpick": ([1, 2, 0.5, 0], 3.5 + 1e-6),
    "softmax": ([2, 3, 0.5, 1], 6.5),
    "softmax_plus_one": ([2, 3, 0.5, 1], 7.5),
    "rectified": ([2, 3, 0, 1], 6),
}
# Scores -ln 2, -ln 4: e^s = 1/2, 1/4. No score is positive.
CLOSED_FORMS_NEGATIVE = {
    "softpick": ([0, 0], 1),
    "relu_softpick": ([0, 0], 1),
    "abs_softpick": ([0.5, 0.75], 1.25 + 1e-6),
    "softmax": ([0.5, 0.25], 0.75),
    "softmax_plus_one": ([0.5, 0.25], 1.75),
    "rectified": ([0, 0], 1),
}
# Three scores of 0.
CLOSED_FORMS_ZERO = {
    "softpick": ([0, 0, 0], 1),
    "relu_softpick": ([0, 0, 0], 1),
    "abs_softpick": ([0, 0, 0], 1),
    "softmax": ([1, 1, 1], 3),
    "softmax_plus_one": ([1, 1, 1], 4),
    "rectified": ([1, 1, 1], 3),
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("exponentials", "forms"),
    [
        pytest.param([2, 3, 0.5, 1], CLOSED_FORMS, id="mixed"),
        pytest.param([0.5, 0.25], CLOSED_FORMS_NEGATIVE, id="negative"),
        pytest.param([1, 1, 1], CLOSED_FORMS_ZERO, id="zero"),
    ],
)
@pytest.mark.parametrize("normalizer", CLOSED_FORMS)
def test_weights_by_hand(normalizer, exponentials, forms, safe):
    numerators, denominator = forms[normalizer]
    expected = torch.tensor(numerators, dtype=torch.float64) / denominator
    weights = weights_of(torch.tensor(exponentials, dtype=torch.float64).log(), normalizer, safe)
    assert_close(weights, expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("exponentials", [[2, 3, 0.5, 1], [0.5, 0.25], [1, 1, 1]])
@each_normalizer
def test_weights_by_formula(normalizer, exponentials, safe):
    e, f = torch.tensor(exponentials, dtype=torch.float64), FORMULAS[normalizer]
    s = e.log()
    z = f.c + (f.d(s) * (e - f.base)).sum()
    expected = f.n(s) * (e - f.base) / z if z else torch.zeros_like(e)
    assert_close(weights_of(s, normalizer, safe), expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("normalizer", SOFTPICKS)
def test_eps_is_1e_6_in_the_unshifted_denominator(normalizer):
    # one key: n / (n + eps) is 1/2 where n = eps, whatever the shift is
    assert EPS == 1e-6
    score = torch.tensor([math.log1p(1e-6)], dtype=torch.float64)
    assert_close(weights_of(score, normalizer), torch.tensor([0.5]).double(), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7, -0.3])
@each_normalizer
def test_outputs_and_gradients_are_those_of_the_formula(normalizer, scale, safe):
    inputs = draw(7, K=5, V=3, B=2, HQ=4, H=2, S=9, dtype=torch.float64)
    formula = by_formula(inputs, normalizer, scale)
    got = outputs_and_gradients(
        naive_normalized_attn, inputs, normalizer=normalizer, scale=scale, safe=safe
    )
    assert_exact(got, formula.values)


@each_normalizer
def test_gradcheck(normalizer):
    inputs = draw(4, K=3, V=2, HQ=2, H=1, S=5, dtype=torch.float64)
    scores = torch.einsum("bthk,bsgk->bhts", inputs.q, inputs.k)
    assert scores.abs().min() > 1e-3, "a score is where the normaliser has a kink"
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    assert torch.autograd.gradcheck(
        lambda *qkv: naive_normalized_attn(*qkv, normalizer=normalizer), (q, k, v)
    )


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradcheck_of_softpick(dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert x.abs().min() > 1e-3
    assert torch.autograd.gradcheck(lambda x: softpick(x, dim), x.requires_grad_())


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_softpick_sums_over_dim(dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    e = x.exp() - 1
    assert_exact(softpick(x, dim), e.relu() / (e.abs().sum(dim, keepdim=True) + 1e-6))
    assert (softpick(x, dim).sum(dim) <= 1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_softpick_rounds_once_to_any_float_dtype(dtype):
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, gold = softpick(x), softpick(x.double())
    assert got.dtype == dtype
    # computed in float32 at least, so a narrow result errs by half a step of its dtype
    assert_close(got.double(), gold, rtol=2 * torch.finfo(dtype).eps, atol=2**-24)


def test_softpick_refuses_integers():
    with pytest.raises(ValueError, match="x must be a floating point tensor, got torch.int64"):
        softpick(torch.arange(3))


@pytest.mark.parametrize("dtype", FLOATS)
@each_normalizer
def test_any_float_dtype(normalizer, dtype):
    inputs = draw(9, K=8, dtype=dtype)
    gold = outputs_and_gradients(
        naive_normalized_attn, inputs.to(torch.float64), normalizer=normalizer
    )
    got = outputs_and_gradients(naive_normalized_attn, inputs, normalizer=normalizer)
    for name, x in got.items():
        assert x.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps * gold[name].abs().max().item()
        assert_close(x.double(), gold[name], rtol=0.0, atol=bound)


@each_normalizer
def test_safe_and_unsafe_are_one_function(normalizer):
    # scores of either sign up to about 50, and rows that are all negative
    inputs = draw(17, K=4, dtype=torch.float64)
    inputs = inputs._replace(q=inputs.q * 10)
    safe, unsafe = (
        outputs_and_gradients(naive_normalized_attn, inputs, normalizer=normalizer, safe=safe)
        for safe in (True, False)
    )
    for name, x in safe.items():
        # an exponent of 50 is itself rounded by 50 eps
        assert_close(x, unsafe[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1], ids=["mixed", "all-negative"])
@pytest.mark.parametrize("size", [100, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_normalizer
def test_safe_is_finite_and_right_for_large_scores(normalizer, dtype, size, sign):
    inputs = draw(9, K=1, dtype=dtype)
    q, k = inputs.q.abs(), inputs.k if sign > 0 else -inputs.k.abs()
    inputs = inputs._replace(q=q / q.max() * size, k=k / k.abs().max())
    formula = by_formula(inputs, normalizer, scale=1.0)
    got = outputs_and_gradients(naive_normalized_attn, inputs, normalizer=normalizer, scale=1.0)
    for name, x in got.items():
        # an exponent of 1e4 is itself rounded by 1e4 eps
        bound = 4 * size * torch.finfo(dtype).eps * formula.sizes[name].max().item()
        assert_close(x.double(), formula.values[name], rtol=0.0, atol=bound)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("normalizer", WITHOUT_NEGATIVE_KEYS)
def test_row_without_positive_score_is_exactly_zero(normalizer, safe):
    inputs = draw(9, HQ=2)
    inputs = inputs._replace(q=inputs.q.abs(), k=-inputs.k.abs())
    got = outputs_and_gradients(naive_normalized_attn, inputs, normalizer=normalizer, safe=safe)
    assert not any(x.count_nonzero() for x in got.values())


@pytest.mark.parametrize("safe", [True, False])
@each_normalizer
def test_gradient_at_score_zero_is_exactly_zero(normalizer, safe):
    q, k, v, do = draw(9, HQ=2)
    got = outputs_and_gradients(
        naive_normalized_attn,
        Inputs(q, torch.zeros_like(k), v, do),
        normalizer=normalizer,
        safe=safe,
    )
    assert not got["dq"].count_nonzero()
    if normalizer in SOFTPICKS:
        assert not any(x.count_nonzero() for x in got.values())
    else:
        assert got["dk"].count_nonzero()


@pytest.mark.parametrize("normalizer", SOFTPICKS)
def test_padded_keys_change_nothing_but_the_length(normalizer):
    # zero keys between the others have score 0, so no weight, no denominator and no gradient
    q, k, v, do = draw(4, S=8, dtype=torch.float64)
    k[:, 1:5:2] = 0
    kept = torch.tensor([0, 2, 4, 5, 6, 7])
    padded, dense = (
        outputs_and_gradients(naive_normalized_attn, x, normalizer=normalizer)
        for x in (Inputs(q, k, v, do), Inputs(q, k[:, kept], v[:, kept], do))
    )
    assert_exact(padded["o"], dense["o"])
    assert_exact(padded["dq"], dense["dq"])
    assert_exact(padded["dk"][:, kept], dense["dk"])
    assert not padded["dk"][:, 1:5:2].count_nonzero()


@each_normalizer
def test_nan_is_not_hidden(normalizer):
    q, k, v, _ = draw(5)
    k[:, 2] = float("nan")
    o = naive_normalized_attn(q, k, v, normalizer=normalizer)
    assert o[:, :2].isfinite().all()
    assert o[:, 2:].isnan().all()


@pytest.mark.parametrize("S", [9, 12])
def test_softmax_is_torch_attention(S):
    inputs = draw(9, HQ=2, S=S, head_first=True, dtype=torch.float64)
    mask = torch.ones(9, S, dtype=torch.bool).tril(S - 9)
    got = outputs_and_gradients(
        naive_normalized_attn, inputs, normalizer="softmax", head_first=True
    )
    expected = outputs_and_gradients(F.scaled_dot_product_attention, inputs, attn_mask=mask)
    assert_exact(got, expected)
