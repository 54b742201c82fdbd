"""Gradients of rows with a denominator below 1, by which the softpicks alone divide: few keys, small scores."""

import pytest
import torch
from numerics import (
    SOFTPICKS,
    Inputs,
    assert_no_worse_than_eager,
    by_formula,
    check_attention,
    draw,
    outputs_and_gradients,
    worst_row,
)

from fla.ops.attn.softpick import naive_normalized_attn, parallel_normalized_attn
from fla.ops.attn.softpick.normalizers import WITH_SMALL_DENOMINATORS

each_softpick = pytest.mark.parametrize("normalizer", SOFTPICKS)


def with_small_scores(inputs: Inputs, factor: float = 0.1) -> Inputs:
    return inputs._replace(q=(inputs.q * factor).to(inputs.q.dtype))


def test_the_kernels_know_which_normalizers_have_small_denominators():
    assert WITH_SMALL_DENOMINATORS == SOFTPICKS


@each_softpick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sequences_of_one_key(normalizer, dtype, device):
    # the only weight is n / (n + EPS) or 0, so dp and delta agree in nearly all digits
    inputs = with_small_scores(draw(1, 64, B=16, HQ=4, dtype=dtype, device=device))
    got = check_attention(parallel_normalized_attn, inputs, normalizer=normalizer)
    gold = outputs_and_gradients(
        naive_normalized_attn, inputs.to(torch.float64), normalizer=normalizer
    )
    for name in "dq", "dk":
        assert worst_row(got[name].double() - gold[name], gold[name]) < 0.05, name


CASES = {
    "causal": ({"T": 130, "HQ": 2, "H": 1}, {}),
    "heads first": ({"T": 70, "HQ": 2, "head_first": True}, {"head_first": True}),
    "window": ({"T": 130}, {"window_size": 3}),
    "packed": ({"T": 130}, {"cu_seqlens": torch.tensor([0, 1, 1, 40, 130])}),
    "sink": ({"T": 70, "HQ": 2}, {"sink_bias": torch.tensor([-9.0, 0.5])}),
    "more keys than queries": ({"T": 3, "S": 6}, {}),
    "negative scale": ({"T": 70}, {"scale": -0.2}),
    "not safe": ({"T": 70}, {"safe": False}),
}


@each_softpick
@pytest.mark.parametrize("case", CASES)
def test_small_scores(normalizer, case, device):
    sizes, arguments = CASES[case]
    arguments = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    inputs = with_small_scores(draw(K=32, dtype=torch.float16, device=device, **sizes), 0.03)
    shape = {name: x for name, x in arguments.items() if name != "safe"}
    assert by_formula(inputs, normalizer, **shape).log_z.min() < -1
    check_attention(parallel_normalized_attn, inputs, normalizer=normalizer, **arguments)


@each_softpick
def test_gradient_of_log_z(normalizer, device):
    inputs = with_small_scores(draw(70, 32, HQ=2, dtype=torch.float16, device=device), 0.03)
    dlse = torch.randn(1, 2, 70, generator=torch.Generator().manual_seed(0)).to(device)
    run = {"normalizer": normalizer}
    got = outputs_and_gradients(parallel_normalized_attn, inputs, dlse=dlse, **run)
    eager = outputs_and_gradients(naive_normalized_attn, inputs, dlse=dlse, **run)
    gold = outputs_and_gradients(
        naive_normalized_attn, inputs.to(torch.float64), dlse=dlse.double(), **run
    )
    for name in "dq", "dk", "dv":
        assert_no_worse_than_eager(name, got[name], eager[name], gold[name])
